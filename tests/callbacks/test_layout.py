"""What TensorBoard gets: the custom charts, curves against tokens that survive a resume, and hyperparameters."""

import re

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata
from timed_run import LENGTH, train

TOKENS = 4 * LENGTH


def load(folder) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def points(events: EventAccumulator, tag: str) -> dict[int, float]:
    found = [(event.step, event.value) for event in events.Scalars(tag)]
    assert len(dict(found)) == len(found), f"{tag} has two points of one step"
    return dict(found)


def test_every_chart_has_curves_and_curves_against_tokens_survive_a_resume(tmp_path):
    case = {"strategy": "single", "rows": [[4] * 6], "steps": 6, "router": 2, "validate_every": 2}
    case |= {"folder": str(tmp_path / "checkpoints"), "logdir": str(tmp_path / "tensorboard"), "peak_tflops": 1.0}
    whole = train({**case, "save_after": 3})
    tags = load(tmp_path / "tensorboard").Tags()
    (proto,) = load(tmp_path / "tensorboard").Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(proto.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["learning", "speed", "memory", "routers"]
    for category in layout.category:
        for chart in category.chart:
            patterns = chart.multiline.tag
            of_gpus = "by phase" in chart.title or "reserved" in chart.title
            shown = [tag for tag in tags["scalars"] if any(re.fullmatch(pattern, tag) for pattern in patterns)]
            assert bool(shown) != of_gpus, chart.title

    against = load(tmp_path / "tensorboard/tokens")
    expected = {(step + 1) * TOKENS: loss for step, loss in whole["points"]["train/loss"].items()}
    assert points(against, "tokens/train_loss") == expected
    assert set(points(against, "tokens/val_loss")) == {n * TOKENS for n in (2, 4, 6)}

    train({**case, "resume": str(tmp_path / "checkpoints/step-3")})
    again = points(load(tmp_path / "tensorboard/tokens"), "tokens/train_loss")
    assert set(again) == set(expected)
    assert all(again[n * TOKENS] == expected[n * TOKENS] for n in (1, 2, 3))


def test_hyperparameters_and_the_final_perplexity(tmp_path):
    run = {"strategy": "single", "rows": [[4] * 4], "steps": 4, "validate_every": 2, "logdir": str(tmp_path)}
    result = train(run)
    events = load(tmp_path)
    assert points(events, "hparam/val_perplexity")[3] == result["points"]["val/perplexity"][3]
    content = events.summary_metadata[metadata.SESSION_START_INFO_TAG].plugin_data.content
    values = metadata.parse_session_start_info_plugin_data(content).hparams
    assert values["ffn/name"].string_value == "flash_mhf"
    assert values["ffn/num_subnetworks"].number_value == 3
    assert values["lr"].number_value == 3e-3
    assert metadata.SESSION_END_INFO_TAG in events.summary_metadata
