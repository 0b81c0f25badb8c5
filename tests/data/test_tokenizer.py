import json

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from mhf_lightning.data import tokenizer as module
from mhf_lightning.data.errors import DataError
from mhf_lightning.data.tokenizer import (
    EOS_TOKEN,
    encode_documents,
    eos_id_of,
    load_tokenizer,
    split_pieces,
    tokenizer_from_json,
    train_tokenizer,
    vocab_size_of,
)


@pytest.fixture(scope="module")
def trained(texts):
    return train_tokenizer(texts, 500)


def test_trained_size_and_round_trip(trained, texts):
    assert vocab_size_of(trained) == 500
    assert eos_id_of(trained, EOS_TOKEN) == 0
    odd = "naïve 日本語 🙂\r\n\ttabs  \x00 end "
    for text in [odd, *texts[:50]]:
        assert trained.decode(trained.encode(text).ids, skip_special_tokens=False) == text


def test_training_is_deterministic(trained, texts):
    assert train_tokenizer(texts, 500).to_str() == trained.to_str()


def test_vocab_too_small(texts):
    with pytest.raises(DataError, match="vocab_size is 256; it must be at least 257"):
        train_tokenizer(texts, 256)


@pytest.mark.parametrize("special", [True, False])
def test_text_cannot_spell_eos(trained, special, tmp_path):
    content = json.loads(trained.to_str())
    assert content["added_tokens"][0]["content"] == EOS_TOKEN
    content["added_tokens"][0]["special"] = special
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    for tokenizer in (trained, load_tokenizer(tmp_path / "tokenizer.json")):
        text = f"before{EOS_TOKEN}after"
        tokens, lengths = encode_documents(tokenizer, [text, EOS_TOKEN], 0)
        assert lengths.sum() == len(tokens)
        assert (tokens == 0).nonzero()[0].tolist() == [lengths[0] - 1, len(tokens) - 1]
        assert tokenizer.decode(tokens[: lengths[0] - 1].tolist(), skip_special_tokens=False) == text


def test_eos_out_of_the_vocabulary_is_an_error():
    words = Tokenizer(models.WordLevel({"end": 0, "a": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    loaded = tokenizer_from_json(words.to_str(), "end", "here")
    with pytest.raises(DataError, match=r"turns text into its EOS token 'end'.*'a end a'"):
        encode_documents(loaded, ["a end a"], 0)


def test_truncation_and_padding_of_the_file_are_off(trained, tmp_path):
    tokenizer = Tokenizer.from_str(trained.to_str())
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=32)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)  # a folder with one in it
    assert loaded.encode("a b c d e f g h").ids == trained.encode("a b c d e f g h").ids


def test_no_token_is_added_to_text(trained, tmp_path):
    """As a Llama's tokenizer.json adds BOS."""
    llama = Tokenizer.from_str(trained.to_str())
    llama.add_special_tokens(["<s>"])
    llama.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 500)])
    assert llama.encode("a b").ids == [500, *trained.encode("a b").ids]
    llama.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("a b").ids == trained.encode("a b").ids
    assert encode_documents(loaded, ["a b"], 0)[0].tolist() == [*trained.encode("a b").ids, 0]
    assert tokenizer_from_json(loaded.to_str(), EOS_TOKEN, "here").encode("a b").ids == trained.encode("a b").ids


def test_load_errors(trained, tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(DataError, match=r"tokenizer.json does not exist"):
        load_tokenizer(path)
    path.write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer.json cannot be read"):
        load_tokenizer(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"tokenizer.json is not a text file"):
        load_tokenizer(path)
    trained.save(str(path))
    with pytest.raises(DataError, match=r"no token '</s>'.*special tokens: '<\|endoftext\|>'.*--eos_token"):
        load_tokenizer(path, "</s>")


def test_ids_with_gaps():
    words = Tokenizer(models.WordLevel({"a": 0, "<|endoftext|>": 70000}, unk_token="a"))
    assert vocab_size_of(tokenizer_from_json(words.to_str(), EOS_TOKEN, "here")) == 70001


GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("kind", ["gpt2", "prefix space", "gpt4", "metaspace", "prepend"])
def test_long_documents_encode_in_pieces_as_a_whole(texts, kind, monkeypatch):
    tokenizer = train_tokenizer(texts, 500)
    if kind == "prefix space":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif kind == "gpt4":
        split = pre_tokenizers.Split(Regex(GPT4), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    elif kind == "metaspace":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=700, special_tokens=[EOS_TOKEN]))
    elif kind == "prepend":  # as Llama 2 has it; here pieces would not do
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=700, special_tokens=[EOS_TOKEN]))
    text = "  " + "\n\n".join(texts) + "\n \n\n  x\ny\n"
    whole = tokenizer.encode(text).ids
    assert 0 not in whole
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 50)
    pieces = list(split_pieces(text))
    assert len(pieces) > 100
    assert "".join(pieces) == text
    tokens, lengths = encode_documents(tokenizer, [text, "b"], 0)
    assert tokens[: lengths[0]].tolist() == [*whole, 0]


def test_a_document_of_no_tokens_still_ends():
    words = Tokenizer(models.WordLevel({"a": 1, "<|endoftext|>": 0}, unk_token="a"))
    words.normalizer = normalizers.Strip()
    tokens, lengths = encode_documents(tokenizer_from_json(words.to_str(), EOS_TOKEN, "here"), [" ", "a"], 0)
    assert tokens.tolist() == [0, 1, 0]
    assert lengths.tolist() == [1, 2]
