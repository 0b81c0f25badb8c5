"""The `mhf report` command in a process of its own."""

import subprocess
import sys

import pytest
from report_runs import mhf, write_events, write_run

WITHOUT_TRAINING = """
import sys
from mhf_lightning.cli import main
try:
    main(["report", *sys.argv[1:]])
except SystemExit as exit:
    assert not exit.code, exit.code
heavy = {"torch", "lightning", "tensorflow", "pandas"} & set(sys.modules)
assert not heavy, heavy
"""


def test_neither_torch_nor_lightning_is_imported(tmp_path):
    run = write_run(tmp_path / "one")
    command = [sys.executable, "-c", WITHOUT_TRAINING, str(run), "-o", str(tmp_path / "report.html")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout == f"wrote {tmp_path / 'report.html'}\n"
    assert (tmp_path / "report.html").stat().st_size > 4_000_000  # plotly is inside


def test_without_plotly_the_extra_is_named(tmp_path):
    hidden = "import sys; sys.modules['plotly'] = None; from mhf_lightning.report.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", hidden, str(write_run(tmp_path / "one")), "-o", str(tmp_path / "report.html")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("mhf report: error: plotly is not installed (")
    assert done.stderr.endswith(": pip install 'mhf-lightning[report]'\n")
    assert done.stderr.count("\n") == 1


def test_an_existing_file_is_left_alone(tmp_path):
    (tmp_path / "report.html").write_text("mine")
    printed = mhf("report", str(write_run(tmp_path / "one")), "-o", str(tmp_path / "report.html"), code=2)
    assert (
        printed == f"mhf report: error: {tmp_path / 'report.html'} exists; remove it, or choose another file with -o\n"
    )
    assert (tmp_path / "report.html").read_text() == "mine"


def test_what_is_no_run_is_one_line(tmp_path):
    printed = mhf("report", str(tmp_path), "-o", str(tmp_path / "report.html"), code=2)
    expected = f"{tmp_path} is no run folder; give the --run_dir of mhf fit, which holds config.yaml"
    assert printed == f"mhf report: error: {expected}\n"
    assert not (tmp_path / "report.html").exists()


def test_a_folder_of_runs_names_what_to_give(tmp_path):
    write_run(tmp_path / "runs/one")
    printed = mhf("report", str(tmp_path / "runs"), "-o", str(tmp_path / "report.html"), code=2)
    expected = f"{tmp_path}/runs is no run folder, but holds some; give those: {tmp_path}/runs/*"
    assert printed == f"mhf report: error: {expected}\n"


def test_damage_is_a_warning_on_the_terminal_and_on_the_page(tmp_path):
    run = write_run(tmp_path / "one")
    damaged = write_events(run / "tensorboard", [("train/loss", 20, 5.0)], number=1)
    damaged.write_bytes(damaged.read_bytes()[:-3])
    printed = mhf("report", str(run), "-o", str(tmp_path / "report.html"))
    assert f"mhf report: warning: one: {damaged}: damaged or cut off at byte" in printed
    assert "Traceback" not in printed
    page = (tmp_path / "report.html").read_text()
    assert f"<b>one</b>: {damaged}: damaged or cut off at byte" in page
    assert "<td>8.1000</td>" in page  # the last whole point


def test_a_folder_that_does_not_exist_for_the_output(tmp_path):
    printed = mhf("report", str(write_run(tmp_path / "one")), "-o", str(tmp_path / "none/report.html"), code=2)
    assert printed.startswith("mhf report: error: ")
    assert printed.count("\n") == 1


@pytest.mark.slow
def test_a_real_resumed_run(trained, tmp_path):
    printed = mhf("report", str(trained), "-o", str(tmp_path / "report.html"))
    assert printed == f"wrote {tmp_path / 'report.html'}\n"
