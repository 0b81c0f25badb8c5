"""`mhf bench generate`: real measurements of tiny models on the CPU, what they add up to, and wrong use."""

import csv
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from torch._inductor.utils import run_and_get_code

from mhf_lightning.bench.generate import COLUMNS, MODES, _advance, _measure, main, tables
from mhf_lightning.bench.measure import Stopwatch
from mhf_lightning.model import Decoder, DecoderConfig
from mhf_lightning.model.generate import Generation, generate

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the command would take the GPU")
DECODER = {"vocab_size": 64, "d_model": 32, "num_layers": 2, "num_attention_heads": 2}
FFN = {
    "flash": {"name": "flash_mhf", "num_heads": 2, "num_subnetworks": 2, "d_e": 16},
    "swiglu": {"name": "swiglu", "d_ff": 64},
}


@pytest.fixture
def files(tmp_path) -> list[str]:
    """The baseline first."""
    for name, ffn in FFN.items():
        content = {"model": {"decoder": {**DECODER, "ffn": ffn}}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return [str(tmp_path / "swiglu.yaml"), str(tmp_path / "flash.yaml")]


def test_rows_hold_times_and_what_follows_from_them(files, tmp_path, capsys):
    sizes = ["--batch", "1", "3", "--prompt", "12", "--new_tokens", "5", "--modes", "eager", "--quick"]
    assert main([*files, *sizes, "--output", str(tmp_path / "out")]) == 0
    with (tmp_path / "out/generate.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["batch"]) for row in rows] == [
        *(("swiglu", "1"), ("flash", "1")),
        *(("swiglu", "3"), ("flash", "3")),
    ]
    for row in rows:
        assert tuple(row) == COLUMNS
        assert (row["status"], row["mode"], row["prompt"], row["new_tokens"]) == ("ok", "eager", "12", "5")
        batch, prefill, decode = int(row["batch"]), float(row["prefill_ms"]), float(row["decode_ms"])
        assert float(row["prefill_tokens_per_s"]) == pytest.approx(batch * 12 / (prefill / 1e3), rel=1e-4)
        assert float(row["decode_tokens_per_s"]) == pytest.approx(batch / (decode / 1e3), rel=1e-4)
        assert row["peak_mib"] == "n/a"
    count = sum(p.numel() for p in Decoder(DecoderConfig.from_dict({**DECODER, "ffn": FFN["flash"]})).parameters())
    assert rows[1]["parameters"] == str(count)
    assert (tmp_path / "out/environment.json").exists()
    printed = capsys.readouterr().out
    assert "batch 3, prompt 12, 5 new tokens" in printed
    assert main([*files, *sizes, "--output", str(tmp_path / "out")]) == 2
    assert "exists; name another --output" in capsys.readouterr().err


def test_the_time_is_that_of_the_tokens_after_the_first(monkeypatch):
    calls, step = [], Generation.step
    monkeypatch.setattr(Generation, "step", lambda *args: (calls.append("step"), step(*args))[1])

    class Fixed(Stopwatch):
        def medians(self, *phases, reset=None):
            for phase in phases:
                phase()
                calls.append("end")
            return [2.0, 8.0, 10.0]

    config = DecoderConfig.from_dict({**DECODER, "ffn": FFN["flash"]})
    row = _measure(config, "eager", 3, 7, 5, torch.float32, Fixed(torch.device("cpu"), 0.1))
    assert row["status"] == "ok"
    assert calls == ["end", *["step"] * 4, "end"]
    assert (row["prefill_ms"], row["prefill_tokens_per_s"]) == (2000, 3 * 7 / 2)
    assert (row["decode_ms"], row["decode_tokens_per_s"]) == (2000, 3 * 4 / 8)


def test_speed_ups_are_over_the_first_model_in_the_same_mode():
    def row(model: str, mode: str, prefill: float, decode: float) -> dict:
        about = {"model": model, "mode": mode, "batch": 1, "prompt": 8, "new_tokens": 4, "status": "ok"}
        return about | {"prefill_ms": prefill, "decode_ms": decode}

    table = tables([row("a", "eager", 8.0, 2.0), row("a", "graph", 8.0, 1.0), row("b", "graph", 2.0, 4.0)])
    last = [cell.strip() for cell in table.splitlines()[-1].split("|")]
    assert (last[1], last[2], last[7], last[10]) == ("b", "graph", "4.000", "0.250")


@pytest.mark.slow
@pytest.mark.parametrize("name", FFN)
@torch.no_grad()
def test_every_mode_gives_the_same_tokens(name):
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig.from_dict({**DECODER, "ffn": FFN[name]})).eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    prompts = list(torch.randint(64, (3, 7)))
    expected = torch.stack(list(generate(decoder, prompts, 6, temperature=0.0)))
    for mode in MODES:
        generation, tokens = Generation(decoder, 3, 13), torch.zeros(3, dtype=torch.int64)
        advance, found = _advance(generation, tokens, mode), []
        with torch.compiler.set_stance("force_eager"):
            tokens.copy_(generation.prefill(prompts).argmax(-1))
        for _ in range(5):
            found.append(tokens.clone())
            advance()
        assert torch.stack([*found, tokens]).equal(expected), mode


