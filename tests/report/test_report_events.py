"""Event files with known contents, whole, resumed and damaged."""

import math

import pytest
from report_runs import PNG, START, write_events

from mhf_lightning.report.events import FRAME, read_events


def scalars(events, tag: str) -> dict[int, float]:
    return dict(zip(events.scalars[tag].steps, events.scalars[tag].values, strict=True))


def test_scalars_and_images_are_read(tmp_path):
    write_events(
        tmp_path, [("train/loss", 0, 2.5), ("val/loss", 1, 1.5), ("train/loss", 2, 0.5), ("router/load", 2, PNG)]
    )
    events = read_events(tmp_path)
    assert scalars(events, "train/loss") == {0: 2.5, 2: 0.5}
    assert scalars(events, "val/loss") == {1: 1.5}
    assert events.scalars["train/loss"].times == [START, START + 2]
    assert events.images["router/load"].values == [PNG]
    assert (events.last("train/loss"), events.last("none")) == (0.5, None)
    assert events.warnings == []


def test_what_a_resumed_run_purges_is_gone_from_all_tags(tmp_path):
    before = [("train/loss", step, 1.0) for step in range(8)] + [("val/loss", 3, 1.0), ("val/loss", 7, 1.0)]
    write_events(tmp_path, before, number=1)
    write_events(tmp_path, [("train/loss", step, 2.0) for step in range(4, 6)], number=2, purge=4)
    events = read_events(tmp_path)
    assert scalars(events, "train/loss") == {0: 1, 1: 1, 2: 1, 3: 1, 4: 2, 5: 2}
    assert scalars(events, "val/loss") == {3: 1}


def test_later_points_win_without_a_purge(tmp_path):
    write_events(tmp_path, [("train/loss", step, 1.0) for step in range(8)], number=1)
    write_events(tmp_path, [("train/loss", step, 2.0) for step in range(4, 6)], number=2)
    assert scalars(read_events(tmp_path), "train/loss") == {0: 1, 1: 1, 2: 1, 3: 1, 4: 2, 5: 2}


def test_values_leave_out_what_is_not_finite(tmp_path):
    write_events(tmp_path, [("train/loss", 0, 1.0), ("train/loss", 1, math.nan), ("train/loss", 2, math.inf)])
    events = read_events(tmp_path)
    assert events.values("train/loss").tolist() == [1.0]
    assert events.last("train/loss") == math.inf
    assert events.values("none").tolist() == []


@pytest.mark.parametrize("cut", [1, FRAME, FRAME + 8])
def test_a_file_that_is_cut_off_keeps_its_beginning_and_is_named(tmp_path, cut):
    path = write_events(tmp_path, [("train/loss", step, float(step)) for step in range(5)])
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-cut])
    events = read_events(tmp_path)
    assert scalars(events, "train/loss") == {0: 0, 1: 1, 2: 2, 3: 3}
    (warning,) = events.warnings
    assert str(path) in warning
    assert f"of {size - cut:,}" in warning


def test_a_damaged_file_keeps_its_beginning_and_the_next_file_is_read(tmp_path):
    path = write_events(tmp_path, [("train/loss", step, float(step)) for step in range(1, 6)], number=1)
    write_events(tmp_path, [("train/loss", 9, 9.0)], number=2)
    data = bytearray(path.read_bytes())
    first = data.index(b"train/loss")
    record = data.index(b"train/loss", first + 1) - first  # all have this length
    data[-record - 1] ^= 0xFF  # in the checksum of the last but one
    path.write_bytes(data)
    events = read_events(tmp_path)
    assert scalars(events, "train/loss") == {1: 1, 2: 2, 3: 3, 9: 9}
    (warning,) = events.warnings
    assert str(path) in warning


@pytest.mark.parametrize(
    "content", [b"no event file at all", b"\0" * 100, b"\xff" * 100], ids=["text", "zeros", "ones"]
)
def test_what_is_no_event_file_is_named(tmp_path, content):
    path = tmp_path / "events.out.tfevents.1.host"
    path.write_bytes(content)
    warnings = read_events(tmp_path).warnings
    assert f"{path}: damaged or cut off at byte 0 of {len(content)}; the rest is skipped" in warnings
    assert f"{tmp_path}: no scalars in its event files" in warnings


def test_a_record_that_is_no_event_is_named(tmp_path):
    from tensorboard.summary.writer.record_writer import RecordWriter

    path = tmp_path / "events.out.tfevents.1.host"
    with path.open("wb") as file:
        RecordWriter(file).write(b"\x0f\xff not a protobuf")
    assert str(path) in read_events(tmp_path).warnings[0]


def test_a_folder_without_event_files(tmp_path):
    assert read_events(tmp_path / "none").warnings == [f"{tmp_path / 'none'}: no scalars in its event files"]
