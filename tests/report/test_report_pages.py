"""The report and TensorBoard, opened in a real headless browser that reaches nothing but this machine."""

import subprocess
import sys
from pathlib import Path

import pytest
import screenshots
from report_runs import PNG, write_evaluation, write_events, write_run

from mhf_lightning.report.page import render
from mhf_lightning.report.results import CURVES, load

DOCS = Path(__file__).parents[2] / "docs"


def open_report(page, folder: Path, *runs: Path) -> None:
    path = folder / "report.html"
    path.write_text(render(load(list(runs))), encoding="utf-8")
    page.goto(path.as_uri())
    page.locator("#curves .main-svg").first.wait_for()


def texts(page, selector: str) -> list[str]:
    return page.locator(selector).all_text_contents()


def x_values(page, panel: int, run: int) -> list[float]:
    """What plotly draws: x of a run's curve in a panel of a report of two runs."""
    return page.evaluate(f"document.getElementById('curves').data[{2 * panel + run}].x")


@pytest.fixture
def report(page, tmp_path):
    """A report of two runs with known figures."""
    runs = [write_run(tmp_path / "one"), write_run(tmp_path / "two", scale=0.5, config="model: {width: 16}\n")]
    open_report(page, tmp_path, *runs)
    return page


def test_the_table_holds_the_figures(report):
    columns = texts(report, "#runs thead th")
    rows = [texts(report, f"#runs tbody tr:nth-child({n}) > *") for n in (1, 2)]
    shown = [dict(zip(columns, row, strict=True)) for row in rows]
    assert [row["run"] for row in shown] == ["one", "two"]
    assert [row["training loss"] for row in shown] == ["8.1000", "4.0500"]
    assert [row["MFU"] for row in shown] == ["25.0%", "12.5%"]
    assert [row["peak memory (GiB)"] for row in shown] == ["1.19", "0.60"]
    assert report.title() == "mhf report: one, two"


def test_the_charts_and_their_legends_are_there(report):
    assert set(CURVES.values()) <= set(texts(report, "#curves .annotation-text"))
    assert texts(report, "#curves .legendtext") == ["one", "two"]
    assert report.locator("#curves .scatterlayer .trace").count() == 8
    assert report.locator("#bars .barlayer .bars").count() == 3
    assert texts(report, "#bars .bartext") == ["500", "250", "25.0%", "12.5%", "1.19", "0.60"]
    assert texts(report, "#phases .legendtext") == ["forward", "backward"]
    assert texts(report, "#shares .legendtext") == ["forward", "backward"]


def test_the_switch_moves_all_curves_to_another_axis(report):
    title = "#curves .xtitle, #curves .x2title, #curves .x3title, #curves .x4title"
    assert texts(report, title) == ["step"] * 4
    assert x_values(report, panel=1, run=0) == [9, 19]
    for axis, expected, values in (
        ("tokens", "tokens", [1000, 2000]),
        ("FLOPs", "FLOPs of the model", [1e10, 2e10]),
        ("wall time", "hours since the first event", [9 / 3600, 19 / 3600]),
        ("steps", "step", [9, 19]),
    ):
        report.get_by_label(axis, exact=True).check()
        assert texts(report, title) == [expected] * 4
        assert x_values(report, panel=1, run=0) == pytest.approx(values)
        assert len(x_values(report, panel=0, run=1)) == 20


def test_the_router_and_the_differences_are_shown(report):
    assert texts(report, "#router tbody tr:first-child > *")[:2] == ["one", "0.875"]
    captions = texts(report, "figcaption")
    assert captions == ["load/layer_9, step 19", "load/layer_10, step 19"] * 2
    sizes = report.locator("figure img").evaluate_all("images => images.map(image => image.naturalWidth)")
    assert sizes == [1, 1, 1, 1]
    assert texts(report, "#differences tbody tr > *") == ["model.width", "8", "16"]


def test_evaluations_of_one_task_stand_together(page, tmp_path):
    runs = [write_run(tmp_path / name) for name in ("one", "two")]
    for run, accuracy in zip(runs, (0.5, 0.25), strict=True):
        write_evaluation(run, "tasks", {"piqa": {"acc": accuracy, "acc_stderr": 0.0125}})
        write_evaluation(run, "held_out", {"held_out": {"loss": 2.0, "perplexity": None}})
    open_report(page, tmp_path, *runs)
    assert texts(page, "#evaluations thead th") == ["task or text", "run", "step", "loss", "perplexity", "acc"]
    assert [texts(page, f"#evaluations tbody tr:nth-child({n}) > *") for n in (1, 2, 3, 4)] == [
        ["held_out", "one", "20", "2.0000", "n/a", "n/a"],
        ["held_out", "two", "20", "2.0000", "n/a", "n/a"],
        ["piqa", "one", "20", "n/a", "n/a", "0.5000 ± 0.0125"],
        ["piqa", "two", "20", "n/a", "n/a", "0.2500 ± 0.0125"],
    ]


