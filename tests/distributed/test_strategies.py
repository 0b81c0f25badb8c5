"""Options that are refused when a strategy is built, and AdamW over parameters of several meshes."""

import pytest
import torch
from torch.distributed.tensor import Shard, distribute_tensor

from mhf_lightning.training.optimizer import MeshAdamW
from mhf_lightning.training.strategies import GENERATED_KEYS, MHFFSDP2, MHFDeepSpeed


@pytest.mark.parametrize("key", GENERATED_KEYS)
def test_a_key_that_is_set_twice_is_refused(key):
    with pytest.raises(ValueError, match=rf"{key} \(set {GENERATED_KEYS[key]}\)"):
        MHFDeepSpeed(config={key: 1, "steps_per_print": 5})


def test_deepspeed_s_stage_and_offload_are_refused():
    with pytest.raises(ValueError, match=r"zero_optimization\.stage \(set stage\)"):
        MHFDeepSpeed(config={"zero_optimization": {"stage": 3}})
    with pytest.raises(ValueError, match="offload_optimizer"):
        MHFDeepSpeed(config={"zero_optimization": {"offload_optimizer": {"device": "cpu"}}})
    with pytest.raises(ValueError, match="must be 2 or 3"):
        MHFDeepSpeed(stage=1)


def test_sizes_must_be_positive():
    with pytest.raises(ValueError, match="tensor_parallel_size is 0"):
        MHFFSDP2(data_parallel_size=2, tensor_parallel_size=0)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("fused", [False, True])
def test_adamw_takes_several_meshes(fused):
    mesh = torch.distributed.init_device_mesh("cpu", (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    torch.manual_seed(0)
    plain = [torch.nn.Parameter(torch.randn(4, 3)) for _ in range(2)]
    split = [
        torch.nn.Parameter(distribute_tensor(plain[0].data.clone(), mesh["data_parallel"], [Shard(0)])),
        torch.nn.Parameter(distribute_tensor(plain[1].data.clone(), mesh, [Shard(0), Shard(1)])),
    ]
    expected = torch.optim.AdamW([{"params": plain, "weight_decay": 0.3}], lr=0.1)
    optimizer = MeshAdamW([{"params": split, "weight_decay": 0.3}], lr=0.1, fused=fused)
    for _ in range(3):
        for a, b in zip(plain, split, strict=True):
            a.grad = torch.randn(4, 3)
            b.grad = distribute_tensor(a.grad, b.device_mesh, b.placements)
        expected.step()
        optimizer.step()
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.state_dict()["state"]) == 2
    for a, b in zip(plain, split, strict=True):
        torch.testing.assert_close(b.full_tensor(), a)
