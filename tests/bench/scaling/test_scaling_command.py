"""`mhf bench scaling` from end to end, on two gloo processes: files, later calls, wrong use."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_cases import DECODER, LENGTH, MICRO_BATCH, STEPS, read, run, sizes, write_model

from mhf_lightning.bench.scaling import cases, command, results
from mhf_lightning.bench.scaling.processes import Outcome
from mhf_lightning.model import Decoder, DecoderConfig
from mhf_lightning.plan.flops import flops_per_token

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="ranks would take the GPUs")


def measure(model: str, output: Path, *more: str) -> int:
    sizes = ["--micro_batch", str(MICRO_BATCH), "--length", str(LENGTH), "--steps", str(STEPS)]
    stages = ["--stages", "weak", "parity", "checkpoint", "--strategies", "fsdp2", "--processes", "1", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cases, "PARITY_STEPS", 20)
        patch.setattr(cases, "LEARNING_RATE", 1.5e-3)  # so small a model learns nothing else
        patch.setenv("MHF_COMMIT", "0123456789abcdef")
        return command.main([model, *stages, *sizes, "--output", str(output), *more])


@pytest.fixture(scope="module")
def measured(model, tmp_path_factory) -> tuple[int, Path]:
    """What the command returned, and its folder."""
    output = tmp_path_factory.mktemp("scaling") / "out"
    return measure(model, output), output


@pytest.mark.slow
def test_rows_hold_speeds_and_what_follows_from_them(measured, model):
    code, output = measured
    assert code == 0
    rows = read(output / "scaling.csv")
    assert [(row["strategy"], row["gpus"]) for row in rows] == [("single", "1"), ("fsdp2", "2"), ("fsdp2", "1")]
    config = DecoderConfig.from_dict(DECODER)
    for row in rows:
        assert tuple(row) == results.SCALING_COLUMNS
        assert (row["status"], row["model"], row["steps"], row["mfu"]) == ("ok", "small/tiny", str(STEPS), "n/a")
        gpus, rate = int(row["gpus"]), float(row["tokens_per_s"])
        assert int(row["global_batch"]) == gpus * MICRO_BATCH
        assert rate == pytest.approx(gpus * MICRO_BATCH * LENGTH / (float(row["step_ms"]) / 1e3), rel=1e-4)
        assert float(row["tokens_per_s_per_gpu"]) == pytest.approx(rate / gpus, rel=1e-4)
        assert float(row["efficiency"]) == pytest.approx(rate / gpus / float(rows[0]["tokens_per_s"]), rel=1e-4)
        assert float(row["slowest_step_ms"]) >= 0.9 * float(row["step_ms"])
        assert int(row["parameters"]) == sum(p.numel() for p in Decoder(config).parameters())
        assert float(row["flops_per_token"]) == pytest.approx(flops_per_token(config, LENGTH), rel=1e-4)
    facts = json.loads((output / "environment.json").read_text())
    assert facts["torch"] == torch.__version__ == rows[0]["torch"]
    assert facts["commit"] == rows[0]["commit"] == "0123456789ab"
    assert facts["command"].startswith(f"mhf bench scaling {model} --stages weak parity")
    assert facts["seed"] == cases.SEED


@pytest.mark.slow
def test_two_processes_compute_what_one_does_and_continue_each_other(measured):
    rows = read(measured[1] / "parity.csv")
    assert [(row["strategy"], row["gpus"], row["continues"], row["steps"]) for row in rows] == [
        ("single", "1", "n/a", "20"),
        ("fsdp2", "2", "n/a", "20"),
        ("fsdp2", "2", "single on 1", "10"),
        ("single", "1", "fsdp2 on 2", "10"),
    ]
    for row in rows:
        assert row["status"] == "ok"
        assert float(row["loss_difference"]) < 1e-5
        assert float(row["grad_norm_difference"]) < 1e-4
    assert float(rows[0]["last_loss"]) < float(rows[0]["first_loss"]) - 0.1
    assert float(rows[0]["first_loss"]) == pytest.approx(math.log(64), rel=0.05)
    curves = read(measured[1] / "curves.csv")
    assert [int(row["step"]) for row in curves] == [*range(1, 21), *range(1, 21), *range(11, 21), *range(11, 21)]


@pytest.mark.slow
def test_two_and_four_processes_continue_each_other(model, tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "PARITY_STEPS", 10)
    plan = cases.parity(sizes(model, "fsdp2", processes=(2, 4)))
    ended: dict[str, Outcome] = {}
    for group in plan:
        ended |= run(tmp_path, *group, slots=[""] * 4)
    (single,), _, continued = plan
    reference = results.curve(ended[single.label])
    rows = [results.parity_row(case, ended[case.label], reference) for case in continued]
    assert {(row["gpus"], row["continues"]) for row in rows} >= {(2, "fsdp2 on 4"), (4, "fsdp2 on 2")}
    for row in rows:
        assert (row["status"], row["steps"]) == ("ok", 5)
        assert row["loss_difference"] < 1e-5


@pytest.mark.slow
def test_a_killed_rank_is_noticed_and_training_goes_on(measured):
    (row,) = read(measured[1] / "checkpoint.csv")
    assert (row["status"], row["gpus"]) == ("ok", "2")
    assert int(row["saved_step"]) + 3 <= int(row["killed_step"])
    times = [float(row[name]) for name in ("noticed_s", "started_s", "loaded_s", "recovery_s")]
    assert times == sorted(times)
    assert 0 < float(row["background_stall_s"]) < float(row["background_s"])
    assert float(row["later_background_stall_s"]) > 0
    assert float(row["stall_s"]) > 0
    # Weights and two moments in float32, and what is saved beside them.
    assert 1 < float(row["checkpoint_gib"]) * 2**30 / (12 * int(row["parameters"])) < 3
    assert float(row["loss_difference"]) < 1e-5


@pytest.mark.slow
def test_a_later_call_measures_what_has_no_row(measured, model, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(measured[1], output)
    text = {name: (output / f"{name}.csv").read_text().splitlines(keepends=True) for name in command.FILES}
    lost = {"scaling": 2, "parity": 4}  # FSDP2 on two processes; one process that continues it
    for name, line in lost.items():
        (output / f"{name}.csv").write_text("".join(text[name][:line] + text[name][line + 1 :]))
    assert measure(model, output) == 0
    said = capsys.readouterr().err
    assert [line.removesuffix(" ...") for line in said.splitlines() if line.endswith(" ...")] == [
        "weak, small/tiny: fsdp2 on 2",
        "parity, small/tiny: fsdp2 on 2",  # again, for its checkpoint
        "parity, small/tiny: single on 1, continues fsdp2 on 2",
    ]
    for name in command.FILES:
        kept = [line for number, line in enumerate(text[name]) if number != lost.get(name)]
        lines = (output / f"{name}.csv").read_text().splitlines(keepends=True)
        assert lines[: len(kept)] == kept
        if name in lost:
            old, new = read(measured[1] / f"{name}.csv")[lost[name] - 1], read(output / f"{name}.csv")[-1]
            assert len(lines) == len(kept) + 1
            assert [(new[column], new["status"]) for column in ("strategy", "gpus")] == [
                (old[column], "ok") for column in ("strategy", "gpus")
            ]
    rows = {(row["strategy"], row["gpus"]): row for row in read(output / "scaling.csv")}
    efficiency = float(rows["fsdp2", "2"]["tokens_per_s_per_gpu"]) / float(rows["single", "1"]["tokens_per_s"])
    assert float(rows["fsdp2", "2"]["efficiency"]) == pytest.approx(efficiency, rel=1e-4)
    assert float(read(output / "parity.csv")[-1]["loss_difference"]) < 1e-5
    assert command.main(["--report_from", str(output)]) == 0
    report_text = capsys.readouterr().out
    order = [report_text.index(f"| {strategy:8} | {gpus} ") for strategy, gpus in (("single", 1), ("fsdp2", 1))]
    assert order == sorted(order)
    before = (output / "scaling.csv").read_bytes()
    assert measure(model, output, "--strategies", "fsdp2") == 0  # nothing is left
    assert "..." not in capsys.readouterr().err
    assert measure(model, output, "--steps", "5") == 2
    assert f"cannot be continued: steps was {STEPS}, is 5; name another" in capsys.readouterr().err
    assert (output / "scaling.csv").read_bytes() == before
    assert len(json.loads((output / "environment.json").read_text())["continued"]) == 2


def test_other_code_and_unknown_code_are_not_mixed(tmp_path):
    facts = {"commit": "aaa", "device": "NVIDIA H100", "date": "today", "command": "mhf", "processes": [2, 4]}
    command.prepare(tmp_path, facts)
    command.prepare(tmp_path, {**facts, "date": "tomorrow", "driver": "580"})
    with pytest.raises(ValueError, match=r"commit was aaa, is bbb; device was NVIDIA H100, is NVIDIA H200; name"):
        command.prepare(tmp_path, {**facts, "commit": "bbb", "device": "NVIDIA H200"})
    unknown = {**facts, "commit": command.measure.UNKNOWN_COMMIT}
    command.prepare(tmp_path / "unknown", unknown)
    with pytest.raises(ValueError, match="cannot be continued: commit is unknown"):
        command.prepare(tmp_path / "unknown", unknown)
    (tmp_path / "environment.json").unlink()
    (tmp_path / "parity.csv").write_text("")
    with pytest.raises(ValueError, match=r"parity\.csv is there without environment\.json"):
        command.prepare(tmp_path, facts)


def is_alive(group: int) -> bool:
    """Whether the process group has a process."""
    try:
        os.killpg(group, signal.SIGCONT)
    except ProcessLookupError:
        return False
    return True


def test_a_call_that_is_cut_keeps_its_rows_and_leaves_no_rank(model, tmp_path):
    options = ["--stages", "weak", "--strategies", "ddp", "--micro_batch", "1", "--length", "8"]
    options += ["--steps", "1", "--output", str(tmp_path / "out")]
    arguments = [sys.executable, "-m", "mhf_lightning.cli", "bench", "scaling", model, *options]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line == "weak, small/tiny: ddp on 2 ...\n":
            break
    process.terminate()
    assert process.stderr.read().startswith("interrupted; the CSV files hold what was measured")
    assert process.wait() == 130
    deadline = time.monotonic() + 20
    while is_alive(process.pid):
        assert time.monotonic() < deadline, "a process of the session is left"
        time.sleep(0.1)
    assert [row["strategy"] for row in read(tmp_path / "out/scaling.csv")] == ["single"]


@pytest.mark.slow
def test_the_report_sets_the_plan_beside(measured, capsys):
    output = measured[1]
    assert command.main(["--report_from", str(output)]) == 0
    text = (output / "report.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    assert "## small/tiny, the same work for each GPU; L 16, 32-true" in text
    assert "plan: peak GiB" in text
    assert [float(row["plan_peak_gib"]) > 0 for row in read(output / "plan.csv")] == [True] * 3
    assert (output / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert command.main(["--report_from", str(output)]) == 2  # nothing is overwritten
    assert "report.md" in capsys.readouterr().err


def test_a_case_that_fails_is_a_row_and_the_others_go_on(tmp_path, capsys):
    odd = write_model(tmp_path / "odd", ffn={"name": "swiglu", "d_ff": 63})
    options = ["--micro_batch", "1", "--length", "8", "--steps", "1", "--output", str(tmp_path / "out")]
    assert command.main([odd, "--stages", "weak", "--strategies", "fsdp2", "fsdp2_tp", *options]) == 1
    rows = read(tmp_path / "out/scaling.csv")
    why = "failed: ValueError: tensor_parallel_size is 2; it must divide ffn.d_ff 63"
    assert [row["status"] for row in rows] == ["ok", "ok", why]
    assert [row["tokens_per_s"] == "n/a" for row in rows] == [False, False, True]
    printed = capsys.readouterr()
    assert why in printed.out
    assert "Traceback" in printed.err
    assert command.main(["--report_from", str(tmp_path / "out")]) == 0
    assert why in capsys.readouterr().out
    plans = read(tmp_path / "out/plan.csv")
    assert [(row["plan_peak_gib"] == "n/a", row["tokens_per_s"] == "n/a") for row in plans] == [
        *[(False, False)] * 2,
        (True, True),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name the model files"),
        (["FILE", "FILE"], "the same folder and name"),
        (["FILE", "--strategies", "zero2"], "need GPUs"),
        (["FILE", "--processes", "0"], "--processes"),
        (["FILE", "--steps", "0"], "--steps is 0"),
        (["missing.yaml"], "missing.yaml is no model file"),
        (["FILE", "--stages", "fixed", "--global_batch", "7"], "--global_batch 7"),
    ],
)
def test_wrong_use_is_refused_before_anything_runs(options, message, model, tmp_path, capsys):
    options = [model if option == "FILE" else option for option in options]
    assert command.main([*options, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
