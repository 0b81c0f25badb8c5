"""The tables of `mhf bench scaling --report_from`."""

from dataclasses import replace

import pytest
from tiny_cases import sizes

from mhf_lightning.bench.scaling import report, results


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
