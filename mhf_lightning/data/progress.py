"""Progress and messages on stderr: a bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LOG_SECONDS = 10.0

Advance = Callable[[int, int], None]


def say(message: str) -> None:
    """Print one line on stderr."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def progress(title: str, documents: int | None = None) -> Iterator[Advance]:
    """Show how far a pass over the corpus is; the value yielded is called with (documents, bytes) done since."""
    with (_bar if sys.stderr.isatty() else _log)(title, documents) as advance:
        yield advance


@contextmanager
def _log(title: str, documents: int | None) -> Iterator[Advance]:
    done = [0, 0]
    started = shown = time.monotonic()
    of = f" of {documents:,}" if documents is not None else ""

    def show() -> None:
        say(f"{title}: {done[0]:,}{of} documents, {done[1] / 1e6:,.1f} MB in {time.monotonic() - started:,.0f} s")

    def advance(count: int, size: int) -> None:
        nonlocal shown
        done[0] += count
        done[1] += size
        if time.monotonic() - shown >= _LOG_SECONDS:
            shown = time.monotonic()
            show()

    yield advance
    show()


@contextmanager
def _bar(title: str, documents: int | None) -> Iterator[Advance]:
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("documents, {task.fields[megabytes]:,.1f} MB"),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    size_done = 0
    with rich_progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=documents, megabytes=0.0)

        def advance(count: int, size: int) -> None:
            nonlocal size_done
            size_done += size
            bar.update(task, advance=count, megabytes=size_done / 1e6)

        yield advance
