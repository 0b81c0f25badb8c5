"""`mhf bench scaling`: the command. Times trainings on several GPUs, and checks that they compute the same."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mhf_lightning.bench import measure, report
from mhf_lightning.bench.model import read_model
from mhf_lightning.bench.report import Row
from mhf_lightning.bench.scaling import results
from mhf_lightning.bench.scaling.cases import (
    CASES,
    DEEPSPEED,
    LEARNING_RATE,
    SEED,
    STAGES,
    STRATEGIES,
    Case,
    Sizes,
    divisors,
    label,
    left,
    model_name,
)
from mhf_lightning.bench.scaling.processes import Outcome, case_folder, free_port, run_cases, start_server
from mhf_lightning.bench.scaling.report import read, tables, write_report
from mhf_lightning.plan.flops import flops_per_token

FILES = {
    "scaling": results.SCALING_COLUMNS,
    "parity": results.PARITY_COLUMNS,
    "curves": results.CURVE_COLUMNS,
    "checkpoint": results.CHECKPOINT_COLUMNS,
}
CPU_PROCESSES = (2,)
# Of the facts, those in which the calls of one folder may differ: each row has its date, and a driver is the machine's.
OF_A_CALL = ("date", "command", "driver", "topology", "continued")
PREFLIGHT_SECONDS = 300
CASES_A_GPU = 3  # of a stage that times nothing: most of a case is its start, which leaves the GPU idle

DESCRIPTION = """\
Train model files on several GPUs of this host by the strategies of mhf fit, on made-up tokens, in processes of their
own. Stages:
  preflight   all-reduce bandwidth of each pair of GPUs, and of all of them
  weak        the same work for each GPU: tokens/s, efficiency against one GPU, MFU, peak memory of a rank
  parity      loss and gradient norm of 50 steps against one GPU, with 4 blocks; saved on N GPUs, continued on M
  checkpoint  FSDP2: time and stall of a save, and in the background; a rank killed, and the time until it goes on
  fixed       as weak, with a fixed global batch"""


def build_parser() -> argparse.ArgumentParser:
    """The options of `mhf bench scaling`."""
    parser = argparse.ArgumentParser(
        prog="mhf bench scaling",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("models", nargs="*", metavar="FILE", help="model files, such as those of configs/paper")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all, in this order")
    parser.add_argument(
        "--strategies", nargs="+", choices=STRATEGIES, help="default: all; on a CPU all but DeepSpeed's"
    )
    parser.add_argument(
        "--processes", type=int, nargs="+", metavar="N", help="default: the divisors of the GPUs, but 1"
    )
    parser.add_argument("--micro_batch", type=int, default=8, metavar="B", help="sequences for each GPU (default 8)")
    parser.add_argument("--global_batch", type=int, default=64, metavar="G", help="sequences of the stage fixed (64)")
    parser.add_argument("--length", type=int, default=4096, metavar="L", help="tokens of a sequence (default 4096)")
    parser.add_argument("--steps", type=int, default=15, help="measured, after 5 others (default 15)")
    parser.add_argument(
        "--precision", choices=results.TOLERANCES, help="default: bf16-mixed on GPUs, 32-true on the CPU"
    )
    parser.add_argument("--timeout", type=float, default=180.0, metavar="S", help="seconds for a case (default 180)")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder of the results (default runs/bench-scaling-DATE-TIME); that of an earlier call is continued",
    )
    parser.add_argument(
        "--report_from",
        type=Path,
        metavar="DIR",
        help="measure nothing; add report.md, plan.csv (the figures of mhf plan) and scaling.png to these results",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 1 if a case failed or differs, or 2 for wrong use."""
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(argv)
    terminate = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a call that is cut leaves no rank behind
    try:
        if args.report_from is not None:
            print(write_report(args.report_from))
            return 0
        return run(args, shlex.join(["mhf", "bench", "scaling", *argv]))
    except (ValueError, OSError, ImportError) as error:
        return measure.refuse(error)
    except KeyboardInterrupt:
        measure.say("interrupted; the CSV files hold what was measured")
        return 130
    finally:
        signal.signal(signal.SIGTERM, terminate)