def test_without_evaluations_there_is_no_table_of_them(report):
    assert report.locator("#evaluations").count() == 0


def test_the_page_fits_1280_pixels(report):
    assert report.evaluate("document.documentElement.scrollWidth") <= 1280


def test_an_older_run_beside_a_new_one(page, tmp_path):
    """Tags, history and configuration are missing: n/a, and the axes that the run lacks say so."""
    points = [("train/loss", step, 2.0) for step in range(3)]
    write_events(tmp_path / "old/tensorboard", points)
    open_report(page, tmp_path, write_run(tmp_path / "new"), tmp_path / "old")
    assert texts(page, "#runs tbody tr:last-child > *").count("n/a") == 10
    assert texts(page, "#bars .annotation-text").count("n/a") == 3
    page.get_by_label("FLOPs", exact=True).check()
    assert page.locator("#without").text_content() == "n/a on this axis: old"
    assert x_values(page, panel=0, run=1) == []
    assert len(x_values(page, panel=0, run=0)) == 20
    assert "n/a: no heat-maps in its event files" in page.locator("main").inner_text()


def test_only_older_runs(page, tmp_path):
    write_events(tmp_path / "old/tensorboard", [("train/loss", 0, 2.0)])
    open_report(page, tmp_path, tmp_path / "old")
    assert page.get_by_label("tokens", exact=True).is_disabled()
    assert page.get_by_label("wall time", exact=True).is_enabled()
    shown = page.locator("main").inner_text()
    assert "n/a: no run has logged time/*" in shown
    assert "n/a: no run has logged memory/peak_in_*" in shown


def test_names_and_values_are_text(page, tmp_path):
    name = "<img src=x onerror=alert(1)><script>alert(2)<b>%{x}"
    run = write_run(tmp_path / name, config='model: {"</script><b>width": "</script><script>alert(3)"}\n')
    write_events(run / "tensorboard", [("router/<i>load_1", 0, PNG), ("time/<b>x", 0, 0.5)], number=1)
    other = write_run(tmp_path / "other")
    asked: list[str] = []
    page.on("dialog", lambda dialog: (asked.append(dialog.message), dialog.dismiss()))
    open_report(page, tmp_path, run, other)
    assert texts(page, "#runs tbody tr:first-child th") == [name]
    assert texts(page, "#curves .legendtext") == [name, "other"]
    assert name in texts(page, "#bars .ytick text")
    assert "model.</script><b>width" in texts(page, "#differences th")
    assert '"</script><script>alert(3)"' in texts(page, "#differences td")
    assert "<i>load_1, step 0" in texts(page, "figcaption")
    assert "<b>x" in texts(page, "#shares .legendtext")
    assert page.locator("main b, main i, main img:not(figure img)").count() == 0
    assert page.locator("main script").count() == 4  # the charts'
    assert asked == []


def test_a_long_run_is_thinned_and_its_peak_stays(page, tmp_path):
    points = [("train/loss", step, 100.0 if step == 12_345 else 1.0 + step % 7) for step in range(20_000)]
    write_events(tmp_path / "long/tensorboard", points)
    open_report(page, tmp_path, tmp_path / "long")
    drawn = page.evaluate("[...document.getElementById('curves')._fullData[0].y]")
    assert len(drawn) <= 2000
    assert max(drawn) == 100
    assert (tmp_path / "report.html").stat().st_size < 5_500_000


@pytest.mark.slow
def test_the_report_of_a_real_resumed_run(page, trained, tmp_path):
    open_report(page, tmp_path, trained)
    columns, row = texts(page, "#runs thead th"), texts(page, "#runs tbody tr > *")
    shown = dict(zip(columns, row, strict=True))
    assert (shown["state"], shown["steps"], shown["tokens"], shown["restarts"]) == ("completed", "12", "768", "1")
    # MFU needs a GPU; all else is there.
    assert [column for column in columns if shown[column] == "n/a"] == ["MFU"]
    assert page.locator(".warnings").count() == 0
    assert page.evaluate("[...document.getElementById('curves')._fullData[0].x]") == list(range(12))
    page.get_by_label("tokens", exact=True).check()
    tokens = page.evaluate("[...document.getElementById('curves')._fullData[0].x]")
    assert tokens == [64 * (step + 1) for step in range(12)]
    assert page.get_by_label("FLOPs", exact=True).is_enabled()


