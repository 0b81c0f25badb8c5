"""One line in a terminal; in a file a line for each logging step."""

import re

from timed_run import train

from mhf_lightning.callbacks.progress import ProgressLines, StepProgressBar, progress_bar

RUN = {"strategy": "single", "rows": [[4] * 12], "steps": 6, "accumulate": 2, "every": 2, "validate_every": 6}


def test_lines_of_a_file(capsys):
    result = train({**RUN, "progress": "lines"})
    printed = capsys.readouterr().out.splitlines()
    lines = [line for line in printed if line.startswith("step")]
    assert printed == lines
    loss, perplexity = (result["points"][f"train/{key}"][1] for key in ("loss", "perplexity"))
    beginning = rf"step 2/6  loss {loss:.3f}  ppl {perplexity:.1f}  tok/s \d+  mem \d+\.\dG  left \d+:\d\d:\d\d"
    assert re.fullmatch(beginning, lines[0])
    found = result["points"]["val/loss"][2], result["points"]["val/perplexity"][2]
    assert lines[1] == f"step 3: validation loss {found[0]:.4f}, perplexity {found[1]:.2f}"
    assert [line.split()[1] for line in lines] == ["2/6", "3:", "4/6", "6/6", "6:"]
    assert f"val ppl {found[1]:.1f}" in lines[2]


def test_the_bar_is_one_line_and_counts_steps(capsys):
    result = train({**RUN, "progress": "bar"})
    printed = capsys.readouterr().out
    bar = printed[printed.index("step:") :]
    assert bar.rstrip().count("\n") == 0
    last = re.split(r"[\r\n]", bar.rstrip())[-1]
    loss = result["points"]["train/loss"][5]
    assert re.search(rf"^step: 100%\|.*\| 6/6 \[.*<.*, loss={loss:.3f}, ppl=.*, val ppl=.*, tok/s=.*, mem=.*\]", last)
    assert "Validation" not in bar


def test_the_bar_of_a_resumed_run_starts_where_it_continues(tmp_path, capsys):
    case = {"strategy": "single", "rows": [[4] * 6], "steps": 6, "every": 1, "folder": str(tmp_path)}
    train({**case, "save_after": 4})
    capsys.readouterr()
    train({**case, "resume": str(tmp_path / "step-4"), "progress": "bar"})
    counts = [int(n) for n in re.findall(r"\| (\d)/6 ", capsys.readouterr().out)]
    assert counts
    assert min(n for n in counts if n) == 4
    assert counts[-1] == 6


def test_who_gets_which(monkeypatch):
    for is_terminal, kind in ((True, StepProgressBar), (False, ProgressLines)):
        monkeypatch.setattr("sys.stdout.isatty", lambda is_terminal=is_terminal: is_terminal)
        assert isinstance(progress_bar(), kind)