def run(args: argparse.Namespace, command: str) -> int:
    """Run what is left of the stages; write a CSV for each kind, environment.json and preflight.json.

    Args:
        args: The parsed options.
        command: How this was started, for environment.json.

    Raises:
        ValueError: No model, a number that cannot be, or a folder with results that the new ones do not go with.
    """
    gpus = measure.visible_gpus()
    sizes = sizes_of(args, gpus)
    slots = gpus or [""] * max(sizes.processes)
    plans = {stage: CASES[stage](sizes) for stage in args.stages if stage in CASES}  # what cannot be is refused first
    models = {model: read_model(Path(model)) for model in sizes.models}
    output = args.output or Path(f"runs/bench-scaling-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    common = {name: value for name, value in vars(sizes).items() if name not in ("models", "strategies")}
    facts = {"command": command, "seed": SEED, "lr": LEARNING_RATE, **common, **environment(gpus)}
    prepare(output, facts)
    print("\n".join(f"{name}: {value}" for name, value in facts.items()) + "\n", flush=True)

    with tempfile.TemporaryDirectory(prefix="mhf-scaling-", ignore_cleanup_errors=True) as scratch:
        folder, ok = Path(scratch), True
        threads = start_server(slots, folder / "inductor")
        flops = {model: flops_per_token(config, sizes.length) for model, config in models.items()}
        results_of = Results(output, folder, facts, flops)
        for stage in sorted(args.stages, key=STAGES.index):
            if stage == "preflight":
                ok &= preflight(slots, output / "preflight.json", folder)
                continue
            for cases in left(plans[stage], results_of.done):
                share = CASES_A_GPU if stage == "parity" else 1
                run_cases(cases, slots, threads, folder, args.timeout, results_of.add, results_of.begin, share)
        results_of.close()
    print(tables(output, []), flush=True)
    measure.say(
        f"results: {output}; with the figures of mhf plan, and a plot: mhf bench scaling --report_from {output}"
    )
    return 0 if ok and results_of.ok else 1


def prepare(output: Path, facts: dict[str, Any]) -> None:
    """Write environment.json, or add this call to that of an earlier one.

    Raises:
        ValueError: The folder's rows were measured by other code, with other settings, or on another machine.
    """
    path = output / "environment.json"
    if not path.exists():
        for name in ("preflight.json", *(f"{name}.csv" for name in FILES)):
            if (output / name).exists():
                raise ValueError(f"{output / name} is there without environment.json; name another --output")
        output.mkdir(parents=True, exist_ok=True)
    else:
        first = json.loads(path.read_text())
        pairs = {name: (first.get(name), facts.get(name)) for name in {**first, **facts} if name not in OF_A_CALL}
        wrong = [f"{name} was {then}, is {now}" for name, (then, now) in pairs.items() if then != now]
        if facts["commit"] == measure.UNKNOWN_COMMIT:
            wrong.append(f"commit is {measure.UNKNOWN_COMMIT}")
        if wrong:
            raise ValueError(f"{output} cannot be continued: {'; '.join(wrong)}; name another --output")
        continued = f"{facts['date']}, driver {facts.get('driver')}: {facts['command']}"
        facts = {**first, "continued": [*first.get("continued", []), continued]}
    path.write_text(json.dumps(facts, indent=2) + "\n")


def sizes_of(args: argparse.Namespace, slots: list[str]) -> Sizes:
    """Return what the options say, defaults filled in.

    Raises:
        ValueError: No model, or a number that cannot be.
    """
    if not args.models and args.stages != ["preflight"]:
        raise ValueError("name the model files: configs/paper/370m/flash_mhf_dh128.yaml configs/paper/370m/swiglu.yaml")
    names = [model_name(model) for model in args.models]
    if len(set(names)) < len(names):
        raise ValueError("two model files have the same folder and name; the tables could not tell them apart")
    processes = sorted(set(args.processes or (divisors(len(slots))[1:] or [1] if slots else CPU_PROCESSES)))
    if processes[0] < 1 or (slots and processes[-1] > len(slots)):
        raise ValueError(f"--processes {processes}: they must be from 1 to the number of GPUs, {len(slots)}")
    for name in ("micro_batch", "global_batch", "length", "steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    strategies = args.strategies or [name for name in STRATEGIES if slots or name not in DEEPSPEED]
    if not slots and set(strategies) & set(DEEPSPEED):
        raise ValueError(f"--strategies {' '.join(strategies)}: {' and '.join(DEEPSPEED)} need GPUs; leave them out")
    return Sizes(
        tuple(args.models),
        tuple(sorted(strategies, key=STRATEGIES.index)),
        processes,
        micro_batch=args.micro_batch,
        global_batch=args.global_batch,
        length=args.length,
        steps=args.steps,
        precision=args.precision or ("bf16-mixed" if slots else "32-true"),
        compiled=bool(slots),
    )


class Results:
    """Turns cases that have ended into rows, written at once after those of earlier calls.

    Attributes:
        ok: No case has failed or differs; running out of memory is a result.
        done: Labels of the cases that had a row before.
    """

    def __init__(self, output: Path, scratch: Path, facts: dict[str, str], flops: dict[str, float]) -> None:
        self.scratch, self.flops, self.ok = scratch, flops, True
        self._output = output
        self._about = {name: facts[name] for name in results.ABOUT}
        self._files: dict[str, report.CsvFile] = {}
        self._baselines: dict[tuple[str, str], Row] = {}
        self._references: dict[str, results.Curve] = {}
        self.done: set[str] = set()
        self._read()
        self._killed: tuple[Case, Outcome] | None = None

    def _read(self) -> None:
        """Take the rows of earlier calls."""
        scaling, parity, curves, checkpoint = (read(self._output, name, columns) for name, columns in FILES.items())
        for row in scaling:
            self.done.add(label(row["stage"], row["model"], row["strategy"], row["gpus"]))
            if row["strategy"] == "single":
                self._baselines[row["stage"], row["model"]] = row
        for row in parity:
            self.done.add(label("parity", row["model"], row["strategy"], row["gpus"], row.get("continues")))
            if row["strategy"] == "single" and "continues" not in row and row["status"] == "ok":
                self._references[row["model"]] = {}
        for row in curves:
            if row["strategy"] == "single" and "continues" not in row and row["model"] in self._references:
                self._references[row["model"]][row["step"]] = row["loss"], row["grad_norm"]
        for row in checkpoint:
            way = row["strategy"], row["gpus"]
            self.done.add(label("checkpoint", row["model"], *way, f"{way[0]} on {way[1]}"))

    def begin(self, case: Case) -> None:
        """Say that a case begins."""
        measure.say(f"{case.label} ...")

    def add(self, case: Case, outcome: Outcome) -> None:
        """Take a case that has ended."""
        row: Row | None
        if case.label in self.done:  # has a row, and ran again for its checkpoints
            row = None
        elif case.stage == "parity":
            row = self._parity(case, outcome)
        elif case.stage == "checkpoint":
            row = self._checkpoint(case, outcome)
        else:
            key = case.stage, model_name(case.model)
            row = results.scaling_row(case, outcome, self.flops[case.model], self._baselines.get(key))
            if case.strategy == "single":
                self._baselines[key] = row
            self._write("scaling", row)
        status = outcome.status if row is None else row["status"]
        measure.say(f"    {case.label}: {status}, {outcome.seconds:.1f} s")
        if outcome.log and not results.deaths(outcome):
            measure.say(outcome.log)
        self.ok &= row is None or row["status"] in ("ok", "OOM")

    def _parity(self, case: Case, outcome: Outcome) -> Row:
        if case.strategy == "single" and case.resume is None and outcome.status == "ok":
            self._references[model_name(case.model)] = results.curve(outcome)
        row = results.parity_row(case, outcome, self._references.get(model_name(case.model)))
        for step, (loss, norm) in results.curve(outcome).items():
            self._write("curves", row | {"step": step, "loss": loss, "grad_norm": norm})
        self._write("parity", row)
        return row

    def _checkpoint(self, case: Case, outcome: Outcome) -> Row | None:
        """Return nothing yet for the case that is to be killed."""
        if case.kill:
            self._killed = case, outcome
            return None
        assert self._killed is not None
        folder = case_folder(self.scratch, self._killed[0].label) / "checkpoints"
        row = results.checkpoint_row(self._killed, outcome, folder)
        shutil.rmtree(folder, ignore_errors=True)  # those of a large model fill the disk
        self._write("checkpoint", row)
        return row

    def _write(self, name: str, row: Row) -> None:
        if name not in self._files:
            self._files[name] = report.CsvFile(self._output / f"{name}.csv", FILES[name], go_on=True)
        row = self._about | row
        self._files[name].write({column: row[column] for column in FILES[name] if column in row})

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


def preflight(slots: list[str], found: Path, scratch: Path) -> bool:
    """Let `mhf_lightning.preflight` take each GPU for a node; it prints its table. Return whether all is well."""
    if found.exists():  # from an earlier call
        return True
    if len(slots) == 1:
        measure.say("preflight: needs more than one GPU")
        return True
    port = free_port()
    common = {"SLURM_NTASKS": str(len(slots)), "SLURM_STEP_NUM_NODES": str(len(slots)), "SLURM_STEP_NODELIST": ""}
    processes = []
    for number, slot in enumerate(slots):
        own = {"SLURM_PROCID": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if slot:
            own["CUDA_VISIBLE_DEVICES"] = slot
        command = [sys.executable, "-m", "mhf_lightning.preflight", "--run_dir", str(scratch), "--json", str(found)]
        processes.append(subprocess.Popen(command, env={**os.environ, **common, **own}))
    try:
        codes = [process.wait(PREFLIGHT_SECONDS) for process in processes]
        return not any(codes)
    except subprocess.TimeoutExpired:
        measure.say(f"preflight: no answer within {PREFLIGHT_SECONDS} s")
        return False
    finally:
        for process in processes:
            process.kill()
            process.wait()


def environment(slots: list[str]) -> dict[str, Any]:
    """Return what the figures depend on: date, GPUs, driver, versions, the variables of NCCL, the commit."""
    device = torch.device("cuda" if slots else "cpu")
    facts: dict[str, Any] = {
        "commit": measure.commit() or measure.UNKNOWN_COMMIT,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": measure.device_name(device),
        "devices": len(slots),
        "python": platform.python_version(),
    }
    for package in ("torch", "triton", "lightning", "deepspeed"):
        facts[package] = _version(package)
    facts["MHF_BACKEND"] = os.environ.get("MHF_BACKEND") or "auto"
    facts |= {name: value for name, value in sorted(os.environ.items()) if name.startswith("NCCL_")}
    if slots:
        facts |= {"CUDA": torch.version.cuda, "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
        facts["driver"] = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
        facts["topology"] = _output_of("nvidia-smi", "topo", "-m")
    return facts


def _version(package: str) -> str:
    try:
        return torch.__version__ if package == "torch" else importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _output_of(*command: str) -> str:
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
        return re.sub(r"\x1b\[[0-9;]*m", "", text)  # nvidia-smi underlines headings, also in a file
    except (OSError, subprocess.SubprocessError):
        return f"unknown ({command[0]} did not say)"
