"""Run folders with a model of known weights, written as training writes them; the commands, run in this process."""

import json
import sysconfig
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

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


def make_corpus(folder: Path, tokenizer: Path | None = None) -> Path:
    """Some of the standard library in blocks of 48 tokens, vocabulary 320 or of a tokenizer."""
    sources = sorted(Path(sysconfig.get_path("stdlib"), "json").glob("*.py"))
    options = {"context_length": CONTEXT, "validation_fraction": 0.2, "num_workers": 1}
    options |= {"vocab_size": VOCAB} if tokenizer is None else {"tokenizer": str(tokenizer)}
    prepare([str(path) for path in sources], str(folder), **options)
    return folder


def make_llama_corpus(corpus: Path, folder: Path) -> Path:
    """The same, of its tokenizer as a Llama has it: BOS, with an id of its own, stands before each text."""
    tokenizer = Tokenizer.from_file(str(corpus / "tokenizer.json"))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", VOCAB)])
    assert tokenizer.encode("x").ids[0] == VOCAB
    tokenizer.save(str(folder / "llama-tokenizer.json"))
    return make_corpus(folder / "llama-data", folder / "llama-tokenizer.json")


def build(name: str = "flash_mhf", **changes) -> Decoder:
    """A decoder whose logits differ much from token to token."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "d_model": 32, "num_layers": 2, "num_attention_heads": 4, **changes}
    decoder = Decoder(DecoderConfig(ffn=FFNConfig(name=name, **OPTIONS[name]), **sizes)).eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return decoder


def make_run(folder: Path, decoder: Decoder, corpus: Path, step: int = 7, tokenizer: str | None = None) -> Path:
    """Write the decoder as a run's checkpoint of ``step``; call again for later ones.

    With ``tokenizer``, the hash of its file, as newer versions do.
    """
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": {"path": str(corpus)}}))
    state = {f"model/decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}
    trainer = {"global_step": step, "decoder_config": decoder.config.to_dict(), "tokens_seen": step * 100}
    if tokenizer is not None:
        trainer["TokenDataModule"] = {"tokenizer_sha256": tokenizer}
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
        {
            **{"event": "validation", "time": 160.0, "step": step},
            **{"loss": loss, "perplexity": 2.0**loss if loss < 100 else None},
        }
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
