"""The table from event files with known answers."""

import csv
import os
import re
import statistics
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from mhf_lightning.cli import main
from mhf_lightning.evidence.summary import read_runs, summarise
from mhf_lightning.evidence.table import seed_table, summary_table, write
from mhf_lightning.model import DecoderConfig, FFNConfig

ROOT = Path(__file__).parents[2]
DECODER = DecoderConfig(
    vocab_size=300, d_model=16, num_layers=1, num_attention_heads=2, ffn=FFNConfig("swiglu", d_ff=8)
)
NON_EMBEDDING = 4 * 16 * 16 + 3 * 16 * 8 + 3 * 16
TOKENS_PER_STEP, FLOPS_PER_TOKEN = 1000, 50


def make_run(runs, variant, lr, losses, seed=1, rate=500.0, size="small", dataset="d1", max_steps=40, more=""):
    """Validation every 10 steps, points every 5."""
    folder = runs / size / variant / f"lr{lr}-seed{seed}"
    config = {
        "seed_everything": seed,
        "trainer": {"max_steps": max_steps},
        "model": {"decoder": DECODER.to_dict(), "optimizer": {"lr": lr}},
    }
    command = (
        f"mhf fit --config configs/evidence/{size}/recipe.yaml --config configs/evidence/{size}/{variant}.yaml "
        f"--run_dir {folder} --data.path d --model.optimizer.lr {lr} --seed_everything {seed} --ckpt_path auto{more}"
    )
    variables = {"MHF_COMMAND": command, "MHF_COMMIT": "abc", "MHF_DATASET": dataset, "gpu": "1 x NVIDIA H100"}
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        writer.add_text("run/config", f"```yaml\n{yaml.safe_dump(config)}```")
        writer.add_text("run/environment", "\n".join(f"| {name} | `{value}` |" for name, value in variables.items()))
        for done in range(5, 10 * len(losses) + 1, 5):
            step = done - 1
            writer.add_scalar("train/tokens", done * TOKENS_PER_STEP, step)
            writer.add_scalar("throughput/flops", done * TOKENS_PER_STEP * FLOPS_PER_TOKEN, step)
            writer.add_scalar("throughput/tokens_per_s_average", rate, step)
            writer.add_scalar("throughput/tokens_per_s", 2 * rate, step)  # of the last steps
            writer.add_scalar("throughput/mfu", 0.5, step)
            writer.add_scalar("memory/peak_gib", 1 + done / 64, step)
        for number, loss in enumerate(losses, 1):
            writer.add_scalar("val/loss", loss, 10 * number - 1)
            writer.add_scalar("val/perplexity", 2 * loss, 10 * number - 1)
    return folder


@pytest.fixture
def runs(tmp_path):
    runs = tmp_path / "runs"
    make_run(runs, "swiglu", 0.001, [4, 3, 2.75, 2.5])
    make_run(runs, "swiglu", 0.002, [4, 3, 2.5, 2.25], seed=1)
    make_run(runs, "swiglu", 0.002, [4, 3, 2.5, 2.75], seed=2, rate=1000.0)
    make_run(runs, "swiglu", 0.004, [4, 3, 3, float("nan")])
    make_run(runs, "swiglu_wide", 0.002, [4, 3, 2, 1.5])
    make_run(runs, "flash_mhf", 0.002, [4, 3, 2, 1.75])
    make_run(runs, "flash_mhf", 0.004, [4, 3, 2])
    return runs


def test_a_run_is_what_its_event_files_say(runs):
    run = next(run for run in read_runs([runs]) if run.variant == "flash_mhf" and run.lr == 0.002)
    assert (run.size, run.seed, run.steps, run.finished) == ("small", 1, 40, True)
    assert run.parameters == NON_EMBEDDING
    assert (run.tokens, run.flops, run.seconds) == (40_000, 2_000_000, 80)
    assert (run.loss, run.perplexity, run.tokens_per_s, run.mfu, run.peak_gib) == (1.75, 3.5, 500, 0.25, 1 + 40 / 64)
    assert (run.gpu, run.commit, run.dataset) == ("NVIDIA H100", "abc", "d1")
    assert run.command.startswith("mhf fit --config configs/evidence/small/recipe.yaml")
    assert run.curve["loss"].tolist() == [4, 3, 2, 1.75]
    assert run.curve["tokens"].tolist() == [10_000, 20_000, 30_000, 40_000]
    assert run.curve["seconds"].tolist() == [20, 40, 60, 80]


def test_the_best_learning_rate_is_that_of_the_common_seed(runs):
    summaries = summarise(read_runs([runs]))["small"]
    assert list(summaries) == ["swiglu_wide", "flash_mhf", "swiglu"]  # by loss
    swiglu, flash = summaries["swiglu"], summaries["flash_mhf"]
    assert [(run.lr, run.seed) for run in swiglu.runs] == [(0.002, 1), (0.002, 2)]
    assert swiglu.loss == 2.5
    assert swiglu.learning_rates == [0.001, 0.002, 0.004]
    assert swiglu.bracketed
    assert flash.learning_rates == [0.002]  # the other one is not finished
    assert not flash.bracketed


