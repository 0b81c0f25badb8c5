"""`mhf import`: a Llama's logits, a start for `mhf fit`, and what is refused."""

import json
import math
import os
from pathlib import Path

import forked
import pytest
import torch
import yaml
from made_run import VOCAB, build, make_corpus, mhf, one_line
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from mhf_lightning.checkpoint.files import write_tensors
from mhf_lightning.model import Decoder, DecoderConfig
from mhf_lightning.training.weights import load_weights

ROOT = Path(__file__).parents[2]


def save_llama(folder: Path, shard: str = "5GB", vocab_size: int = VOCAB, **changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **sizes, **changes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def imported(folder: Path) -> Decoder:
    """As `mhf fit` builds it."""
    options = yaml.safe_load((folder / "model.yaml").read_text())["model"]
    decoder = Decoder(DecoderConfig.from_dict(options["decoder"]))
    assert options["init_from"] == str(folder / "model.safetensors")
    decoder.load_state_dict(load_file(options["init_from"]))
    return decoder.eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 2, "rms_norm_eps": 1e-2},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "tie_word_embeddings": True},
        {"num_key_value_heads": 1, "shard": "20KB"},
    ],
)
@torch.no_grad()
def test_a_llama_keeps_its_logits(changes, tmp_path, capsys):
    llama = save_llama(tmp_path / "llama", **changes)
    mhf(capsys, "import", str(tmp_path / "llama"), str(tmp_path / "out"))
    ids = torch.randint(VOCAB, (2, 21), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(imported(tmp_path / "out")(ids), llama(ids).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_config_of_older_releases_is_read(tmp_path, capsys):
    """With rope_theta beside the rest, and torch_dtype."""
    llama = save_llama(tmp_path / "llama", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    config = json.loads((tmp_path / "llama/config.json").read_text())
    config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "torch_dtype": config.pop("dtype")}
    (tmp_path / "llama/config.json").write_text(json.dumps(config))
    mhf(capsys, "import", str(tmp_path / "llama"), str(tmp_path / "out"))
    ids = torch.arange(30)[None]
    torch.testing.assert_close(imported(tmp_path / "out")(ids), llama(ids).logits, rtol=1e-5, atol=1e-5)


def edit(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def pickle_the_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


SCALED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
REFUSED = {
    "another architecture": (lambda f: edit(f, model_type="gpt2"), ["architecture 'gpt2'", "flash_mhf and llama"]),
    "an unknown architecture": (lambda f: edit(f, model_type="xyz"), ["architecture 'xyz'"]),
    "biases": (lambda f: edit(f, attention_bias=True, mlp_bias=True), ["attention_bias True", "mlp_bias True"]),
    "another activation": (lambda f: edit(f, hidden_act="gelu"), ["hidden_act gelu"]),
    "scaled positions": (lambda f: edit(f, rope_parameters=SCALED), ["rope_type linear"]),
    "odd heads": (lambda f: edit(f, head_dim=16), ["head_dim 16"]),
    "other sizes": (lambda f: edit(f, hidden_size=64, head_dim=None), ["llama model"]),
    "no number": (lambda f: edit(f, num_attention_heads="four"), ["cannot be read as a llama model"]),
    "more layers": (lambda f: edit(f, num_hidden_layers=3), ["does not hold the weights", "model.layers.2."]),
    "fewer layers": (lambda f: edit(f, num_hidden_layers=1), ["does not hold the weights", "model.layers.1."]),
    "a weight less": (drop_a_weight, ["model.layers.1.mlp.up_proj.weight"]),
    "pickled weights": (pickle_the_weights, ["cannot be read", "safetensors"]),
    "cut weights": (lambda f: os.truncate(f / "model.safetensors", 5000), ["model.safetensors is damaged"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json cannot be read"]),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), ["config.json cannot be read"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_imported_is_one_line(what, tmp_path, capsys):
    save_llama(tmp_path / "llama")
    damage, words = REFUSED[what]
    damage(tmp_path / "llama")
    capsys.readouterr()
    error = one_line(mhf(capsys, "import", str(tmp_path / "llama"), str(tmp_path / "out"), code=2))
    assert all(word in error for word in words), error
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_more_tokens_is_refused_and_a_fitting_one_copied(made_corpus, tmp_path, capsys):
    for vocab_size, code in ((VOCAB - 1, 2), (VOCAB, 0)):
        folder, out = tmp_path / f"llama-{vocab_size}", tmp_path / f"out-{vocab_size}"
        save_llama(folder, vocab_size=vocab_size)
        (folder / "tokenizer.json").write_text((made_corpus / "tokenizer.json").read_text())
        capsys.readouterr()
        printed = mhf(capsys, "import", str(folder), str(out), code=code)
        if code:
            assert f"has {VOCAB} tokens, the model only {VOCAB - 1}" in one_line(printed)
        else:
            assert (out / "tokenizer.json").read_text() == (made_corpus / "tokenizer.json").read_text()


def test_code_beside_the_weights_is_not_run(tmp_path, capsys):
    save_llama(tmp_path / "llama")
    canary = tmp_path / "canary"
    (tmp_path / "llama/modeling_evil.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    edit(tmp_path / "llama", auto_map={"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M"})
    mhf(capsys, "import", str(tmp_path / "llama"), str(tmp_path / "out"))
    edit(tmp_path / "llama", model_type="evil")
    one_line(mhf(capsys, "import", str(tmp_path / "llama"), str(tmp_path / "out2"), code=2))
    assert not canary.exists()


def test_weights_of_another_architecture_do_not_start_a_run(tmp_path):
    decoder = build()
    write_tensors(tmp_path / "one.safetensors", build(num_layers=1).state_dict())
    with pytest.raises(ValueError, match=r"one\.safetensors") as error:
        load_weights(decoder, tmp_path / "one.safetensors")
    assert "model.init_from" in str(error.value)
    assert "blocks.1.attention.k_proj.weight: only in the model" in str(error.value)
    with pytest.raises(ValueError, match=r"none\.safetensors is missing"):
        load_weights(decoder, tmp_path / "none.safetensors")


def validations(run: Path) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {event.step: event.value for event in events.Scalars("val/loss")}


@pytest.mark.slow
def test_a_trained_run_goes_out_and_comes_back_into_training(tmp_path, capsys):
    corpus = make_corpus(tmp_path / "data")
    cpu = ["--config", str(ROOT / "configs/trainer/cpu.yaml"), "--data.path", str(corpus)]
    cpu += ["--data.micro_batch_size", "4", "--trainer.max_steps", "6", "--trainer.val_check_interval", "6"]
    cpu += ["--model.schedule.warmup_steps", "2", "--checkpoint.every_n_steps", "6"]
    sizes = ["--config", str(ROOT / "configs/model/flash_mhf.yaml"), "--model.decoder.d_model", "64"]
    sizes += ["--model.decoder.vocab_size", str(VOCAB), "--model.decoder.num_layers", "1"]
    forked.mhf("fit", *sizes, *cpu, "--run_dir", str(tmp_path / "first"))
    trained = validations(tmp_path / "first")
    mhf(capsys, "export", "--to", "hf", str(tmp_path / "first"), str(tmp_path / "hf"))
    card = (tmp_path / "hf/README.md").read_text()
    assert "| 6 of 6 |" in card
    assert f"loss {trained[5]:.3f}"[:-1] in card
    mhf(capsys, "import", str(tmp_path / "hf"), str(tmp_path / "start"))
    start = ["--config", str(tmp_path / "start/model.yaml")]
    forked.mhf("fit", *start, *cpu, "--run_dir", str(tmp_path / "second"))
    again = validations(tmp_path / "second")
    assert math.isclose(again[0], trained[5], abs_tol=1e-5)
    assert again[5] < again[0] < trained[0]

    (tmp_path / "start/model.safetensors").unlink()
    more = ["--ckpt_path", "auto", "--trainer.max_steps", "7"]
    forked.mhf("fit", *start, *cpu, "--run_dir", str(tmp_path / "second"), *more)
