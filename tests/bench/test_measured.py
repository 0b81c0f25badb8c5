"""Tables in the documentation say what the rows in docs/measured say."""

import re
from pathlib import Path

import pytest

from mhf_lightning.bench.scaling.report import planned, read
from mhf_lightning.bench.scaling.results import SCALING_COLUMNS

ROOT = Path(__file__).parents[2]


def test_the_table_of_several_gpus_is_that_of_its_rows():
    text = (ROOT / "mhf_lightning/training/README.md").read_text()
    folder = re.search(r"`([\d-]+-h200-x(\d))/weak`", text)
    assert folder is not None
    rows = read(ROOT / "docs/measured" / folder[1] / "weak", "scaling", SCALING_COLUMNS)
    header = next(line for line in text.splitlines() if line.startswith("| | one GPU |"))
    strategies = {"DDP": "ddp", "FSDP2": "fsdp2", "FSDP2 x TP": "fsdp2_tp", "ZeRO-2": "zero2", "ZeRO-3": "zero3"}
    columns = [strategies.get(title.strip()) for title in header.split("|")[3:-1]]
    for name, model in (("FlashMHF", "370m/flash_mhf_dh128"), ("SwiGLU", "370m/swiglu")):
        (line,) = [line for line in text.splitlines() if re.match(rf"\| {name} \| [\d,]+ tokens/s", line)]
        found = {(row["strategy"], row["gpus"]): row for row in rows if row["model"] == model}
        one = found["single", 1]
        expected = [f"{one['tokens_per_s']:,.0f} tokens/s, {one['peak_gib']:.1f} GiB"]
        for strategy in columns:
            row = found[strategy, int(folder[2])]
            measured = row["status"] == "ok"
            expected.append(f"{row['efficiency']:.1%}, {row['peak_gib']:.1f}" if measured else "not measured")
        assert [cell.strip() for cell in line.split("|")[2:-1]] == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "strategies", "bound"),
    [
        ("2026-11-28-h200-x1/weak", ["zero2"], 0.01),
        ("2026-11-28-h200-x4/weak", ["zero2"], 0.01),
        ("2026-11-28-h200-x2/weak", ["single", "ddp", "fsdp2", "zero2", "zero3"], 0.01),
        ("2026-11-28-h200-x2/weak", ["fsdp2_tp"], 0.012),
        ("2026-11-28-h200-x2/fixed", ["single", "ddp", "fsdp2", "zero2"], 0.01),
    ],
)
def test_planned_peaks_are_what_was_measured(folder, strategies, bound):
    rows = read(ROOT / "docs/measured" / folder, "scaling", SCALING_COLUMNS)
    rows = [row | {"file": ROOT / row["file"]} for row in rows if row["strategy"] in strategies]
    assert {row["strategy"] for row in rows} == set(strategies)
    for row, plan in zip(rows, planned(rows), strict=True):
        assert plan["plan_peak_gib"] == pytest.approx(row["peak_gib"], rel=bound)