def test_the_command_writes_tables_and_pictures(runs, tmp_path):
    with tarfile.open(tmp_path / "events.tar.gz", "w:gz") as archive:
        archive.add(runs, ".")
    with pytest.raises(SystemExit) as end:
        main(["evidence", "table", str(tmp_path / "events.tar.gz"), "--out", str(tmp_path / "out")])
    assert end.value.code == 0
    text = re.sub(" +", " ", (tmp_path / "out/results.md").read_text())
    deviation = f"{statistics.stdev([2.25, 2.75]):.4f}"
    rates = "0.002 (0.001, 0.002, 0.004)"
    assert f"| swiglu | 1,456 | {rates} | 1, 2 | 2.5000 ± {deviation} | +0.0000 ± 0.0000 |" in text
    assert "| flash_mhf | 1,456 | 0.002 (0.002, not bracketed) | 1 | 1.7500 | -0.5000 | 3.500 | 500 | 25.0% |" in text
    assert "| 25.0% | 1.62 | 80 | 0.69 | 2e+06 | 0.69 | NVIDIA H100 | abc |" in text
    assert "| small | flash_mhf | 0.004 | 1 | 30 (cut) | 2.0000 | 4.000 | 500 | NVIDIA H100 | abc |\n" in text
    assert (
        "```\nmhf fit --config configs/evidence/SIZE/recipe.yaml --config configs/evidence/SIZE/VARIANT.yaml "
        "--run_dir RUN --data.path DATA --model.optimizer.lr LR --seed_everything SEED --ckpt_path auto\n```"
    ) in text
    with (tmp_path / "out/results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7
    assert {row["gpu"] for row in rows} == {"NVIDIA H100"}
    assert rows[0]["command"].endswith("--data.path d --model.optimizer.lr 0.002 --seed_everything 1 --ckpt_path auto")
    pictures = ["small-learning-rates.png", "small-swiglu.png", "small.png"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == pictures


def test_commands_that_differ_in_more_stand_with_their_runs(runs, tmp_path):
    make_run(runs, "pkv", 0.002, [4, 3, 2, 1], more=" --trainer.precision 32-true")
    write([runs], tmp_path / "out")
    text = (tmp_path / "out/results.md").read_text()
    assert "--trainer.precision 32-true` |" in text
    assert "SEED" not in text


def test_what_it_took_to_the_loss_of_the_baseline(runs):
    """That of seed 1 ends at 2.25 after 40,000 tokens, of which this variant needs 27,500, at half the speed."""
    make_run(runs, "pkv", 0.002, [4, 3, 2, 1.75], rate=250.0)
    make_run(runs, "mh_ffn", 0.002, [2, 2, 2, 2])
    make_run(runs, "dense_moe", 0.002, [4, 3, 3, 2.5])
    make_run(runs, "gated_swiglu", 0.002, [4, 3, 2, 1], seed=7)  # no common seed
    summaries = summarise(read_runs([runs]))["small"]
    base = summaries["swiglu"]
    reached = {
        name: (summary.to_reach(base, "flops"), summary.to_reach(base, "seconds"))
        for name, summary in summaries.items()
    }
    assert reached["pkv"] == pytest.approx((27.5 / 40, 2 * 27.5 / 40))
    assert reached["mh_ffn"] == pytest.approx((0.25, 0.25))  # at its first validation
    assert reached["dense_moe"] == reached["gated_swiglu"] == (None, None)
    assert reached["swiglu"] == (0.75, 0.75)  # the mean of its seeds does not fall from the third validation on
    assert "| - | 2e+06 | - |" in re.sub(" +", " ", summary_table(summaries))


def test_losses_by_seed_where_there_are_several(runs):
    """Also of a rate that one seed finds worse than another rate, which has that seed alone."""
    for seed, loss in ((2, 2.5), (3, 9.0)):
        make_run(runs, "flash_mhf", 0.002, [4, 3, 2, loss], seed=seed)
    make_run(runs, "flash_mhf", 0.003, [4, 3, 2, 1.5])
    summaries = summarise(read_runs([runs]))["small"]
    assert [(run.lr, run.seed) for run in summaries["flash_mhf"].runs] == [(0.003, 1)]
    assert summaries["flash_mhf"].minus(summaries["swiglu"]) == [1.5 - 2.25]
    text = re.sub(" +", " ", seed_table(summaries))
    means = f"{statistics.fmean([1.75, 2.5, 9]):.4f} ± {statistics.stdev([1.75, 2.5, 9]):.4f}"
    assert "| variant | lr | seed 1 | seed 2 | seed 3 | mean |" in text
    assert f"| flash_mhf | 0.002 | 1.7500 | 2.5000 | 9.0000 | {means} |" in text
    assert "| flash_mhf - swiglu | 0.002 | -0.5000 | -0.2500 | n/a | -0.3750 ± 0.1768 |" in text
    assert "| swiglu | 0.002 | 2.2500 | 2.7500 | n/a | 2.5000 ± 0.3536 |" in text
    assert text.count("\n") == 4


def test_of_the_same_run_the_one_begun_last_counts(runs, tmp_path):
    """In whatever order they are given; one that was cut does not take the place of a finished one."""
    make_run(tmp_path / "later", "flash_mhf", 0.004, [4, 3, 2, 1.5])
    make_run(tmp_path / "last", "flash_mhf", 0.004, [4, 3, 2, 1.25])
    make_run(tmp_path / "cut", "flash_mhf", 0.004, [4, 3])
    inputs = [tmp_path / "cut", tmp_path / "last", tmp_path / "later", runs]
    again = [run for run in read_runs(inputs) if (run.variant, run.lr) == ("flash_mhf", 0.004)]
    assert [(run.loss, run.finished) for run in again] == [(1.25, True)]


def test_differences_are_of_equal_seeds(runs):
    for seed, loss in ((2, 2.5), (3, 9.0)):
        make_run(runs, "flash_mhf", 0.002, [4, 3, 2, loss], seed=seed)
    summaries = summarise(read_runs([runs]))["small"]
    assert summaries["flash_mhf"].minus(summaries["swiglu"]) == [1.75 - 2.25, 2.5 - 2.75]
    spread = statistics.stdev([-0.5, -0.25])
    assert f"| -0.3750 ± {spread:.4f} " in re.sub(" +", " ", summary_table(summaries))


def test_a_variant_that_diverges_is_a_line(runs):
    for seed in (1, 2):
        make_run(runs, "pkv", 0.002, [4, 3, 3, float("nan")], seed=seed)
    assert "| 1, 2 | nan | +nan | nan |" in re.sub(" +", " ", summary_table(summarise(read_runs([runs]))["small"]))
    for lr in (0.002, 0.004):
        make_run(runs, "dense_moe", lr, [float("nan")] * 4)
    write([runs], runs.parent / "out")


def test_what_does_not_compare_is_refused(runs, tmp_path):
    make_run(tmp_path / "other", "pkv", 0.001, [4, 3, 2, 1], dataset="d2")
    with pytest.raises(ValueError, match=r"several corpora \(d1, d2\)"):
        read_runs([runs, tmp_path / "other"])
    make_run(tmp_path / "longer", "pkv", 0.001, [4, 3, 2, 1, 1], max_steps=50)
    with pytest.raises(ValueError, match=r"runs of small are of \[40, 50\] steps"):
        write([runs, tmp_path / "longer"], tmp_path / "out")
    make_run(tmp_path / "short", "pkv", 0.001, [])
    with pytest.raises(ValueError, match="no run got as far as its first validation"):
        read_runs([tmp_path / "short"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no run"):
        read_runs([tmp_path / "empty"])


def test_the_result_in_the_repository_is_that_of_its_event_files(tmp_path):
    """All of it but the pixels, so that no figure is typed or stale; the figures of its README are in it."""
    made = subprocess.run(["make", "-n", "evidence"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "mhf evidence table configs/evidence/events/*.tar.gz --out docs/evidence" in made
    committed = ROOT / "docs/evidence"
    write(sorted((ROOT / "configs/evidence/events").glob("*.tar.gz")), tmp_path)
    for name in ("results.md", "results.csv"):
        assert (tmp_path / name).read_bytes() == (committed / name).read_bytes(), f"make evidence writes {name} anew"
    results, readme = ((committed / name).read_text() for name in ("results.md", "README.md"))
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {path.name for path in committed.glob("*.png")} == set(re.findall(r"\]\((\S+\.png)\)", results))
    for path in re.findall(r"\]\(([^)]+)\)", readme):
        assert (committed / path).exists(), path
    figures = set(re.findall(r"[+-]?\b\d\.\d{4}\b", readme))
    assert figures
    assert not figures - set(re.findall(r"[+-]?\b\d\.\d{4}\b", results))


def test_the_command_for_report_pages_makes_one(tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (command,) = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/evidence/README.md").read_text(), re.S)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(["bash", "-ec", command], cwd=tmp_path, env={**os.environ, "PATH": path}, check=True)
    page = (tmp_path / "runs/evidence.html").read_text()
    for expected in (
        "flash_mhf_dh128/lr1.5e-3-seed1",
        "swiglu/lr1.5e-3-seed1",
        "2.4974",
        "2.5265",
        "model.decoder.ffn.name",
    ):
        assert expected in page
    assert "is not compared" not in page
