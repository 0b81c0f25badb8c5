"""One process of a distributed run: runs the given `mhf` commands one after the other and writes what they printed.

Started as ``python cli_worker.py ORDERS.json OUT_DIR`` with torchrun's variables in the environment, which is what
``torchrun -m mhf_lightning.cli`` does; all commands share the start-up.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback
from pathlib import Path

import torch
from worker import CPUDeepSpeed

from mhf_lightning.cli import main as mhf
from mhf_lightning.training.strategies import MHFDeepSpeed


def run(args: list[str]) -> tuple[int, str]:
    """Return the exit code of ``mhf ARGS`` and what it printed."""
    printed = io.StringIO()
    sys.argv = ["mhf", *args]
    code = 0
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            mhf()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        except Exception:
            traceback.print_exc()
            code = 1
    return code, printed.getvalue()


def main() -> None:
    """Run the commands; after one that fails, the others are left out, for its ranks may have parted."""
    commands, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.set_num_threads(1)
    for name in ("root_device", "setup_environment", "setup_distributed"):  # the config names MHFDeepSpeed itself
        setattr(MHFDeepSpeed, name, vars(CPUDeepSpeed)[name])
    results = {}
    for name, args in commands.items():
        if args[0] == "export" and os.environ["RANK"] != "0":
            continue  # a command of one process
        code, printed = run(args)
        results[name] = {"code": code, "printed": printed}
        print(f"{name}: {code}\n{printed}", flush=True)
        if code == 1:
            break
    (out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
