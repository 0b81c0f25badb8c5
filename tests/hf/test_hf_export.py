"""`mhf export --to hf`: logits, generation, tokenizer and card of the folder are those of the run."""

import json
import re
import sys

import pytest
import torch
from made_run import CONTEXT, OPTIONS, VOCAB, add_history, build, make_llama_corpus, make_run, mhf, one_line
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mhf_lightning.data.tokenizer import load_tokenizer
from mhf_lightning.hf import FlashMHFConfig, FlashMHFForCausalLM
from mhf_lightning.model import Decoder
from mhf_lightning.model.generate import generate

VARIANTS = list(OPTIONS)


@pytest.fixture
def folder(made_run, tmp_path, capsys):
    """The run of FlashMHF, exported."""
    mhf(capsys, "export", "--to", "hf", str(made_run), str(tmp_path / "hf"))
    return tmp_path / "hf"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_logits_survive_the_round_trip(name, tied, made_corpus, tmp_path, capsys):
    decoder = build(name, tie_embeddings=tied, num_kv_heads=2, rope_theta=5000.0, norm_eps=1e-5)
    run = make_run(tmp_path / "run", decoder, made_corpus)
    mhf(capsys, "export", "--to", "hf", str(run), str(tmp_path / "hf"), "--max_shard_size", "30KB")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert isinstance(model, FlashMHFForCausalLM)
    assert not model.training
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    ids = torch.randint(VOCAB, (2, 17), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(ids).logits, decoder(ids), rtol=1e-5, atol=1e-5)
    mhf(capsys, "import", str(tmp_path / "hf"), str(tmp_path / "back"))
    back = load_file(tmp_path / "back/model.safetensors")
    assert back.keys() == decoder.state_dict().keys()
    assert all(torch.equal(back[key], value) for key, value in decoder.state_dict().items())


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_bfloat16_weights_give_our_bfloat16_logits(name, made_corpus, tmp_path, capsys):
    """Equal to the decoder with rounded weights, bit for bit; and within 2% of float32 in norm."""
    decoder = build(name)
    run = make_run(tmp_path / "run", decoder, made_corpus)
    mhf(capsys, "export", "--to", "hf", str(run), str(tmp_path / "hf"), "--dtype", "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    ids = torch.randint(VOCAB, (2, 17), generator=torch.Generator().manual_seed(0))
    logits, exact = model(ids).logits, decoder(ids)
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, decoder.to(torch.bfloat16)(ids))
    assert (logits - exact).norm() / exact.norm() < 0.02


def test_the_folder_holds_no_code_and_names_none(folder):
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "README.md"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # the weights are not for their owner alone
    config = json.loads((folder / "config.json").read_text())
    assert "auto_map" not in config
    assert config["architectures"] == ["FlashMHFForCausalLM"]
    assert config["max_position_embeddings"] == CONTEXT
    assert config["eos_token_id"] == config["bos_token_id"] == 0
    loaded = AutoConfig.from_pretrained(folder)
    assert isinstance(loaded, FlashMHFConfig)
    assert loaded.to_decoder().ffn == build().config.ffn
    assert (loaded.hidden_size, loaded.num_hidden_layers, loaded.num_key_value_heads) == (32, 2, 4)


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@torch.no_grad()
def test_generation_of_a_padded_batch_is_that_of_the_decoder(folder, cache):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = ["def f(", "x", "import json as"]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    assert int(inputs["attention_mask"][1].sum()) < inputs["input_ids"].shape[1]
    options = {"use_cache": False} if cache is None else {"cache_implementation": cache}
    if cache == "static":
        options["disable_compile"] = True
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=-1, **options)
    prompts = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    expected = torch.stack(list(generate(build(), prompts, 8, temperature=0.0)), dim=1)
    assert out[:, inputs["input_ids"].shape[1] :].tolist() == expected.tolist()


