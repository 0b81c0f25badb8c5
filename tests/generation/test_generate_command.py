"""`mhf generate` on run folders: it prints what the model says, and whatever is wrong is one line."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from made_run import CONTEXT, VOCAB, build, make_llama_corpus, make_run, mhf, one_line

from mhf_lightning.data.manifest import FileEntry, Manifest, sha256_of
from mhf_lightning.data.tokenizer import load_tokenizer

PROMPT = "def load("


def greedy(decoder, ids: list[int], new: int, eos_id: int) -> list[int]:
    """By uncached forwards."""
    with torch.no_grad():
        for _ in range(new):
            ids = [*ids, int(decoder(torch.tensor([ids]))[0, -1].argmax())]
            if ids[-1] == eos_id:
                break
    return ids


def test_prints_the_most_likely_text_and_the_speed(made_run, made_corpus, capsys):
    tokenizer = load_tokenizer(made_corpus)
    out, err = mhf(capsys, "generate", str(made_run), "--prompt", PROMPT, "--temperature", "0", "--max_new_tokens", "9")
    ids = greedy(build(), tokenizer.encode(PROMPT).ids, 9, eos_id=0)
    assert out == tokenizer.decode(ids) + "\n"
    prompt_tokens = len(tokenizer.encode(PROMPT).ids)
    assert re.search(rf"step-7: prefill {prompt_tokens} tokens in [\d.]+ s, [\d,]+ tokens/s; ", err)
    assert re.search(r"decode 8 tokens in [\d.]+ s, [\d,.]+ tokens/s$", err.strip())


def test_the_prompt_becomes_the_tokens_that_text_became_in_the_data(made_corpus, tmp_path, capsys):
    corpus = make_llama_corpus(made_corpus, tmp_path)
    run = make_run(tmp_path / "run", build(vocab_size=VOCAB + 1), corpus)
    _, err = mhf(capsys, "generate", str(run), "--prompt", PROMPT, "--temperature", "0", "--max_new_tokens", "2")
    assert f"prefill {len(load_tokenizer(made_corpus).encode(PROMPT).ids)} tokens" in err


def test_another_tokenizer_than_that_of_the_training_is_refused(made_run, made_corpus, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(made_corpus, other)
    content = json.loads((other / "tokenizer.json").read_text())
    ids = content["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]  # of the same size
    (other / "tokenizer.json").write_text(json.dumps(content))
    replace(Manifest.load(other), tokenizer=FileEntry.of(other / "tokenizer.json")).save(other)
    trained_with = Manifest.load(made_corpus).tokenizer.sha256
    make_run(made_run, build(), made_corpus, step=9, tokenizer=trained_with)
    options = ("generate", str(made_run), "--prompt", PROMPT, "--temperature", "0")
    error = one_line(mhf(capsys, *options, "--data", str(other), code=2))
    found = sha256_of(other / "tokenizer.json")
    for words in (str(other), found[:12], f"{made_run}/checkpoints/step-9", trained_with[:12], "--data"):
        assert words in error
    assert mhf(capsys, *options)[0].startswith(PROMPT)
    older = ("generate", str(made_run / "checkpoints/step-7"), *options[2:])  # does not say; goes on
    assert mhf(capsys, *older, "--data", str(other))[0].startswith(PROMPT)


def test_nothing_is_printed_where_an_option_is_wrong(made_run, capsys):
    out, err = mhf(capsys, "generate", str(made_run), "--prompt", PROMPT, "--temperature", "-1", code=2)
    assert not out
    assert err.startswith("mhf: error: temperature is -1.0")


def test_the_seed_decides(made_run, capsys):
    options = ("generate", str(made_run), "--prompt", "", "--temperature", "2", "--top_p", "1")
    first, second, other = (mhf(capsys, *options, "--seed", seed)[0] for seed in ("1", "1", "2"))
    assert first == second != other


def test_reads_a_named_checkpoint_and_the_newest_valid_one(made_run, made_corpus, capsys):
    make_run(made_run, build("swiglu"), made_corpus, step=9)
    options = ("--prompt", PROMPT, "--temperature", "0")
    newest, err = mhf(capsys, "generate", str(made_run), *options)
    assert "step-9" in err
    older, err = mhf(capsys, "generate", str(made_run / "checkpoints/step-7"), *options)
    assert "step-7" in err
    assert older != newest
    shard = made_run / "checkpoints/step-9/shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    fallen_back, err = mhf(capsys, "generate", str(made_run), *options)
    assert fallen_back == older
    assert f"skipped a checkpoint: {shard} is damaged" in err


def test_stops_at_the_end_of_the_context(made_run, made_corpus, capsys):
    prompt = "~" * (CONTEXT - 3)
    length = len(load_tokenizer(made_corpus).encode(prompt).ids)
    assert length == CONTEXT - 3
    _, err = mhf(capsys, "generate", str(made_run), "--prompt", prompt, "--temperature", "0")
    assert f"prefill {length} tokens" in err
    assert f"stopped at the end of the model's context, {CONTEXT} tokens" in err


def test_a_prompt_longer_than_the_context_is_refused(made_run, capsys):
    error = one_line(mhf(capsys, "generate", str(made_run), "--prompt", "x " * 200, code=2))
    assert f"the model's context is {CONTEXT}" in error


@pytest.mark.parametrize("damage", ["no run", "unfinished", "corrupted", "no data", "other tokenizer", "no config"])
def test_what_cannot_be_read_is_one_line(made_run, made_corpus, tmp_path, capsys, damage):
    run, words = made_run, []
    if damage == "no run":
        run, words = tmp_path / "nowhere", ["nowhere is no folder"]
    elif damage == "unfinished":
        (run / "checkpoints/step-7").rename(run / "checkpoints/step-7.tmp")
        (run / "checkpoints/latest").unlink()
        words = ["holds no checkpoint", "has not saved yet"]
    elif damage == "corrupted":
        (run / "checkpoints/step-7/index.json").write_text("{}")
        words = ["no checkpoint can be used", "index.json is damaged"]
    elif damage == "no data":
        make_run(run, build(), tmp_path / "gone", step=8)
        words = ["gone (data.path in", "--data"]
    elif damage == "other tokenizer":
        make_run(run, build(vocab_size=VOCAB - 1), made_corpus, step=8)
        words = [f"has {VOCAB} tokens", f"only {VOCAB - 1}"]
    else:
        (run / "config.yaml").unlink()
        words = ["no run folder with a config.yaml", "--data"]
    error = one_line(mhf(capsys, "generate", str(run), "--prompt", PROMPT, code=2))
    assert all(word in error for word in words), error


def test_another_place_of_the_data_can_be_named(made_run, made_corpus, tmp_path, capsys):
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("manifest.json", "tokenizer.json"):  # no tokens are needed
        shutil.copy(made_corpus / name, moved)
    (made_run / "config.yaml").unlink()
    options = ("generate", str(made_run), "--prompt", PROMPT, "--temperature", "0", "--max_new_tokens", "1")
    assert mhf(capsys, *options, "--data", str(moved))[0].startswith(PROMPT)
    (moved / "tokenizer.json").write_text("{}")
    assert "tokenizer.json is truncated" in one_line(mhf(capsys, *options, "--data", str(moved), code=2))


def test_the_data_of_the_last_start_counts(made_run, made_corpus, tmp_path, capsys):
    for name, path in (("config", "gone"), ("config-resume-2", "gone"), ("config-resume-10", made_corpus)):
        (made_run / f"{name}.yaml").write_text(f"data: {{path: {path}}}\n")
    assert mhf(capsys, "generate", str(made_run), "--prompt", PROMPT, "--temperature", "0")[0].startswith(PROMPT)


def test_options_out_of_range_are_one_line(made_run, capsys):
    options = ("generate", str(made_run), "--prompt", PROMPT)
    assert "must be at least 1" in one_line(mhf(capsys, *options, "--max_new_tokens", "0", code=2))
    mhf(capsys, *options, "--max_new_token", "3", code=2)


def test_an_interrupt_ends_it_quietly(made_run, capsys, monkeypatch):
    def interrupted(*args, **options):
        yield torch.tensor([70])
        raise KeyboardInterrupt

    monkeypatch.setattr("mhf_lightning.model.generate.generate", interrupted)
    out, err = mhf(capsys, "generate", str(made_run), "--prompt", PROMPT, code=130)
    assert out.startswith(PROMPT)
    assert err.strip() == "interrupted"
