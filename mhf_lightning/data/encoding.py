"""Encode documents in several processes, with the result in the order of the input whatever their number."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import numpy as np
from tokenizers import Tokenizer

from mhf_lightning.data.errors import DataError
from mhf_lightning.data.tokenizer import PIECE_CHARACTERS, encode_documents, eos_id_of, tokenizer_from_json

Tag = TypeVar("Tag")
Encoded = tuple[np.ndarray, np.ndarray]
_MAX_DOCUMENTS = 1024
_worker: tuple[Tokenizer, int] | None = None


def encode_in_order(
    documents: Iterable[tuple[str, Tag]], tokenizer: Tokenizer, eos_token: str, num_workers: int
) -> Iterator[tuple[Tag, np.ndarray]]:
    """Encode (text, tag) pairs; yield each tag with the tokens of its text and EOS, uint32 [length].

    With one worker the calling process encodes. Otherwise workers are spawned, since forking a process in which the
    tokenizer's threads ran can deadlock; at most two batches a worker are under way, so memory stays bounded.

    Raises:
        DataError: From a worker, or because one was killed.
    """
    if num_workers == 1:
        eos_id = eos_id_of(tokenizer, eos_token)
        for texts, tags in _batches(documents):
            yield from _by_document(tags, encode_documents(tokenizer, texts, eos_id))
        return
    with ProcessPoolExecutor(
        num_workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer.to_str(), eos_token),
    ) as pool:
        waiting: deque[tuple[list[Tag], Future[Encoded]]] = deque()
        try:
            for texts, tags in _batches(documents):
                waiting.append((tags, pool.submit(_encode, texts)))
                if len(waiting) >= 2 * num_workers:
                    yield from _finished(*waiting.popleft())
            while waiting:
                yield from _finished(*waiting.popleft())
        except BrokenProcessPool as error:
            raise DataError(
                "a tokenizer process was killed, most often for lack of memory: use a smaller --num_workers. Or "
                "prepare() is called by a script outside of `if __name__ == '__main__':`, which each process imports."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _batches(documents: Iterable[tuple[str, Tag]]) -> Iterator[tuple[list[str], list[Tag]]]:
    texts: list[str] = []
    tags: list[Tag] = []
    size = 0
    for text, tag in documents:
        texts.append(text)
        tags.append(tag)
        size += len(text)
        if size >= PIECE_CHARACTERS or len(texts) == _MAX_DOCUMENTS:
            yield texts, tags
            texts, tags, size = [], [], 0
    if texts:
        yield texts, tags


def _finished(tags: list[Tag], future: Future[Encoded]) -> Iterator[tuple[Tag, np.ndarray]]:
    return _by_document(tags, future.result())


def _by_document(tags: list[Tag], encoded: Encoded) -> Iterator[tuple[Tag, np.ndarray]]:
    tokens, lengths = encoded
    return zip(tags, np.split(tokens, np.cumsum(lengths)[:-1]), strict=True)


def _start_worker(tokenizer_json: str, eos_token: str) -> None:
    global _worker  # noqa: PLW0603 (the state of a worker process)
    for sent in (signal.SIGINT, signal.SIGTERM):  # both go to a whole group; the parent ends its workers in order
        signal.signal(sent, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    tokenizer = tokenizer_from_json(tokenizer_json, eos_token, "passed to a worker")
    _worker = (tokenizer, eos_id_of(tokenizer, eos_token))


def _end_with_parent() -> None:
    """A worker of a killed parent would wait for work forever: it holds both ends of its queue."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(texts: list[str]) -> Encoded:
    assert _worker is not None
    tokenizer, eos_id = _worker
    return encode_documents(tokenizer, texts, eos_id)
