"""Figures, axes, thinning and differences with known answers."""

import numpy as np
import pytest
from report_runs import write_evaluation, write_events, write_run
from torch.utils.tensorboard import SummaryWriter

from mhf_lightning.report.events import Series
from mhf_lightning.report.results import (
    MAX_POINTS,
    at_steps,
    differences,
    evaluation_table,
    load,
    read_config,
    thin,
)


def test_the_figures_of_a_run(tmp_path):
    (result,) = load([write_run(tmp_path / "one")])
    assert result.figures() == {
        "state": "completed",
        "steps": "20",
        "parameters": "1,234,567",
        "tokens": "2,000",
        "training loss": "8.1000",
        "validation loss": "9.1000",
        "validation perplexity": "548.75",  # 2^9.1
        "tokens/s": "500",
        "MFU": "25.0%",
        "peak memory (GiB)": "1.19",
        "restarts": "0",
        "goodput": "100.0%",
    }
    assert result.warnings == []


def test_the_axes_of_a_curve(tmp_path):
    (result,) = load([write_run(tmp_path / "one")])
    curve = result.curves["val/loss"]
    assert curve.y == pytest.approx([10.1, 9.1])
    assert curve.x["steps"].tolist() == [9, 19]
    assert curve.x["tokens"] == pytest.approx([1000, 2000])
    assert curve.x["FLOPs"] == pytest.approx([1e10, 2e10])
    assert curve.x["wall time"] == pytest.approx([9 / 3600, 19 / 3600])


def test_an_older_run_has_gaps(tmp_path):
    """No history, no configuration, and only the tags of the first version."""
    points = [("train/loss", 0, 2.0), ("throughput/tokens_per_s", 0, 100.0), ("throughput/tokens_per_s", 1, 300.0)]
    write_events(tmp_path / "old/tensorboard", [*points, ("train/loss", 1, float("nan"))])
    (result,) = load([tmp_path / "old"])
    figures = result.figures()
    assert (figures["training loss"], figures["tokens/s"]) == ("nan", "200")
    missing = ("steps", "parameters", "tokens", "validation loss", "MFU", "peak memory (GiB)", "restarts", "goodput")
    assert {figures[column] for column in missing} == {"n/a"}
    assert result.curves["train/loss"].y.tolist() == [2.0]
    assert result.curves["train/loss"].x["tokens"] is None
    assert result.curves["val/loss"].y.tolist() == []
    assert "train/loss: not finite and not drawn at 1 steps" in result.warnings
    assert any("config.yaml" in warning for warning in result.warnings)


def test_a_run_that_has_just_begun_again_has_no_points(tmp_path):
    run = write_run(tmp_path / "one")
    write_events(run / "tensorboard", [], number=1, purge=0)
    (result,) = load([run])
    assert result.warnings == [f"{run / 'tensorboard'}: no scalars in its event files"]
    assert result.figures()["validation loss"] == "n/a"
    assert result.curves["train/loss"].x["tokens"] is None


def test_damage_of_the_history_is_named(tmp_path):
    history = write_run(tmp_path / "one") / "history.jsonl"
    lines = history.read_text().splitlines()
    history.write_text("\n".join([lines[0], "no JSON", *lines[1:]]))
    (result,) = load([tmp_path / "one"])
    assert result.warnings == ["history.jsonl: line 2 is no JSON object"]
    assert result.figures()["steps"] == "20"


def test_why_a_run_failed_is_named(tmp_path):
    history = write_run(tmp_path / "one") / "history.jsonl"
    history.write_text(history.read_text().replace('"completed"', '"error: NonFiniteError: step 12"'))
    (result,) = load([tmp_path / "one"])
    assert result.figures()["state"] == "failed"
    assert result.warnings == ["failed: NonFiniteError: step 12"]


def test_a_counter_is_read_between_and_beyond_its_points():
    counter = Series(steps=[4, 9], times=[0.0, 0.0], values=[500.0, 1500.0])
    steps = np.array([0, 4, 5, 9, 11])
    assert at_steps(counter, steps) == pytest.approx([100, 500, 700, 1500, 1900])
    assert at_steps(Series([9], [0.0], [1000.0]), np.array([4, 9, 19])) == pytest.approx([500, 1000, 2000])


