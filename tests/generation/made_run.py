"""Run folders with a model of known weights, written as training writes them; the commands, run in this process."""

import json
import sysconfig
from pathlib import Path

import pytest
import torch
import yaml

from mhf_lightning.checkpoint.shards import Ranks, SaveOptions, snapshot, write
from mhf_lightning.data.prepare import prepare
from mhf_lightning.model import Decoder, DecoderConfig, FFNConfig

CONTEXT = 48
VOCAB = 320
OPTIONS = {
    "swiglu": {"d_ff": 96},
    "gated_swiglu": {"num_subnetworks": 3, "d_e": 32},
    "mh_ffn": {"num_heads": 2, "d_ff": 96},
    "pkv": {"num_heads": 2, "d_ff": 144},
    "dense_moe": {"num_subnetworks": 3, "d_e": 32},
    "flash_mhf": {"num_heads": 2, "num_subnetworks": 3, "d_e": 32},
}


def make_corpus(folder: Path) -> Path:
    """Some of the standard library in blocks of 48 tokens, vocabulary 320."""
    sources = sorted(Path(sysconfig.get_path("stdlib"), "json").glob("*.py"))
    options = {"context_length": CONTEXT, "vocab_size": VOCAB, "validation_fraction": 0.2, "num_workers": 1}
    prepare([str(path) for path in sources], str(folder), **options)
    return folder


def build(name: str = "flash_mhf", **changes) -> Decoder:
    """A decoder whose logits differ much from token to token."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "d_model": 32, "num_layers": 2, "num_attention_heads": 4, **changes}
    decoder = Decoder(DecoderConfig(ffn=FFNConfig(name=name, **OPTIONS[name]), **sizes)).eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return decoder


def make_run(folder: Path, decoder: Decoder, corpus: Path, step: int = 7) -> Path:
    """Write the decoder as a run's checkpoint of ``step``; call again for later ones."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": {"path": str(corpus)}}))
    state = {f"model/decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}
    trainer = {"global_step": step, "decoder_config": decoder.config.to_dict(), "tokens_seen": step * 100}
    (folder / "checkpoints").mkdir(exist_ok=True)
    ranks = Ranks()
    write(folder / f"checkpoints/step-{step}", snapshot(state, (trainer, {}), ranks), step, {}, ranks, SaveOptions())
    return folder


def add_history(run: Path, validations: dict[int, float]) -> None:
    """Write the history of a run of 10 steps with these validation losses."""
    start = {"event": "start", "time": 100.0, "process_start": 90.0, "step": 0, "tokens": 0, "max_steps": 10}
    start |= {"job_id": None, "restart": 0, "world_size": 2, "hosts": ["a"], "parameters": {"total": 1}}
    events = [start, {"event": "progress", "time": 150.0, "step": 9, "tokens": 900, "loss": 3.5, "tokens_per_s": 20.0}]
    events += [
        {"event": "validation", "time": 160.0, "step": step, "loss": loss, "perplexity": 2.0**loss}
        for step, loss in validations.items()
    ]
    (run / "history.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def mhf(capsys, *args: str, code: int = 0) -> tuple[str, str]:
    """Run the command line; return stdout and stderr."""
    from mhf_lightning.cli import main

    with pytest.raises(SystemExit) as end:
        main(list(args))
    printed = capsys.readouterr()
    assert (end.value.code or 0) == code, printed
    return printed.out, printed.err


def one_line(printed: tuple[str, str]) -> str:
    """The error, which must be a single line."""
    lines = printed[1].strip().splitlines()
    assert len(lines) == 1, printed
    assert lines[0].startswith("mhf: error: ")
    return lines[0]
