"""The `mhf` command with every file of configs/trainer, on gloo: all train, resume and evaluate as one process does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_parity import deepspeed_missing
from training_processes import Results, run_processes

from mhf_lightning.checkpoint import verify
from mhf_lightning.data.prepare import prepare

pytestmark = [pytest.mark.slow, pytest.mark.serial]
ROOT = Path(__file__).parents[2]
GLOBAL_BATCH = 4
PROMPT = "def read("
CPU = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
TWO = [*CPU, "--trainer.devices", "2"]
# For every file of configs/trainer: processes, how many of them read different data, and what a CPU needs besides.
# Lightning refuses DeepSpeed on CPUs; cli_worker.py lets it pass.
TRAINERS: dict[str, tuple[int, int, list[str]]] = {
    "cpu": (1, 1, []),
    "gpu": (1, 1, []),
    "ddp": (2, 2, TWO),
    "fsdp2": (2, 2, [*TWO, "--trainer.strategy.init_args.data_parallel_size", "2"]),
    "deepspeed_zero2": (2, 2, TWO),
    "deepspeed_zero3": (2, 2, TWO),
    "fsdp2_tp": (
        4,
        2,
        [*CPU, "--trainer.devices", "4", "--trainer.strategy.init_args.data_parallel_size", "2"],
    ),
}
COMMANDS = {"flash_mhf": ("fit", "resume", "validate", "predict", "export"), "swiglu": ("fit", "resume")}
MODELS = tuple(COMMANDS)
SMALL = {
    "flash_mhf": ["--model.decoder.ffn.num_heads", "4", "--model.decoder.ffn.d_e", "8"],
    "swiglu": ["--model.decoder.ffn.d_ff", "48"],
}


def runnable(trainer: str) -> bool:
    if "deepspeed" in trainer:
        return not deepspeed_missing
    return trainer != "gpu" or torch.cuda.is_available()


def cases(models: tuple[str, ...] = MODELS, compared: bool = False) -> list:
    names = [(t, m) for t in TRAINERS for m in models if not (compared and t == "cpu")]
    missing = {t: pytest.mark.skipif(not runnable(t), reason=f"{t} cannot run here") for t in TRAINERS}
    return [pytest.param(t, m, marks=missing[t], id=f"{t}-{m}") for t, m in names]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Blocks of 16 tokens, vocabulary 300."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(60):
        (folder / f"{number}.txt").write_text(f"def read({number}): return {number * 17 % 13}\n" * (number % 5 + 1))
    prepare([str(folder / "*.txt")], str(folder / "data"), context_length=16, vocab_size=300, num_workers=1,
            validation_fraction=0.2)  # fmt: skip
    return folder / "data"


def fit_arguments(corpus: Path, run_dir: Path, trainer: str, model: str) -> list[str]:
    return [
        *(
            "--config",
            str(ROOT / f"configs/model/{model}.yaml"),
            "--config",
            str(ROOT / f"configs/trainer/{trainer}.yaml"),
        ),
        *("--data.path", str(corpus), "--data.micro_batch_size", str(GLOBAL_BATCH // TRAINERS[trainer][1])),
        *("--run_dir", str(run_dir), "--trainer.val_check_interval", "2", "--trainer.log_every_n_steps", "1"),
        *("--model.decoder.vocab_size", "300", "--model.decoder.d_model", "32", "--model.decoder.num_layers", "1"),
        *("--model.decoder.num_attention_heads", "4", "--model.schedule.warmup_steps", "2"),
        *("--model.schedule.total_steps", "10", "--model.optimizer.eps", "1e-5"),
        *("--checkpoint.every_n_steps", "2", "--trainer.enable_progress_bar", "false"),
        *SMALL[model],
        *TRAINERS[trainer][2],
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def ran(corpus, folder) -> dict[tuple[str, str, str], list[dict]]:
    """What every rank printed, by trainer, model and command."""
    by_world: dict[int, dict[str, list[str]]] = {}
    for trainer in filter(runnable, TRAINERS):
        commands = by_world.setdefault(TRAINERS[trainer][0], {})
        for model in MODELS:
            run_dir = folder / f"{trainer}-{model}"
            arguments = fit_arguments(corpus, run_dir, trainer, model)
            fit = ["fit", *arguments, "--ckpt_path", "auto", "--sample_prompt", PROMPT]
            every = {
                "fit": [*fit, "--trainer.max_steps", "4"],
                "resume": [*fit, "--trainer.max_steps", "6"],
                "validate": ["validate", *arguments, "--ckpt_path", "last"],
                "predict": ["predict", *arguments, "--ckpt_path", "last"],
                "export": ["export", str(run_dir), str(run_dir / "model.safetensors"), "--to", "full"],
            }
            commands |= {f"{trainer} {model} {name}": every[name] for name in COMMANDS[model]}
    results = {}
    for world, commands in by_world.items():
        ranks: Results = run_processes("cli_worker.py", commands, world, folder / f"world-{world}")
        for name in commands:
            results[tuple(name.split())] = [rank[name] for rank in ranks if name in rank]
    return results


def test_every_trainer_config_is_here():
    assert set(TRAINERS) == {path.stem for path in (ROOT / "configs/trainer").glob("*.yaml")}


def scalars(run_dir: Path, tag: str) -> dict[int, float]:
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def tolerance(trainer: str) -> float:
    return 2e-2 if trainer == "gpu" else 1e-5  # bfloat16


@pytest.mark.parametrize(("trainer", "model"), cases())
def test_every_command_ends_well(ran, folder, trainer, model):
    for command in COMMANDS[model]:
        expected = 2 if command == "export" and "deepspeed" in trainer else 0
        assert ran[trainer, model, command], "left out after a command that failed"
        for rank in ran[trainer, model, command]:
            assert rank["code"] == expected, rank["printed"]
    checkpoints = folder / f"{trainer}-{model}/checkpoints"
    assert (checkpoints / "latest").read_text() == "step-6\n"
    assert verify(checkpoints / "step-6").about["tokens_seen"] == 6 * GLOBAL_BATCH * 16


@pytest.mark.parametrize(("trainer", "model"), cases(compared=True))
def test_curves_are_those_of_one_process(ran, folder, trainer, model):
    tags = ["train/loss", "train/grad_norm", "val/loss"]
    if "deepspeed" not in trainer:  # which leaves no gradients to look at
        parts = ["embedding", "attention", "ffn", "norms", *(["router"] if model == "flash_mhf" else [])]
        tags += ["health/update_to_weight", *(f"health/grad_norm/{part}" for part in parts)]
    for tag in tags:
        expected, ours = (scalars(folder / f"{name}-{model}", tag) for name in ("cpu", trainer))
        assert list(expected) == ([0, 1, 3, 5] if tag == "val/loss" else [0, 1, 2, 3, 4, 5])
        assert ours == pytest.approx(expected, rel=tolerance(trainer))


@pytest.mark.parametrize(("trainer", "model"), cases(("flash_mhf",)))
def test_validate_shows_the_last_validation(ran, folder, trainer, model):
    shown = ran[trainer, model, "validate"][0]["printed"]
    assert f"{scalars(folder / f'{trainer}-{model}', 'val/loss')[5]:.6f}"[:6] in shown


def sampled(printed: str) -> str:
    (_, after) = printed.split("generated by the model")
    return after[after.index(PROMPT) : after.index("Curves:")].rstrip("\n─ ")


@pytest.mark.parametrize(("trainer", "model"), cases(compared=True))
@pytest.mark.parametrize("command", ["fit", "resume"])
def test_rank_0_prints_the_summary_and_the_text_of_one_process(ran, trainer, model, command):
    first, *others = ran[trainer, model, command]
    expected = ran["cpu", model, command][0]["printed"]
    if trainer != "gpu":
        assert sampled(first["printed"]) == sampled(expected)
    assert len(sampled(first["printed"])) > len(PROMPT)
    (parameters,) = (line for line in expected.splitlines() if "without embeddings" in line)
    assert parameters in first["printed"]
    assert not any("generated by the model" in rank["printed"] or "parameters" in rank["printed"] for rank in others)


def predictions(run_dir: Path) -> dict[int, tuple[float, int]]:
    rows = [json.loads(line) for path in run_dir.glob("predictions*.jsonl") for line in path.read_text().splitlines()]
    assert len({row["sample_index"] for row in rows}) == len(rows)
    return {row["sample_index"]: (row["nll"], row["num_tokens"]) for row in rows}


@pytest.mark.parametrize(("trainer", "model"), cases(("flash_mhf",), compared=True))
def test_predictions_come_once_from_each_replica(ran, folder, trainer, model):
    run_dir, ranks = folder / f"{trainer}-{model}", TRAINERS[trainer][1]
    names = [f"predictions-rank{rank}.jsonl" for rank in range(ranks)] if ranks > 1 else ["predictions.jsonl"]
    assert sorted(path.name for path in run_dir.glob("predictions*")) == names
    expected, ours = predictions(folder / f"cpu-{model}"), predictions(run_dir)
    assert len(expected) > 10
    assert ours.keys() == expected.keys()
    for sample, values in expected.items():
        assert ours[sample] == pytest.approx(values, rel=10 * tolerance(trainer))


@pytest.mark.parametrize(("trainer", "model"), cases(("flash_mhf",), compared=True))
def test_export_writes_the_weights_of_one_process(ran, folder, tmp_path, trainer, model):
    """DeepSpeed's checkpoints are exported by its own program, as the message says."""
    expected = load_file(folder / f"cpu-{model}/model.safetensors")
    (done,) = ran[trainer, model, "export"]
    if trainer.startswith("deepspeed"):
        words = done["printed"][done["printed"].index("run python") :].split()[1:]
        assert words[-1:] == ["checkpoint"]
        words = [{"python": sys.executable, "OUTPUT": str(tmp_path / "whole")}.get(word, word) for word in words]
        subprocess.run(words, check=True, capture_output=True)
        weights = torch.load(tmp_path / "whole/pytorch_model.bin", weights_only=True)
        weights = {key.removeprefix("decoder."): weight for key, weight in weights.items()}
    else:
        weights = load_file(folder / f"{trainer}-{model}/model.safetensors")
    for key, weight in expected.items():
        torch.testing.assert_close(weights[key], weight, rtol=0, atol=1e-2 if trainer == "gpu" else 1e-5)


def test_lightning_starts_the_other_processes_itself(ran, corpus, folder, tmp_path):
    arguments = fit_arguments(corpus, tmp_path / "run", "ddp", "flash_mhf")
    command = [sys.executable, "-m", "mhf_lightning.cli", "fit", *arguments, "--trainer.max_steps", "2"]
    done = subprocess.run([*command, "--sample_prompt", PROMPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("generated by the model") == 1
    losses = scalars(tmp_path / "run", "val/loss")
    assert losses[1] == pytest.approx(scalars(folder / "cpu-flash_mhf", "val/loss")[1], rel=1e-5)