def test_thinning_keeps_ends_and_extremes():
    y = np.sin(np.arange(100_000) / 300)
    y[[1234, 77_777]] = 50, -50
    y[-3:] = 1, -1, 0  # the last is no extreme
    kept = thin(y)
    assert MAX_POINTS * 0.9 < len(kept) <= MAX_POINTS
    assert {0, 1234, 77_777, 99_999} <= set(kept.tolist())
    assert np.all(np.diff(kept) > 0)
    # Every stretch of the curve keeps its range, so the drawn band is that of all points.
    for stretch in range(0, 100_000, 10_000):
        inside = kept[(kept >= stretch) & (kept < stretch + 10_000)]
        assert y[inside].max() == pytest.approx(y[stretch : stretch + 10_000].max(), abs=1e-3)
    assert thin(np.arange(MAX_POINTS)).tolist() == list(range(MAX_POINTS))
    assert thin(np.array([])).tolist() == []


def test_only_keys_that_differ_are_listed(tmp_path):
    first = write_run(tmp_path / "a", config="model: {width: 8, name: x, betas: [1, 2]}\nsame: {deep: {er: null}}\n")
    second = write_run(
        tmp_path / "b", config="model: {width: 16, name: x, betas: [1, 3], new: {}}\nsame: {deep: {er: null}}\n"
    )
    assert differences(load([first, second])) == {
        "model.betas": ["[1, 2]", "[1, 3]"],
        "model.new": [None, "{}"],
        "model.width": ["8", "16"],
    }


def test_the_configuration_is_that_of_the_last_start(tmp_path):
    run = write_run(tmp_path / "one", config="lr: 1\n")
    for number, lr in ((1, 2), (2, 3), (10, 4)):
        (run / f"config-resume-{number}.yaml").write_text(f"lr: {lr}\n")
    assert load([run])[0].config == {"lr": "4"}


def test_secrets_in_the_configuration_of_an_older_run_are_not_shown(tmp_path):
    config = "logger: {api_key: canary, urls: ['https://me:canary@host'], save_dir: '${oc.env:LOGS}'}\n"
    (result,) = load([write_run(tmp_path / "one", config=config)])
    assert result.config == {
        "logger.api_key": '"(redacted)"',
        "logger.urls": '["https://(redacted)host"]',
        "logger.save_dir": '"${oc.env:LOGS}"',
    }


@pytest.mark.parametrize("content", ["{", "[]", '{"step": 1}', '{"step": 1, "results": {"a": {"loss": "x"}}}'])
def test_an_evaluation_that_cannot_be_read_is_named(tmp_path, content):
    run = write_run(tmp_path / "one")
    write_evaluation(run, "whole", {"piqa": {"acc": 0.5}})
    (run / "eval/other.json").write_text(content)
    (result,) = load([run])
    (warning,) = result.warnings
    assert warning.startswith(f"{run / 'eval/other.json'}: no results of mhf eval")
    assert evaluation_table([result]) == (["acc"], [["piqa", "one", "20", "0.5000"]])


@pytest.mark.parametrize("content", ["a: [1", "just text", "", "\x00"])
def test_a_configuration_that_cannot_be_read_is_named(tmp_path, content):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"config\.yaml.*its configuration is not compared"):
        read_config(tmp_path / "config.yaml")


def test_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "none"):
        with pytest.raises(ValueError, match=f"{path.name} is no run folder"):
            load([path])
    run = write_run(tmp_path / "one")
    with pytest.raises(ValueError, match="given twice"):
        load([run, tmp_path / "empty/../one"])


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    runs = [write_run(tmp_path / name, steps=1) for name in ("a/run", "b/run", "other")]
    assert [result.name for result in load(runs)] == ["a/run", "b/run", "other"]


@pytest.mark.parametrize(
    ("text", "config", "warning"),
    [("model:\n  z_loss: 0.5\n", {"model.z_loss": "0.5"}, None), ("[\n", {}, "run/config: ")],
)
def test_without_a_file_the_configuration_is_that_of_the_event_files(tmp_path, text, config, warning):
    with SummaryWriter(str(tmp_path / "one/tensorboard")) as writer:
        writer.add_text("run/config", f"```yaml\n{text}```")
    (result,) = load([tmp_path / "one"])
    assert result.config == config
    found = [line for line in result.warnings if "its configuration is not compared" in line]
    assert [warning in line for line in found] == ([True] if warning else [])
