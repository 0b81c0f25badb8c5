"""The tokenizer: trained on the corpus or loaded from a file, and always safe against text that spells EOS."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mhf_lightning.data.errors import DataError

EOS_TOKEN = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # 256 bytes and EOS
# An Encoding takes some 400 bytes a token, so a long document is encoded in pieces.
PIECE_CHARACTERS = 1 << 18
# Before the one space between two words. Most pre-tokenizers in use (GPT-2's and those after it) begin a new word there
# whatever surrounds it, so the pieces encode to the same tokens as the whole; _may_split asks the tokenizer at hand.
_CUT = re.compile(r"(?<=[^\W_])(?= [^\W\d_])")


def train_tokenizer(texts: Iterable[str], vocab_size: int, eos_token: str = EOS_TOKEN) -> Tokenizer:
    """Train a byte-level BPE on `texts`: any text can be encoded, and decodes to itself.

    The same texts give the same tokenizer. A corpus with too few different words gives fewer than `vocab_size` tokens.

    Args:
        texts: Read once; only the counts of different words are kept.
        vocab_size: Tokens, with the 256 bytes and EOS.
        eos_token: The spelling of EOS, which gets id 0.

    Raises:
        DataError: `vocab_size` is below 257.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise DataError(f"vocab_size is {vocab_size}; it must be at least {MIN_VOCAB_SIZE} (256 bytes and EOS).")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eos_token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in split_pieces(text)), trainer)
    return _made_safe(tokenizer, eos_token)


def load_tokenizer(path: str | Path, eos_token: str = EOS_TOKEN) -> Tokenizer:
    """Load a `tokenizer.json`; text that spells a special token does not become that token, and none is added to text.

    Use this and not `Tokenizer.from_file`, so that a prompt becomes the tokens that the text of a dataset became: the
    file format does not store `encode_special_tokens`, and may add BOS and the like. `eos_id_of` gives the id of EOS.

    Raises:
        DataError: No such file, not a tokenizer, or without `eos_token` (its special tokens are named).
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(f"the tokenizer {path} does not exist. Give the path of a tokenizer.json.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"the tokenizer {path} is not a text file. Give the path of a tokenizer.json.") from error
    return tokenizer_from_json(text, eos_token, str(path))


def tokenizer_from_json(text: str, eos_token: str, origin: str) -> Tokenizer:
    """Build a tokenizer from the text of a `tokenizer.json`; `origin` names it in errors. See `load_tokenizer`."""
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the Rust library raises plain Exception
        raise DataError(f"the tokenizer {origin} cannot be read ({error}). Give a tokenizer.json.") from error
    if tokenizer.token_to_id(eos_token) is None:
        special = [token["content"] for token in json.loads(text).get("added_tokens", []) if token.get("special")]
        candidates = ", ".join(map(repr, special)) or "none"
        raise DataError(
            f"the tokenizer {origin} has no token {eos_token!r} to end documents with. Its special tokens: "
            f"{candidates}. Name one with --eos_token."
        )
    # A tokenizer.json made for fine-tuning may cut or pad each text.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return _made_safe(tokenizer, eos_token)


def _made_safe(tokenizer: Tokenizer, eos_token: str) -> Tokenizer:
    """EOS marks the end of a document and nothing else, whatever a document says; the rest is the text's tokens."""
    tokenizer.add_special_tokens([eos_token])  # keeps the id; an ordinary added token would be found in text
    tokenizer.encode_special_tokens = True
    tokenizer.post_processor = None  # a Llama's puts BOS before each text
    return tokenizer


def eos_id_of(tokenizer: Tokenizer, eos_token: str) -> int:
    """Id of EOS in a tokenizer of this module."""
    eos_id = tokenizer.token_to_id(eos_token)
    assert eos_id is not None
    return eos_id


def vocab_size_of(tokenizer: Tokenizer) -> int:
    """Size an embedding needs: the largest id plus one (ids may have gaps)."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def have_same_tokens(a: Path, b: Path) -> bool:
    """Say whether two tokenizer.json give the same spelling the same number; how they are written does not matter."""
    one, other = (Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True) for path in (a, b))
    return bool(one == other)


def split_pieces(text: str) -> Iterator[str]:
    """Cut a long text between words, into pieces of at least `PIECE_CHARACTERS` that encode as the whole does."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        cut = _CUT.search(text, start + PIECE_CHARACTERS)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def encode_documents(tokenizer: Tokenizer, texts: list[str], eos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Encode documents, each followed by EOS.

    Returns:
        tokens uint32 [total], and lengths int64 [len(texts)] in tokens with EOS.

    Raises:
        DataError: The tokenizer made EOS out of text, through its vocabulary or its normaliser.
    """
    pieces: list[str] = []
    owners: list[int] = []
    for number, text in enumerate(texts):
        for piece in split_pieces(text) if len(text) > PIECE_CHARACTERS and _may_split(tokenizer) else [text]:
            pieces.append(piece)
            owners.append(number)
    parts: list[np.ndarray] = []
    lengths = np.ones(len(texts), dtype=np.int64)
    end = np.array([eos_id], dtype=np.uint32)
    for position, encoding in enumerate(_encodings(tokenizer, pieces)):
        ids = np.array(encoding, dtype=np.uint32)
        owner = owners[position]
        if (ids == eos_id).any():
            raise DataError(
                f"the tokenizer turns text into its EOS token {tokenizer.id_to_token(eos_id)!r}, in a document that "
                f"begins {texts[owner][:60]!r}. Choose a tokenizer, or an --eos_token, that text cannot spell."
            )
        parts.append(ids)
        lengths[owner] += len(ids)
        if position + 1 == len(owners) or owners[position + 1] != owner:
            parts.append(end)
    return np.concatenate(parts), lengths


def _may_split(tokenizer: Tokenizer) -> bool:
    """Whether pieces encode as the whole does: not where a normaliser adds a space in front of a text, or takes one."""
    whole, *parts = (tokenizer.encode(text, add_special_tokens=False).ids for text in ("one two", "one", " two"))
    return whole == parts[0] + parts[1]


def _encodings(tokenizer: Tokenizer, pieces: list[str]) -> Iterator[list[int]]:
    """Token ids of each piece, a bounded number of characters at a time."""
    group: list[str] = []
    size = 0
    for number, piece in enumerate(pieces):
        group.append(piece)
        size += len(piece)
        if size >= PIECE_CHARACTERS or number + 1 == len(pieces):
            for encoding in tokenizer.encode_batch_fast(group):
                yield encoding.ids
            group, size = [], 0
