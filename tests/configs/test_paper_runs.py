"""Dry runs of the paper's recipe: every model is planned for eight GPUs, and takes two steps at a small width."""

from pathlib import Path

import pytest
import yaml

from mhf_lightning.cli import main
from mhf_lightning.plan.cli import make_plan, parse
from mhf_lightning.runs import read_run

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS = sorted(path for path in (CONFIGS / "paper").rglob("*.yaml") if path.stem != "recipe")
TOKENS = {"128m": 60e9, "370m": 60e9, "1.3b": 100e9}
NARROW = {"num_heads": 2, "num_subnetworks": 2, "d_e": 16, "d_ff": 32}

by_name = pytest.mark.parametrize("path", MODELS, ids=lambda path: f"{path.parent.name}-{path.stem}")


def planned(path: Path, *more: str):
    files = (path, path.parent / "recipe.yaml", CONFIGS / "trainer/fsdp2.yaml")
    options = [option for file in files for option in ("--config", str(file))]
    options += ["--gpu=h100", "--gpus=8", "--trainer.accumulate_grad_batches=1", "--context_length=4096", *more]
    cli = parse(options)
    return make_plan(cli.config, cli.model, cli.datamodule)


@by_name
def test_a_run_on_eight_gpus_is_planned_with_the_paper_s_tokens(path):
    plan = planned(path, "--model.decoder.num_layers=1")  # all are traced alike
    assert plan.tokens_per_step == 64 * 4096
    assert plan.tokens == pytest.approx(TOKENS[path.parent.name], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("size", TOKENS)
def test_flash_mhf_of_every_size_fits_eight_gpus(size):
    assert planned(CONFIGS / "paper" / size / "flash_mhf_dh128.yaml").fits


@by_name
def test_two_steps_of_the_recipe_at_a_small_width(path, made_corpus, tmp_path):
    ffn = yaml.safe_load(path.read_text())["model"]["decoder"]["ffn"]
    recipe = yaml.safe_load((path.parent / "recipe.yaml").read_text())
    small = {f"model.decoder.ffn.{key}": value for key, value in NARROW.items() if key in ffn}
    small |= {"model.decoder.d_model": 32, "model.decoder.num_layers": 1, "model.decoder.num_attention_heads": 2}
    small |= {"trainer.max_steps": 2, "model.schedule.total_steps": recipe["trainer"]["max_steps"]}
    small |= {"trainer.accelerator": "cpu", "trainer.enable_progress_bar": "false", "model.compile_blocks": "false"}
    small |= {"data.path": made_corpus, "data.num_workers": 0, "data.micro_batch_size": 2, "run_dir": tmp_path / "run"}
    options = [option for key, value in small.items() for option in (f"--{key}", str(value))]
    main(["fit", "--config", str(path), "--config", str(path.parent / "recipe.yaml"), *options])
    run = read_run(tmp_path / "run")
    assert (run.state, run.step) == ("completed", 2)
    assert run.tokens == 2 * recipe["trainer"]["accumulate_grad_batches"] * 2 * 48
    assert 5 < run.loss < 15
