"""Scalars, images and texts of a run's TensorBoard event files, by TensorBoard's reader. No torch, no Lightning."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

TEXT = "/text_summary"  # what ``add_text`` adds to a tag
FRAME = 16  # bytes of a record besides the event: its length, and a checksum each of length and event


@dataclass
class Series:
    """The points of a tag in the order of their steps, each step once.

    Attributes:
        steps: Steps, int.
        times: Unix seconds at which the points were written.
        values: Scalars, or images as encoded bytes.
    """

    steps: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)

    def add(self, step: int, time: float, value: Any) -> None:
        """Append a point; it replaces what an interrupted run had written at its step and later."""
        self.purge(step)
        self.steps.append(step)
        self.times.append(time)
        self.values.append(value)

    def purge(self, step: int) -> None:
        """Drop the points at a step and later."""
        while self.steps and self.steps[-1] >= step:
            for points in (self.steps, self.times, self.values):
                points.pop()


@dataclass
class Events:
    """What the event files of a run hold.

    Attributes:
        scalars: By tag.
        images: By tag.
        texts: The last one by tag, as it was given to ``add_text``.
        first_time: Unix seconds of the first event; None without events.
        warnings: What could not be read, a sentence each.
    """

    scalars: dict[str, Series] = field(default_factory=lambda: defaultdict(Series))
    images: dict[str, Series] = field(default_factory=lambda: defaultdict(Series))
    texts: dict[str, str] = field(default_factory=dict)
    first_time: float | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def config(self) -> str | None:
        """The configuration of the run's last start, YAML, as ``RunText`` wrote it; None without."""
        text = self.texts.get("run/config")
        return None if text is None else text.strip("`").removeprefix("yaml\n")

    def values(self, tag: str) -> np.ndarray:
        """Return the finite values of a scalar, ``[points]``; empty where the run has none."""
        values = np.array(self.scalars[tag].values if tag in self.scalars else [], dtype=float)
        return values[np.isfinite(values)]

    def last(self, tag: str) -> float | None:
        """Return the last value of a scalar, finite or not; None where the run has none."""
        values = self.scalars[tag].values if tag in self.scalars else []
        return values[-1] if values else None


def read_events(folder: Path) -> Events:
    """Merge the event files of a folder in the order in which they were opened.

    Of a file that is damaged or cut off, what comes before the damage counts; a warning names it.
    """
    events = Events()
    for path in sorted(path for path in folder.glob("*tfevents*") if path.is_file()):
        try:
            size, read = path.stat().st_size, 0
            for record in RawEventFileLoader(str(path)).Load():  # ends without a word where a record is damaged
                _add(events, Event.FromString(record))
                read += len(record) + FRAME
            if read < size:
                events.warnings.append(f"{path}: damaged or cut off at byte {read:,} of {size:,}; the rest is skipped")
        except (DecodeError, OSError) as error:
            events.warnings.append(f"{path}: {error}; the rest is skipped")
    if not any(series.steps for series in events.scalars.values()):
        events.warnings.append(f"{folder}: no scalars in its event files")
    return events


def _add(events: Events, event: Event) -> None:
    if events.first_time is None:
        events.first_time = event.wall_time
    if event.session_log.status == SessionLog.START:  # a resumed run: what was drawn past its checkpoint is gone
        for series in (*events.scalars.values(), *events.images.values()):
            series.purge(event.step)
    for value in event.summary.value:
        kind = value.WhichOneof("value")
        if kind == "simple_value":
            events.scalars[value.tag].add(event.step, event.wall_time, value.simple_value)
        elif kind == "image":
            events.images[value.tag].add(event.step, event.wall_time, value.image.encoded_image_string)
        elif kind == "tensor" and value.tag.endswith(TEXT):
            events.texts[value.tag.removesuffix(TEXT)] = value.tensor.string_val[0].decode()
