"""Measures what `mhf plan` predicts: `python tests/gpu/measure_plan.py --out plan.csv` on a machine with one GPU.

Every case trains a few real steps by Lightning's Trainer on random tokens, in a process of its own, and compares
``torch.cuda.max_memory_allocated`` with the plan of the same options. A case that fails is reported and left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from mhf_lightning.bench.report import CsvFile

PAPER = Path(__file__).parents[2] / "configs" / "paper"
GIB = 2**30
STEPS = 3
NO_WARMUP = "--model.schedule.warmup_steps=0"


def case(size: str, ffn: str, batch: int, length: int, *more: str) -> list[str]:
    """Return the options of `mhf plan` for a model of the paper, its name first."""
    options = [f"--config={PAPER / size / ffn}.yaml", "--data.path=none", f"--data.micro_batch_size={batch}"]
    return [f"{size}/{ffn}", *options, f"--context_length={length}", "--gpu=h200", "--gpus=1", NO_WARMUP, *more]


CASES = [
    case("128m", "flash_mhf_dh128", 16, 1024),
    case("128m", "swiglu", 16, 1024),
    case("128m", "mh_ffn", 4, 1024),
    case("370m", "flash_mhf_dh128", 8, 2048),
    case("370m", "swiglu", 8, 2048),
    case("370m", "flash_mhf_dh128", 8, 2048, "--trainer.accumulate_grad_batches=3"),
    case("1.3b", "flash_mhf_dh128", 4, 4096),
    case("1.3b", "swiglu", 2, 4096),
    case("1.3b", "flash_mhf_dh128", 8, 4096, "--model.activation_checkpointing=selective"),
    case("1.3b", "flash_mhf_dh128", 8, 4096, "--model.activation_checkpointing=full"),
    case("1.3b", "swiglu", 8, 4096, "--model.activation_checkpointing=selective"),
    case("370m", "flash_mhf_dh128", 4, 2048, "--trainer.precision=bf16-true"),
    case("370m", "flash_mhf_dh128", 2, 2048, "--trainer.precision=32-true"),
    case("370m", "flash_mhf_dh128", 8, 2048, "--model.compile_blocks=true"),
    case("370m", "swiglu", 8, 2048, "--model.compile_blocks=true"),
    case("1.3b", "flash_mhf_dh128", 4, 4096, "--model.compile_blocks=true"),
]


def measure(arguments: list[str]) -> dict[str, Any]:
    """Predict and train; returns bytes."""
    import torch
    from lightning.pytorch import LightningDataModule, Trainer
    from torch.utils.data import DataLoader

    from mhf_lightning.checkpoint.strategy import MHFSingleDevice
    from mhf_lightning.plan.cli import make_plan, parse

    cli = parse(arguments)
    options: Any = cli.config
    plan = make_plan(options, cli.model, cli.datamodule)
    step = plan.step

    class RandomTokens(LightningDataModule):
        micro_batch_size = step.micro_batch_size

        def train_dataloader(self) -> DataLoader:
            generator = torch.Generator().manual_seed(0)
            samples = STEPS * step.accumulate * step.micro_batch_size
            tokens = torch.randint(step.decoder.vocab_size, (samples, step.context_length + 1), generator=generator)
            items = [
                {"input_ids": row[:-1], "labels": row[1:], "sample_index": torch.tensor(i)}
                for i, row in enumerate(tokens)
            ]
            return DataLoader(items, batch_size=step.micro_batch_size, pin_memory=True)

    config = options.clone()
    config.trainer = cli.parser.get_defaults().trainer
    model = cli.parser.instantiate(config).model
    trainer = Trainer(
        strategy=MHFSingleDevice(torch.device("cuda", 0)),
        accelerator="gpu",
        devices=1,
        precision=step.precision,
        accumulate_grad_batches=step.accumulate,
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, RandomTokens())
    return {
        "micro_batch": step.micro_batch_size,
        "context_length": step.context_length,
        "options": " ".join(arguments[arguments.index(NO_WARMUP) + 1 :]),
        "predicted": plan.memory.peak,
        "measured": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        **{f"predicted {part}": size for part, size in plan.memory.at_peak.items()},
    }


def main() -> None:
    """Run all cases, or those whose number is given, print a table, and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="CSV file to write; sizes in GiB")
    parser.add_argument("--case", type=int, nargs="*", help="numbers of the cases to run; all unless given")
    parser.add_argument("--arguments", help=argparse.SUPPRESS)  # of the one case that this process runs
    options = parser.parse_args()
    if options.arguments:
        print("RESULT" + json.dumps(measure(json.loads(options.arguments))))
        return

    file = None
    print(f"{'case':28} {'options':46} {'predicted':>9} {'measured':>9} {'error':>7}")
    for number in options.case if options.case is not None else range(len(CASES)):
        name, *arguments = CASES[number]
        command = [sys.executable, __file__, "--arguments", json.dumps(arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
        if not found:
            print(f"{name:28} failed ({done.returncode}):\n" + "\n".join(done.stderr.splitlines()[-8:]), flush=True)
            continue
        result = json.loads(found[0].removeprefix("RESULT"))
        sizes = {key: value / GIB for key, value in result.items() if key.startswith(("predicted", "measured", "res"))}
        error = sizes["predicted"] / sizes["measured"] - 1
        shape = f"{result['micro_batch']} x {result['context_length']} {result['options']}"
        print(f"{name:28} {shape:46} {sizes['predicted']:9.2f} {sizes['measured']:9.2f} {error:+7.1%}", flush=True)
        row = {"case": name, **result, **{k: f"{v:.3f}" for k, v in sizes.items()}, "error": f"{error:+.4f}"}
        if options.out:
            file = file or CsvFile(options.out, tuple(row))
            file.write(row)


if __name__ == "__main__":
    main()
