"""What tensor parallelism sends: counted on one rank of two, in a process group that moves nothing."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from mhf_lightning.model import Decoder, DecoderConfig, FFNConfig
from mhf_lightning.model.parallel import FFN_SPLITS, split_heads
from mhf_lightning.model.rope import rotary_tables

FFN = {
    "flash_mhf": FFNConfig("flash_mhf", num_heads=4, num_subnetworks=2, d_e=8),
    "swiglu": FFNConfig("swiglu", d_ff=24),
    "mh_ffn": FFNConfig("mh_ffn", num_heads=4, d_ff=16),
    "pkv": FFNConfig("pkv", num_heads=4, d_ff=24),
    "gated_swiglu": FFNConfig("gated_swiglu", num_subnetworks=2, d_e=12),
    "dense_moe": FFNConfig("dense_moe", num_subnetworks=2, d_e=12),
}
# Of the feed-forward layer, in forward and backward. These two normalise gates over sub-networks of several ranks.
ALL_REDUCES = {name: (2, 3) if name in ("gated_swiglu", "dense_moe") else (1, 1) for name in FFN}


@pytest.fixture
def mesh() -> DeviceMesh:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def communication(module, *args) -> tuple[dict, dict]:
    """The collectives of a forward and of its backward."""
    x = torch.randn(2, 8, 32, requires_grad=True)
    counts = []
    with CommDebugMode() as mode:
        y = module(x, *args)
    counts.append(mode.get_comm_counts())
    with CommDebugMode() as mode:
        y.sum().backward()
    counts.append(mode.get_comm_counts())
    assert x.grad.shape == x.shape
    return tuple({str(op).split(".")[-1]: count for op, count in counted.items()} for counted in counts)


@pytest.mark.parametrize("name", FFN_SPLITS)
def test_attention_and_feed_forward_layer_cost_one_all_reduce_each(name, mesh):
    decoder = Decoder(DecoderConfig(vocab_size=40, d_model=32, num_layers=1, num_attention_heads=4, ffn=FFN[name]))
    split_heads(decoder, mesh)
    block = decoder.blocks[0]
    cos, sin = rotary_tables(torch.arange(8)[None], 8, 10_000.0)
    forward, backward = ALL_REDUCES[name]
    assert communication(block.attention, cos, sin, None) == ({"all_reduce": 1}, {"all_reduce": 1})
    assert communication(block.ffn) == ({"all_reduce": forward}, {"all_reduce": backward})
    assert communication(block, cos, sin, None) == ({"all_reduce": 1 + forward}, {"all_reduce": 1 + backward})