@pytest.mark.slow
@torch.no_grad()
def test_the_compiled_step_is_compiled_once_and_copies_no_part_of_the_cache():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    decoder = Decoder(DecoderConfig.from_dict({**DECODER, "num_layers": 9, "ffn": FFN["swiglu"]})).eval()
    generation = Generation(decoder, 3, 40)  # 40 x 2 x 3 x 16 = 3,840 elements a layer
    advance = _advance(generation, torch.zeros(3, dtype=torch.int64), "compiled")
    _, code = run_and_get_code(lambda: [advance() for _ in range(3)])
    assert len(code) == torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # the first block, and the others
    assert all("3840L" not in one for one in code)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--batch", "0"], "must be at least 1"),
        (["--new_tokens", "1"], "at least 2"),
        (["--modes", "graph"], "needs a GPU"),
        (["nowhere.yaml"], "nowhere.yaml is no model file"),
        (["{first}"], "the same name"),
    ],
)
def test_wrong_use_is_answered_with_what_to_do(files, changes, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    changes = [change.format(first=files[0]) for change in changes]
    models = [*files, *(change for change in changes if change.endswith(".yaml"))]
    options = [change for change in changes if not change.endswith(".yaml")]
    assert main([*models, *options, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not Path(tmp_path / "out").exists()


def test_a_model_that_fails_does_not_cost_the_others_their_rows(files, tmp_path, monkeypatch):
    from mhf_lightning.model.ffn.swiglu import SwiGLU

    def fail(self, x):
        raise RuntimeError("no luck\nat all")

    monkeypatch.setattr(SwiGLU, "forward", fail)
    sizes = ["--batch", "1", "--prompt", "4", "--new_tokens", "3", "--modes", "eager", "--quick"]
    assert main([*files, *sizes, "--output", str(tmp_path / "out")]) == 1
    with (tmp_path / "out/generate.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["failed: RuntimeError, no luck", "ok"]


@pytest.mark.slow
def test_the_command_of_the_readme_for_a_cpu_runs(tmp_path, monkeypatch):
    root = Path(__file__).parents[2]
    readme = (root / "mhf_lightning/bench/README.md").read_text()
    (line,) = [line for line in readme.splitlines() if line.startswith("mhf bench generate configs/model")]
    monkeypatch.chdir(root)
    assert main([*shlex.split(line, comments=True)[3:], "--output", str(tmp_path / "out")]) == 0
    with (tmp_path / "out/generate.csv").open(newline="") as file:
        assert {(row["model"], row["mode"], row["status"]) for row in csv.DictReader(file)} == {
            (model, mode, "ok") for model in ("swiglu", "flash_mhf") for mode in ("eager", "compiled")
        }
