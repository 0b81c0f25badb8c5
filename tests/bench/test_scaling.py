"""`mhf bench scaling`: real trainings of tiny models on two gloo processes, and what rows and tables make of them."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from mhf_lightning.bench.scaling import cases, command, processes, report, results
from mhf_lightning.bench.scaling.cases import Sizes
from mhf_lightning.bench.scaling.processes import Outcome, run_cases, start_server
from mhf_lightning.model import Decoder, DecoderConfig
from mhf_lightning.plan.flops import flops_per_token

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the command would take the GPUs")
FFN = {"name": "flash_mhf", "num_heads": 2, "num_subnetworks": 2, "d_e": 16}
DECODER = {"vocab_size": 64, "d_model": 32, "num_layers": 2, "num_attention_heads": 2, "ffn": FFN}
LENGTH, MICRO_BATCH, STEPS = 16, 2, 4


def write_model(folder: Path, **changes) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "tiny.yaml").write_text(yaml.safe_dump({"model": {"decoder": {**DECODER, **changes}}}))
    return str(folder / "tiny.yaml")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return write_model(tmp_path_factory.mktemp("models") / "small")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def sizes(model: str, *strategies: str, processes=(1, 2)) -> Sizes:
    return Sizes((model,), strategies, processes, MICRO_BATCH, 8, LENGTH, STEPS, "32-true", compiled=False)


def run(tmp_path: Path, *several: cases.Case, slots=("", ""), timeout: float = 120.0, share=1) -> dict[str, Outcome]:
    """Run cases; on a CPU, slots with names are made-up GPUs."""
    ended: dict[str, Outcome] = {}
    slots = list(slots)
    threads = start_server(slots, tmp_path / "inductor")

    def on_end(case: cases.Case, end: Outcome) -> None:
        ended[case.label] = end

    run_cases(several, slots, threads, tmp_path, timeout, on_end, lambda case: None, share)
    return {case.label: ended[case.label] for case in several}


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


def test_the_aims_are_named_where_they_apply(model, tmp_path):
    about = {"device": "GPU", "date": "today", "status": "ok", "efficiency": 0.9}
    case = replace(sizes(model), processes=(4, 8))
    rows = [results.identity(case.case("weak", model, name, 4)) | about for name in ("ddp", "fsdp2")]
    for more in ([], [results.identity(case.case("weak", model, name, 8)) | about for name in ("fsdp2", "zero2")]):
        file = report.CsvFile(tmp_path / "scaling.csv", results.SCALING_COLUMNS, go_on=True)
        for row in more or rows:
            file.write(row)
        file.close()
        text = report.tables(tmp_path, [])
        assert ("aim" in text, "92.0%" in text, "95.0%" in text) == (bool(more), bool(more), False)
    assert text.index("| fsdp2") < text.index("| zero2")


def test_the_plan_s_speed_is_a_share_of_the_peak_of_all_gpus(model):
    row = results.identity(sizes(model, "fsdp2_tp").case("weak", model, "fsdp2_tp", 2))
    row |= {"device": "NVIDIA H100 80GB HBM3", "flops_per_token": 1e6, "compiled": "False"}
    (plan,) = report.planned([row])
    assert plan["plan_tokens_per_s"] == pytest.approx(2 * 989.5e12 * 0.4 / 1e6)


def seen(ended: dict[str, Outcome]) -> list[tuple[float, float, set[str]]]:
    """When each case began and ended, and the GPUs that its ranks saw."""
    starts = {name: [events[0] for events in outcome.events] for name, outcome in ended.items()}
    return [
        (
            min(start["time"] for start in starts[name]),
            outcome.ended,
            set(starts[name][0]["devices"].split(",")) if starts[name][0]["devices"] else set(),
        )
        for name, outcome in ended.items()
    ]


def test_cases_share_the_host_but_no_gpu(model, tmp_path):
    """The largest first; two pairs side by side, then single ones; what ran beside is told."""
    ones = [sizes(model).case(f"one{n}", model, "single", 1) for n in range(3)]
    twos = [sizes(model).case(f"two{n}", model, "ddp", 2) for n in range(2)]
    four = sizes(model).case("four", model, "ddp", 4)
    ended = run(tmp_path, *ones, *twos, four, slots="5674")
    assert {outcome.status for outcome in ended.values()} == {"ok"}
    assert ended[four.label].beside == ()
    assert set(ended[twos[0].label].beside) >= {twos[1].label}
    spans = dict(zip(ended, seen(ended), strict=True))
    assert spans[four.label][2] == set("5674")
    assert all(spans[four.label][1] < begun for name, (begun, *_) in spans.items() if name != four.label)
    assert {frozenset(spans[two.label][2]) for two in twos} == {frozenset("56"), frozenset("74")}
    for name, (begun, over, gpus) in spans.items():
        for other, (other_begun, other_over, other_gpus) in spans.items():
            if name != other and begun < other_over and other_begun < over:
                assert not gpus & other_gpus
                assert other in ended[name].beside


def test_where_nothing_is_timed_cases_share_gpus(model, tmp_path):
    """No rank shares with one of its own case, no GPU has more cases than it may, and the emptiest is taken."""
    pairs = [replace(sizes(model).case(f"two{n}", model, "ddp", 2), steps=10) for n in range(3)]
    single = replace(sizes(model).case("one", model, "single", 1), steps=10)
    ended = run(tmp_path, single, *pairs, slots="567", share=2)
    assert {outcome.status for outcome in ended.values()} == {"ok"}
    spans = dict(zip(ended, seen(ended), strict=True))
    assert [spans[pair.label][2] for pair in pairs] == [{"5", "6"}, {"5", "7"}, {"6", "7"}]
    assert len(ended[pairs[0].label].beside) >= 2
    assert spans[single.label][0] > min(spans[pair.label][1] for pair in pairs)


def test_on_a_cpu_one_at_a_time(model, tmp_path):
    one = sizes(model).case("weak", model, "single", 1)
    ended = run(tmp_path, one, replace(one, stage="fixed"))
    assert [outcome.status for outcome in ended.values()] == ["ok", "ok"]
    assert [outcome.beside for outcome in ended.values()] == [(), ()]
    (_, over, gpus), (begun, _, _) = seen(ended)
    assert over < begun
    assert not gpus


@pytest.mark.slow
def test_a_neighbour_that_dies_or_hangs_changes_nothing(model, tmp_path):
    """Beside a rank that kills itself, one without memory and one without end, a case computes what it does alone."""
    good = sizes(model).case("good", model, "ddp", 2)
    alone = run(tmp_path / "alone", good)[good.label]
    huge = replace(good, stage="huge", gpus=1, strategy="single")
    huge = replace(huge, model=write_model(tmp_path / "huge", vocab_size=10**13))
    killed = replace(good, stage="killed", steps=1000, save_at=((3, True),), kill=True)
    endless = replace(good, stage="endless", gpus=1, strategy="single", steps=10**6)
    late = replace(good, stage="late", gpus=1, strategy="single")  # takes a GPU that one of the others had
    ended = run(tmp_path, killed, good, endless, huge, late, slots="012345", timeout=60)
    assert {name.partition(",")[0]: outcome.status for name, outcome in ended.items()} == {
        "good": "ok",
        "late": "ok",
        "huge": "OOM",
        "killed": "failed: rank 1 died (signal 9)",
        "endless": "timeout after 60 s",
    }
    assert {endless.label, killed.label} <= set(ended[good.label].beside)
    assert results.curve(ended[good.label]) == results.curve(alone)


def test_other_data_are_found_out(model, tmp_path):
    """Half a micro-batch on each rank is the same step; a whole one is not."""
    one = sizes(model).case("parity", model, "single", 1)
    two = replace(one, strategy="ddp", gpus=2)
    ended = run(tmp_path, one, replace(two, micro_batch=1), replace(two, stage="planted"))
    assert [outcome.status for outcome in ended.values()] == ["ok"] * 3
    reference, half, whole = ended.values()
    curve = results.curve(reference)
    assert results.parity_row(two, half, curve)["status"] == "ok"
    assert results.parity_row(two, whole, curve)["status"] == "differs"


def test_a_case_that_fails_says_how(model, tmp_path):
    one = sizes(model).case("weak", model, "single", 1)
    huge = replace(one, model=write_model(tmp_path / "huge", vocab_size=10**13))
    killed = replace(one, stage="checkpoint", gpus=2, strategy="ddp", steps=1000, save_at=((3, True),), kill=True)
    ended = run(tmp_path, huge, killed)
    assert [outcome.status for outcome in ended.values()] == ["OOM", "failed: rank 1 died (signal 9)"]
    endless = replace(one, steps=10**6)
    (outcome,) = run(tmp_path, endless, timeout=3).values()
    assert outcome.status == "timeout after 3 s"
    row = results.scaling_row(endless, outcome, 1.0, None)
    assert (row["status"], "tokens_per_s" in row) == ("timeout after 3 s", False)


def test_a_rank_that_is_through_is_not_the_one_that_died():
    events = [[{"done": {}}], [{"step": 1}]]
    assert processes._why([0, -signal.SIGSEGV], events) == ("failed: rank 1 died (signal 11)", 1)


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


def outcome_of(curve: dict[int, tuple[float, float]]) -> Outcome:
    events = [
        {"step": step, "at": float(step), "loss": loss, "grad_norm": norm} for step, (loss, norm) in curve.items()
    ]
    done = {"num_layers": 2, "parameters": 10, "durations_s": [0.5, 0.3, 0.8, 0.4]}
    done = {"done": done | {"peak_flops": 1e3, "peak_bytes": 2**30}}
    return Outcome("ok", [[*events, done]], 1.0, 1.0)


@pytest.mark.parametrize(
    ("planted", "status"),
    [
        ({}, "ok"),
        ({3: (2.0 * (1 + 4e-4), 1.0)}, "differs"),
        ({3: (2.0, 1.0 - 4e-3)}, "differs"),
        ({3: (2.0, float("nan"))}, "differs"),
    ],
)
def test_one_step_that_differs_is_found(planted, status, model):
    case = sizes(model).case("parity", model, "ddp", 2)
    reference = dict.fromkeys(range(1, 6), (2.0, 1.0))
    row = results.parity_row(case, outcome_of(reference | planted), reference)
    assert row["status"] == status
    assert row["median_loss_difference"] == 0
    with pytest.raises(ValueError, match="not those of the reference"):
        results.differences(reference, {9: (2.0, 1.0)})


def test_efficiency_and_mfu_of_known_times(model):
    """4 steps of 8 sequences of 16 tokens in 2 s, on 2 GPUs of 1000 FLOP/s, 2 FLOPs a token."""
    case = sizes(model).case("weak", model, "ddp", 2)
    case = replace(case, micro_batch=4, warmup=1)
    ended = outcome_of(dict.fromkeys(range(1, 6), (2.0, 1.0)))
    ended.events[0][-1]["done"]["reserved_bytes"] = 2**31
    ended.events[0].insert(0, {"started": True, "time": 0.0})
    row = results.scaling_row(case, ended, 2.0, {"tokens_per_s_per_gpu": 160.0})
    expected = {"tokens_per_s": 256.0, "tokens_per_s_per_gpu": 128.0, "efficiency": 0.8, "mfu": 0.256, "step_ms": 500.0}
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert {name: row[name] for name in ("peak_gib", "reserved_gib", "start_s", "slowest_step_ms")} == pytest.approx(
        {"peak_gib": 1.0, "reserved_gib": 2.0, "start_s": 1.0, "slowest_step_ms": 800.0}
    )


def test_the_newest_checkpoint_is_measured_also_when_disks_are_slow(model, tmp_path):
    """Of two saves in the background the second had to wait for the first, from step 11 to step 30."""
    ((killed,), (goes_on,)) = cases.checkpoint(sizes(model))
    assert [step for step, _ in killed.save_at] == [8, 11, 14]
    steps = [
        {"step": step, "at": float(step), "time": float(step), "loss": 2.0, "grad_norm": 1.0} for step in range(1, 50)
    ]
    saves = [(8, 1.0, 9.0), (11, 0.5, 29.0), (30, 0.25, 40.0)]
    events = [{"saved": step, "stall_s": stall, "time": step + stall} for step, stall, _ in saves]
    events += [{"committed": step, "time": on_disk} for step, _, on_disk in saves]
    died = Outcome("failed: rank 1 died (signal 9)", [[*steps, *events], [{"killed": 43, "time": 43.0}]], 44.0, 43.5)
    again = [{"started": True, "time": 45.0}, {"training": 30, "time": 46.0}]
    again += [step | {"at": 20.0 + step["at"]} for step in steps[30:33]]
    resumed = Outcome("ok", [[*again, {"done": {"parameters": 10}}]], 8.0, 52.0)
    (tmp_path / "step-30/rank0").mkdir(parents=True)
    (tmp_path / "step-30/rank0/shard").write_bytes(bytes(2**20))
    row = results.checkpoint_row((killed, died), resumed, tmp_path)
    assert row["status"] == "ok"
    expected = {"checkpoint_gib": 2**-10, "gib_per_s": 2**-10, "stall_s": 1.0, "background_stall_s": 0.5}
    expected |= {"later_background_stall_s": 0.25, "background_s": 18.0, "saved_step": 30, "recovery_s": 8.0}
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert goes_on.stop_after == 3


def test_the_cases_of_eight_gpus(model):
    eight = replace(sizes(model, *cases.STRATEGIES, processes=(1, 2, 4, 8)), global_batch=64)
    baselines, weak = cases.weak(eight)
    assert [case.strategy for case in baselines] == ["single"]
    ways = [(case.strategy, case.gpus) for case in weak]
    assert ways == [
        *[("ddp", 2), ("ddp", 4), ("ddp", 8)],
        *[(name, gpus) for name in ("fsdp2", "zero2", "zero3") for gpus in (1, 2, 4, 8)],
        *[("fsdp2_tp", 2), ("fsdp2_tp", 4), ("fsdp2_tp", 8)],
    ]
    assert {case.global_batch / case.gpus for case in weak} == {MICRO_BATCH}
    assert {case.global_batch for group in cases.fixed(eight) for case in group} == {64}
    alone, together, continued = cases.parity(eight)
    assert {case.global_batch for case in alone + together + continued} == {8 * MICRO_BATCH}
    assert {case.strategy for case in alone} == {"single"}
    assert {(case.strategy, case.gpus) for case in together} == {
        *((name, 8) for name in cases.STRATEGIES),
        ("fsdp2", 4),
    }
    labels = [case.label for group in (baselines, weak, alone, together, continued) for case in group]
    assert len(set(labels)) == len(labels)
    assert {case.resume for case in continued} == {case.label for case in alone + together if case.save_at}
    assert {(case.gpus, case.continues) for case in continued if case.strategy == "fsdp2"} == {
        (8, "single on 1"),
        (4, "fsdp2 on 8"),
        (8, "fsdp2 on 4"),
    }
    with pytest.raises(ValueError, match="change it or --micro_batch"):
        cases.fixed(replace(eight, global_batch=12))


def test_parity_on_one_gpu_is_that_of_the_strategies(model):
    one = sizes(model, *cases.STRATEGIES, processes=(1,))
    alone, together, continued = cases.parity(one)
    assert [(case.strategy, case.gpus) for case in alone] == [("single", 1)]
    assert [(case.strategy, case.gpus) for case in together] == [("fsdp2", 1), ("zero2", 1), ("zero3", 1)]
    assert [(case.strategy, case.continues) for case in continued] == [
        ("fsdp2", "single on 1"),
        ("single", "fsdp2 on 1"),
    ]


def test_what_is_left(model):
    """A case that is continued is run again, unless all that continue it are done."""
    four = sizes(model, *cases.STRATEGIES, processes=(2, 4))
    alone, together, continued = cases.parity(four)
    done = {case.label for case in [*alone, *together, *continued[1:]]}
    assert cases.left([alone, together, continued], done) == [alone, [], continued[:1]]
    assert cases.left([alone, together, continued], done | {continued[0].label}) == [[], [], []]
    checkpoint = cases.checkpoint(four)
    (killed,), (resumed,) = checkpoint
    assert cases.left(checkpoint, set()) == checkpoint
    assert cases.left(checkpoint, {resumed.label}) == [[], []]
    assert resumed.label == cases.label("checkpoint", "small/tiny", "fsdp2", 4, "fsdp2 on 4")
    assert killed.save_at


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