@pytest.fixture(scope="module")
def tensorboard(browser, trained):
    """The address of the TensorBoard that `mhf fit` names, on the real run."""
    with screenshots.tensorboard(trained) as address:
        yield address


@pytest.mark.slow
def test_tensorboard_groups_the_tags(page, tensorboard):
    page.goto(f"{tensorboard}/#timeseries")
    page.locator(".group-title", has_text="val").wait_for()
    groups = ["health", "memory", "router", "throughput", "time", "tokens", "train", "val"]
    assert [group for group in texts(page, ".group-title") if group in groups] == groups
    tabs = [tab.strip().lower() for tab in texts(page, "[role=tab]:visible")]
    assert {"time series", "scalars", "custom scalars", "images", "text", "hparams"} <= set(tabs)


@pytest.mark.slow
def test_tensorboard_draws_the_curves(page, tensorboard):
    tags = ["train/loss", "train/perplexity", "val/perplexity", "throughput/tokens_per_s", "memory/peak_gib"]
    page.goto(f"{tensorboard}/?tagFilter={'|'.join(f'^{tag}$' for tag in tags)}#timeseries")
    for tag in tags:
        card = page.locator("scalar-card", has=page.get_by_text(tag, exact=True))
        card.scroll_into_view_if_needed()
        card.locator("line-chart").wait_for()


@pytest.mark.slow
def test_tensorboard_shows_the_layout_of_custom_scalars(page, tensorboard):
    page.goto(f"{tensorboard}/#custom_scalars")
    page.locator(".heading-label.name", has_text="perplexity").wait_for()
    assert texts(page, ".category-name") == ["learning", "speed", "memory", "routers"]


@pytest.mark.slow
def test_tensorboard_shows_configuration_and_environment_as_text(page, tensorboard):
    page.goto(f"{tensorboard}/#text")
    for name in ("run/config", "run/environment", "run/git"):
        page.locator(".heading-label.name", has_text=name).wait_for()
    page.locator("code", has_text="num_subnetworks: ").first.wait_for()


@pytest.mark.slow
def test_tensorboard_shows_hyperparameters_with_the_final_perplexity(page, tensorboard, trained):
    page.goto(f"{tensorboard}/#hparams")
    page.locator(".table-header", has_text="ffn/name").first.wait_for()
    page.locator(".table-header", has_text="hparam/val_perplexity").first.wait_for()
    (result,) = load([trained])
    page.get_by_text(f"{result.events.last('val/perplexity'):.5g}", exact=True).first.wait_for()


@pytest.mark.slow
def test_tensorboard_shows_the_routers_as_images(page, tensorboard):
    page.goto(f"{tensorboard}/#images")
    page.locator(".heading-label.name", has_text="router/load/layer_1").wait_for()
    page.locator("tf-image-loader img").first.wait_for()
    assert page.locator("tf-image-loader img").first.evaluate("image => image.naturalWidth") > 10


def test_a_tensorboard_that_ends_at_once_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(screenshots, "tensorboard_command", lambda logdir: [sys.executable, "-c", "pass"])
    with pytest.raises(RuntimeError, match="TensorBoard does not answer"), screenshots.tensorboard(tmp_path):
        pass


def test_runs_of_the_same_name_have_links_of_their_own(tmp_path):
    runs = [tmp_path / name for name in ("a/run", "b/run")]
    for run in runs:
        run.mkdir(parents=True)
    screenshots.link_runs(runs, tmp_path / "links")
    assert {link.name: link.resolve() for link in (tmp_path / "links").iterdir()} == {
        "a-run": runs[0].resolve() / "tensorboard",
        "b-run": runs[1].resolve() / "tensorboard",
    }


@pytest.mark.slow
def test_the_script_makes_both_pictures(browser, trained, tmp_path):
    command = [sys.executable, str(DOCS / "screenshots.py"), str(trained), "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("report.png", "tensorboard.png"):
        content = (tmp_path / name).read_bytes()
        assert content.startswith(PNG[:8])
        assert 30_000 < len(content) < 200_000
