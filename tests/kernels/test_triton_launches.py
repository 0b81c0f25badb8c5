"""What the `triton` backend decides before it launches: precision, splits, and what Triton would compile anew for."""

from __future__ import annotations

import os

import pytest
import torch
from mhf_kernels import triton_backend, triton_kernels, tuning
from triton.tools.tensor_descriptor import TensorDescriptor

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="other values when interpreted")


@pytest.fixture
def matmul_precision():
    """Leave the settings of this process as they were: nothing set."""
    yield
    torch.set_float32_matmul_precision("highest")
    for settings in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        settings.fp32_precision = "none"


def _set(name: str):
    owner, attribute = torch.backends, name.split(".")
    for part in attribute[:-1]:
        owner = getattr(owner, part)
    return lambda value: setattr(owner, attribute[-1], value)


@pytest.mark.usefixtures("matmul_precision")
@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        (torch.set_float32_matmul_precision, "highest", "ieee"),
        (torch.set_float32_matmul_precision, "high", "tf32"),
        (torch.set_float32_matmul_precision, "medium", "tf32"),
        (_set("cuda.matmul.allow_tf32"), True, "tf32"),
        (_set("cuda.matmul.fp32_precision"), "tf32", "tf32"),
        (_set("cuda.matmul.fp32_precision"), "ieee", "ieee"),
        (_set("fp32_precision"), "tf32", "tf32"),
        (_set("fp32_precision"), "ieee", "ieee"),
    ],
)
def test_float32_follows_either_api_of_torch(setting, value, expected):
    q, tile = torch.empty(1, 1, 1, 64), tuning.Tile(32, 32, 4, 1)
    assert triton_backend._constants(q, tile, 64)["PRECISION"] == "ieee"
    setting(value)
    constants = triton_backend._constants(q, tile, 64)
    assert (constants["PRECISION"], constants["GATE"]) == (expected, "exp" if expected == "tf32" else "libm")
    assert triton_backend._constants(q.bfloat16(), tile, 64)["PRECISION"] == "ieee"


@pytest.mark.usefixtures("matmul_precision")
def test_no_tf32_where_it_does_not_fit():
    torch.set_float32_matmul_precision("high")
    assert triton_backend._tf32(torch.float32, 128, "sm_86")
    assert triton_backend._tf32(torch.float32, 256, "sm_80")
    assert not triton_backend._tf32(torch.float32, 256, "sm_89")


@pytest.mark.parametrize(
    ("programs", "tiles", "expected"),
    [
        (1408, 2048, 3),  # 32,768 tokens of the 1.3B layer: 16 whole waves instead of 5 and a third
        (1408, 64, 1),  # 1,024 tokens: the sums would cost more than the wave
        (264, 2048, 1),  # one whole wave
        (528, 2048, 1),
        (20, 2048, 13),  # 260 programs
        (20, 4, 1),  # 64 tokens
        (1, 10, 10),  # no more parts than tiles
        (265, 20480, 8),  # 9 waves of an eighth each instead of 2
    ],
)
def test_splits_fill_the_waves_where_that_is_worth_the_sums(programs, tiles, expected):
    assert triton_backend.weight_splits(programs, 264, tiles, block_m=16) == expected


class Recorder:
    """Stands in for a kernel, and keeps what it is launched with."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append(self._specialised(args, options))

    def _specialised(self, args, options):
        """Return what Triton compiles anew for: types, constants, and whether an integer is 1 or a multiple of 16."""
        names = [param for param in self.kernel.params if not param.is_constexpr]
        key = dict(options)
        for param, arg in zip(names, args, strict=True):
            if isinstance(arg, int):
                key[param.name] = None if param.do_not_specialize else arg == 1
                if not (param.do_not_specialize or param.do_not_specialize_on_alignment):
                    key[param.name] = (arg == 1, arg % 16 == 0)
            elif isinstance(arg, TensorDescriptor):
                key[param.name] = str(arg.block_shape)
            else:
                key[param.name] = (arg.dtype, arg.data_ptr() % 16 == 0)
        return key


@pytest.mark.parametrize("flat", [True, False])
def test_another_length_compiles_no_other_kernel(monkeypatch, flat):
    names = ("forward_kernel", "backward_tokens_kernel", "backward_weights_kernel")
    kernels = {name: Recorder(getattr(triton_kernels, name)) for name in names}
    for name, recorder in kernels.items():
        monkeypatch.setattr(triton_kernels, name, recorder)
    for batch, length in [(2, 48), (2, 1000), (3, 1001), (4, 2), (16, 4096)]:
        start = 0 if flat else 1
        k, u, v = (torch.empty(2, 3, 64, 32, dtype=torch.bfloat16) for _ in range(3))
        q = torch.empty(batch, start + length, 4, 32, dtype=torch.bfloat16)[:, start:]
        r = torch.empty(4, 3, batch, length).permute(2, 3, 0, 1)  # as router_weights lays it out
        triton_backend.forward(q, k, u, v, r)
        triton_backend.backward(torch.empty_like(q), q, k, u, v, r, (True,) * 5)
    for recorder in kernels.values():
        assert len(recorder.launches) == 5
        assert all(launch == recorder.launches[0] for launch in recorder.launches)