@torch.no_grad()
def test_the_cache_can_be_filled_in_pieces(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    whole = model(ids, use_cache=False)
    assert whole.cache is None
    first = model(ids[:, :5])
    second = model(ids[:, 5:11], cache=first.cache)
    third = model(ids[:, 11:], past_key_values=second.cache)
    pieces = torch.cat((first.logits, second.logits, third.logits), dim=1)
    torch.testing.assert_close(pieces, whole.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, whole.logits[:, -2:], rtol=1e-5, atol=1e-5)


def test_the_loss_is_the_decoder_s_and_reaches_every_weight(folder):
    model, decoder = AutoModelForCausalLM.from_pretrained(folder).train(), build()
    ids = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    sums = decoder(ids[:, :-1], ids[:, 1:])
    loss = model(ids, labels=ids).loss
    torch.testing.assert_close(loss, sums.nll / sums.num_tokens)
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_a_new_model_starts_as_the_decoder_does():
    config = FlashMHFConfig(d_model=64, num_layers=1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(0)
    expected = Decoder(config.to_decoder())
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(model.model.state_dict()[key].std(), value.std(), rtol=0.1, atol=1e-4)


@pytest.mark.parametrize("text", ["def f(x):\n    return x", "", " two  spaces ", "naïve 中文 🙂", "a<|endoftext|>b"])
def test_the_tokenizer_gives_the_same_tokens(folder, made_corpus, text):
    ours, theirs = load_tokenizer(made_corpus), AutoTokenizer.from_pretrained(folder)
    ids = ours.encode(text).ids
    assert theirs(text)["input_ids"] == ids
    assert 0 not in ids
    assert theirs.decode(ids) == text
    assert (theirs.eos_token, theirs.eos_token_id, theirs.pad_token_id) == ("<|endoftext|>", 0, 0)
    assert theirs.decode([*ids, 0], skip_special_tokens=True) == text
    assert (theirs.padding_side, theirs.model_max_length) == ("left", CONTEXT)


def test_the_tokenizer_of_a_llama_adds_nothing_either(made_corpus, tmp_path, capsys):
    run = make_run(tmp_path / "run", build(vocab_size=VOCAB + 1), make_llama_corpus(made_corpus, tmp_path))
    mhf(capsys, "export", "--to", "hf", str(run), str(tmp_path / "hf"))
    ids = load_tokenizer(made_corpus).encode("def f(x):").ids
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")("def f(x):")["input_ids"] == ids


def test_the_card_gives_the_run_s_figures(made_run, tmp_path, capsys):
    add_history(made_run, {2: 4.5, 6: 3.25, 9: 3.0})  # the checkpoint is of step 7
    mhf(capsys, "export", "--to", "hf", str(made_run), str(tmp_path / "hf"))
    card = (tmp_path / "hf/README.md").read_text()
    for words in ("flash_mhf", "num_subnetworks 3", "7 of 10", "| 700 |", "loss 3.2500", "perplexity 9.51, at step 6"):
        assert words in card
    total = sum(parameter.numel() for parameter in build().parameters())
    assert f"{total:,} ({total - VOCAB * 32:,} without embeddings)" in card
    assert "training speed | not recorded" in card  # what was written down is of a later step


def test_the_card_of_a_run_that_diverged_says_so(made_run, tmp_path, capsys):
    add_history(made_run, {6: 900.0})
    mhf(capsys, "export", "--to", "hf", str(made_run), str(tmp_path / "hf"))
    assert "loss 900.0000 nats per token, perplexity not finite, at step 6" in (tmp_path / "hf/README.md").read_text()


def test_the_card_says_what_was_not_recorded_and_its_code_runs(folder, capsys):
    card = (folder / "README.md").read_text()
    assert "validation | not recorded" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(code.replace("FOLDER", repr(str(folder))).replace("64", "4"), {})
    assert "Once upon a time" in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage",
    [
        *("exists", "unfinished", "corrupted", "other tokenizer", "shard size"),
        *("no package", "old package", "old Python"),
    ],
)
def test_what_cannot_be_exported_is_one_line(damage, made_run, made_corpus, tmp_path, capsys, monkeypatch):
    out, options, words = tmp_path / "hf", [], ""
    if damage == "exists":
        out.mkdir()
        words = "exists; move it away"
    elif damage == "unfinished":
        (made_run / "checkpoints/step-7").rename(made_run / "checkpoints/step-7.tmp")
        (made_run / "checkpoints/latest").unlink()
        words = "has not saved yet"
    elif damage == "corrupted":
        shard = made_run / "checkpoints/step-7/shard-00000.safetensors"
        shard.write_bytes(shard.read_bytes()[:-8])
        words = "shard-00000.safetensors is damaged"
    elif damage == "other tokenizer":
        make_run(made_run, build(vocab_size=300), made_corpus, step=8)
        words = f"has {VOCAB} tokens, the model of"
    elif damage == "shard size":
        options, words = ["--max_shard_size", "5 gigs"], "--max_shard_size is '5 gigs'"
    else:
        for name in [name for name in sys.modules if name.startswith("mhf_lightning.hf")]:
            monkeypatch.delitem(sys.modules, name)
        if damage == "no package":
            monkeypatch.setitem(sys.modules, "transformers", None)
            words = "needs transformers 5.24 or newer: pip install 'mhf-lightning[hf]'"
        elif damage == "old package":
            monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.17.0")
            words = "needs transformers 5.24 or newer; 5.17.0 is installed"
        else:
            monkeypatch.setattr(sys, "version_info", (3, 10, 14))
            words = "transformers 5.24 or newer, which needs Python 3.11 or newer"
    assert words in one_line(mhf(capsys, "export", "--to", "hf", str(made_run), str(out), *options, code=2))
    assert not (out / "config.json").exists()
    assert not out.with_name("hf.tmp").exists()
