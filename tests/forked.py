"""The `mhf` command in a process of its own, forked from one that has imported it: its start takes no seconds."""

import multiprocessing
import os
import sys
from pathlib import Path
from tempfile import NamedTemporaryFile

PRELOADED = ["mhf_lightning.training.cli", "mhf_lightning.checkpoint.export"]


def _run(args: list[str], folder: Path, environment: dict[str, str], outputs: tuple[str, str]) -> None:
    import torch

    from mhf_lightning.cli import main

    for stream, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = ["mhf", *args]
    main()


def start(args: list[str], folder: Path, environment: dict[str, str], outputs: tuple[str, str]):
    """Start `mhf ARGS` in a folder; what it prints is appended to the two files."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_run, args=(args, folder, environment, outputs))
    process.start()
    return process


def mhf(*args: str, code: int = 0, folder: Path | None = None) -> str:
    """Run `mhf ARGS` in a folder; return what it printed, errors last."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    with NamedTemporaryFile("r") as out, NamedTemporaryFile("r") as errors:
        process = start(list(args), folder or Path.cwd(), environment, (out.name, errors.name))
        process.join()
        printed = out.read() + errors.read()
    assert process.exitcode == code, printed
    return printed
