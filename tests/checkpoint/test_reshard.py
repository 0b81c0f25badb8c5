"""A run goes on with other ranks, another strategy and another dealing of the same global batch."""

import pytest
import torch
from safetensors.torch import load_file
from small_run import Run, Started, assert_equal, expected_history, finish, history, losses, replace

from mhf_lightning.checkpoint.export import export_full
from mhf_lightning.checkpoint.trained import read_trained

pytestmark = pytest.mark.serial


@pytest.fixture
def base(small_corpus, tmp_path) -> Run:
    """Global batch 8, no dropout: generators cannot be the same with other ranks."""
    return Run(small_corpus, str(tmp_path / "run"), dropout=0.0, max_steps=12, every=3, micro_batch=2, accumulate=4)


def go_on(run: Run) -> None:
    """Resume from the newest checkpoint, and be cut off three steps later, or end."""
    finish(run, ckpt_path="auto")


def close(ours: dict[int, str], reference: dict[int, str], tolerance: float) -> None:
    assert ours.keys() == reference.keys()
    for step, loss in ours.items():
        assert float.fromhex(loss) == pytest.approx(float.fromhex(reference[step]), abs=tolerance), f"step {step}"


def test_another_micro_batch_and_accumulation_in_one_process(base, tmp_path):
    whole = replace(base, folder=str(tmp_path / "whole"))
    finish(whole)
    go_on(replace(base, stop_at=3))
    go_on(replace(base, stop_at=6, micro_batch=4, accumulate=2))
    go_on(replace(base, stop_at=9, micro_batch=8, accumulate=1))
    go_on(replace(base, micro_batch=1, accumulate=8))
    assert history(base) == history(whole) == expected_history(base, 8, 12)
    close(losses(base.logs()), losses(whole.logs()), 1e-6)


def test_another_global_batch_is_refused(base):
    go_on(replace(base, stop_at=3))
    started = Started(replace(base, micro_batch=4), "auto")
    assert started.wait() == [1]
    assert "global batch of 8 = micro_batch_size 2 x ranks 1 x accumulate_grad_batches 4" in started.output()
    assert "here it is 16 = 4 x 1 x 4" in started.output()


def test_ddp_on_2_then_1_then_4_then_2_ranks(base, tmp_path):
    whole = replace(base, folder=str(tmp_path / "whole"))
    finish(whole)
    go_on(replace(base, stop_at=3, strategy="ddp", ranks=2, accumulate=2))
    go_on(replace(base, stop_at=6))
    go_on(replace(base, stop_at=9, strategy="ddp", ranks=4, accumulate=1))
    go_on(replace(base, strategy="ddp", ranks=2, micro_batch=4, accumulate=1))
    assert history(base) == expected_history(base, 8, 12)
    close(losses(base.logs()), losses(whole.logs()), 1e-6)


def test_a_replicated_save_writes_each_tensor_once_and_reads_the_same_everywhere(base, tmp_path):
    two = replace(base, strategy="ddp", ranks=2, accumulate=2, max_steps=3, every=3)
    finish(two)
    one = replace(two, folder=str(tmp_path / "one"), background=False)
    finish(one)
    assert_equal(two.checkpoints / "step-3", one.checkpoints / "step-3")
    sizes = [(two.checkpoints / "step-3" / f"shard-0000{rank}.safetensors").stat().st_size for rank in (0, 1)]
    assert max(sizes) < 1.5 * min(sizes)


def test_ddp_then_fsdp2_then_tensor_parallel_then_one_process(base, tmp_path):
    base = replace(base, keep=9)
    whole = replace(base, folder=str(tmp_path / "whole"))
    finish(whole)
    go_on(replace(base, stop_at=3, strategy="ddp", ranks=2, accumulate=2))
    go_on(replace(base, stop_at=6, strategy="fsdp2", ranks=2, accumulate=2))
    go_on(replace(base, stop_at=9, strategy="tp", ranks=2))
    go_on(base)
    assert history(base) == history(whole) == expected_history(base, 8, 12)
    close(losses(base.logs()), losses(whole.logs()), 1e-6)
    for step in (3, 6, 9):  # by DDP, FSDP2, tensor parallelism
        outputs = [tmp_path / f"{name}-{step}.safetensors" for name in ("ours", "whole")]
        for run, output in zip((base, whole), outputs, strict=True):
            export_full(read_trained(run.checkpoints / f"step-{step}"), output)
        ours, reference = (load_file(output) for output in outputs)
        assert ours.keys() == reference.keys()
        for name, weight in ours.items():
            torch.testing.assert_close(weight, reference[name], rtol=0, atol=1e-5)


def test_ranks_of_a_split_replica_go_on_with_the_same_dropout(base):
    """They hold parts of one model: with masks of their own they would compute different losses."""
    base = replace(base, dropout=0.2, max_steps=6)
    go_on(replace(base, stop_at=3, strategy="ddp", ranks=2, accumulate=2))
    resumed = Started(replace(base, strategy="tp", ranks=2), "auto")
    assert resumed.wait() == [0, 0], resumed.output()
    first, second = (losses([resumed.events(rank)]) for rank in (0, 1))
    assert list(first) == [4, 5, 6]
    assert first == second
