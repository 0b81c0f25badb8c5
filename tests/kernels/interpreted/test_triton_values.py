"""The Triton kernels in the interpreter, at small shapes: values against float64, support, strides, skipped work."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
import triton
from mhf_kernels import (
    BackendUnavailableError,
    dispatch,
    flash_mhf,
    flash_mhf_reference,
    triton_backend,
    triton_kernels,
    tuning,
)

NAMES = ("o", "q", "k", "u", "v", "r")
SHAPES = [  # batch, length, heads, kuv_heads, subnetworks, d_e, d_h
    (1, 1, 1, 1, 1, 16, 16),
    (1, 1, 2, 1, 2, 48, 96),
    (1, 33, 2, 2, 2, 32, 32),
    (2, 5, 4, 2, 3, 16, 16),
    (2, 40, 2, 2, 2, 48, 64),
    (3, 17, 4, 1, 1, 80, 48),
    (1, 20, 1, 1, 2, 16, 256),
]


@pytest.fixture(autouse=True)
def triton_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MHF_BACKEND", "triton")


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fill every torch.empty with NaN, so that an element which no kernel writes is seen."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def make(shape, dtype=torch.float32, scale=1.0):
    batch, length, heads, kuv_heads, subnetworks, d_e, d_h = shape
    weights = (kuv_heads, subnetworks, d_e, d_h)
    q = torch.randn(batch, length, heads, d_h)
    k, u = (torch.randn(weights) * d_h**-0.5 for _ in range(2))
    r = torch.rand(heads, subnetworks, batch, length).permute(2, 3, 0, 1)
    return [*(x.to(dtype) for x in (q, scale * k, u, torch.randn(weights))), r]


def values(function, inputs, grad):
    inputs = [x.detach().requires_grad_() for x in inputs]
    o = function(*inputs)
    return [o.detach(), *torch.autograd.grad(o, inputs, grad.to(o.dtype))]


def check(inputs, tolerance=3e-6, grad=None):
    grad = torch.randn(inputs[0].shape).to(inputs[0].dtype) if grad is None else grad
    exact = values(flash_mhf_reference, [x.double() for x in inputs], grad)
    for name, ours, truth in zip(NAMES, values(flash_mhf, inputs, grad), exact, strict=True):
        error = (ours.double() - truth).norm() / truth.norm()
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_formula(shape):
    inputs, grad = make(shape), None
    if inputs[-1].numel() == 1:  # the gate's gradient is one sum: of terms of either sign next to nothing may be left
        o = flash_mhf_reference(*inputs)
        grad = torch.randn(o.shape).abs() * o.sign()
    check(inputs, grad=grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_16_bit_inputs(dtype, scale):
    # The interpreter truncates where a GPU rounds: one unit in the last place.
    check(make((2, 20, 2, 2, 2, 48, 32), dtype, scale), tolerance=8e-3 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("shape", SHAPES[1:5], ids=str)
def test_through_pointers(monkeypatch, shape):
    """The path for strides that a TMA descriptor cannot express gives the same."""
    monkeypatch.setattr(triton_backend, "_can_describe", lambda x: False)
    check(make(shape))


def test_a_gap_in_every_dimension():
    inputs = make((2, 9, 4, 2, 2, 32, 16))

    def strided(x):
        y = torch.full((*x.shape[::-1], 2), float("nan"))[..., 0].permute(3, 2, 1, 0)
        return y.copy_(x)

    grad = torch.randn(inputs[0].shape)
    for ours, plain in zip(
        values(flash_mhf, [strided(x) for x in inputs], strided(grad)), values(flash_mhf, inputs, grad), strict=True
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_batches_that_are_not_one_sequence():
    """A slice of every sequence: describable, but not flattenable."""
    q, k, u, v, r = make((2, 24, 2, 2, 2, 32, 16))
    check([q[:, 3:20], k, u, v, r[:, 3:20]])


def test_an_expanded_gradient():
    inputs = make((2, 9, 2, 2, 2, 32, 16))
    check(inputs, grad=torch.ones(()).expand(inputs[0].shape))


@pytest.mark.parametrize("processors", [4, 64])
def test_splits_of_d_ff_and_of_tokens(monkeypatch, processors):
    """On a GPU with many multiprocessors, few tokens or few columns are split; the second pass adds them up."""
    launched = []
    split_sum = triton_backend.sum_splits
    monkeypatch.setattr(triton_backend, "multiprocessors", lambda device: processors)
    monkeypatch.setattr(triton_backend, "sum_splits", lambda p, o: (launched.append(p.shape[0]), split_sum(p, o)))
    for shape in [(1, 1, 2, 2, 3, 48, 32), (2, 70, 2, 1, 2, 48, 16), (5, 40, 1, 1, 1, 32, 16)]:
        check(make(shape))
    assert max(launched) >= 3


@pytest.mark.parametrize("tile", [(16, 16), (32, 64), (64, 32)], ids=str)
@pytest.mark.parametrize("transposed", [True, False])
def test_every_tile_gives_the_same(monkeypatch, tile, transposed):
    monkeypatch.setattr(tuning, "default", lambda *_: tuning.Tile(*tile, 4, 2, transposed=transposed))
    check(make((1, 40, 2, 2, 2, 48, 32)))


@pytest.mark.parametrize("wanted", ["q", "k", "u", "v", "r", "qr", "qv", "ku", "kuv"])
def test_partial_gradients_skip_the_kernel_that_nobody_needs(monkeypatch, wanted):
    calls = []
    for name in ("_backward_tokens", "_backward_weights"):
        kernel = getattr(triton_backend, name)
        monkeypatch.setattr(triton_backend, name, lambda *a, name=name, kernel=kernel: (calls.append(name), kernel(*a)))
    inputs = make((1, 20, 2, 1, 2, 32, 16))
    full = values(flash_mhf, inputs, torch.ones_like(inputs[0]))[1:]
    calls.clear()
    some = [x.requires_grad_(name in wanted) for name, x in zip("qkuvr", inputs, strict=True)]
    flash_mhf(*some).sum().backward()
    for name, x, expected in zip("qkuvr", some, full, strict=True):
        if name in wanted:
            torch.testing.assert_close(x.grad, expected)
        else:
            assert x.grad is None
    expected_calls = ["_backward_tokens"] * bool(set(wanted) & set("qr"))
    expected_calls += ["_backward_weights"] * bool(set(wanted) & set("kuv"))
    assert calls == expected_calls


def test_no_tokens():
    inputs = make((2, 0, 2, 2, 2, 32, 16))
    o, *grads = values(flash_mhf, inputs, torch.empty_like(inputs[0]))
    assert o.shape == inputs[0].shape
    assert not any(g.any() for g in grads)


def sparse_integers(shape, values_, nonzeros=3):
    """Rows with few entries other than 0, so that every product and sum of the op is exact in bfloat16."""
    x = torch.zeros(shape)
    columns = torch.rand(shape).argsort(-1)[..., :nonzeros]
    return x.scatter_(-1, columns, values_[torch.randint(len(values_), columns.shape)])


def exact_inputs(shape):
    """Integer inputs: M is 0 or at least 32, where SiLU(M) = M in float32, and r a power of two."""
    batch, length, heads, kuv_heads, subnetworks, d_e, d_h = shape
    weights = (kuv_heads, subnetworks, d_e, d_h)
    q = sparse_integers((batch, length, heads, d_h), torch.tensor([1.0]))
    k = torch.tensor([0.0, 32.0])[torch.randint(2, weights)]
    u, v = (torch.randint(-1, 2, weights).float() for _ in range(2))
    r = torch.tensor([0.5, 1.0, 2.0])[torch.randint(3, (batch, length, heads, subnetworks))]
    grad = sparse_integers(q.shape, torch.tensor([-1.0, 1.0]))
    return [q, k, u, v, r], grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_integers_are_exact(dtype):
    inputs, grad = exact_inputs((2, 40, 4, 2, 2, 48, 32))
    exact = values(flash_mhf_reference, inputs, grad)  # float32: in float64, SiLU(32) is not 32
    ours = values(flash_mhf, [*(x.to(dtype) for x in inputs[:4]), inputs[4]], grad)
    for name, a, b in zip(NAMES, ours, exact, strict=True):
        fits = b.to(dtype) == b  # the others are rounded when they are stored
        assert fits.float().mean() > 0.5, name
        assert torch.equal(a.float()[fits], b[fits]), name


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((1, 4, 1, 1, 1, 16, 24), torch.float32, "d_h to be a multiple of 16 from 16 to 256; it is 24"),
        ((1, 4, 1, 1, 1, 16, 272), torch.float32, "d_h to be a multiple of 16 from 16 to 256; it is 272"),
        ((1, 4, 1, 1, 1, 24, 16), torch.float32, "d_e to be a multiple of 16; it is 24"),
        ((1, 4, 1, 1, 1, 16, 16), torch.float64, "bfloat16, float16 and float32, not torch.float64"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused_by_name_and_falls_back(monkeypatch, shape, dtype, reason):
    inputs = [x.to(dtype) for x in make(shape)]
    with pytest.raises(BackendUnavailableError, match=reason):
        flash_mhf(*inputs)
    monkeypatch.setenv("MHF_BACKEND", "auto")
    assert dispatch.select(*inputs).name == "reference"


def test_an_unknown_gate_is_refused(monkeypatch):
    monkeypatch.setenv("MHF_GATE", "fastest")
    with pytest.raises(ValueError, match="MHF_GATE=fastest is unknown; allowed: fast, exact"):
        triton_backend.gate()


def test_opcheck():
    inputs = make((1, 20, 2, 1, 2, 32, 16), torch.float32)
    torch.library.opcheck(torch.ops.mhf.flash_mhf, [x.requires_grad_() for x in inputs])
    q, k, u, v, r = (x.detach() for x in inputs)
    for needs in [(True,) * 5, (True, False, False, True, False)]:
        torch.library.opcheck(torch.ops.mhf.flash_mhf_backward, (torch.ones_like(q), q, k, u, v, r, *needs))


class TooLarge:
    """A kernel on a GPU whose shared memory has no room for tiles of this many columns."""

    def __init__(self, kernel, block_n):
        self.kernel, self.block_n = kernel, block_n

    def __getitem__(self, grid):
        def launch(*args, **options):
            if options["BLOCK_N"] == self.block_n:
                raise triton.OutOfResources(120_000, 101_376, "shared memory")
            self.kernel[grid](*args, **options)

        return launch


LAUNCHES = {  # rows of the tuning table: kernels, and multiprocessors
    "forward": ("forward_kernel", 1),
    "decode": ("forward_kernel", 64),
    "backward_tokens": ("backward_tokens_kernel", 1),
    "backward_weights": ("backward_weights_kernel", 1),
}


@pytest.mark.parametrize("row", LAUNCHES)
def test_a_tuned_tile_that_does_not_fit_gives_way_to_the_default(monkeypatch, row):
    kernel, processors = LAUNCHES[row]
    name = tuning.key(row, "interpreter", 32, "float32")
    rows = {name: tuning.Tile(16, 128, 4, 2)}
    monkeypatch.setattr(tuning, "table", lambda: rows)
    monkeypatch.setattr(triton_backend, "multiprocessors", lambda device: processors)
    monkeypatch.setattr(triton_kernels, kernel, TooLarge(getattr(triton_kernels, kernel), 128))
    with pytest.warns(triton_backend.TileWarning, match=f"{name} does not fit this GPU.*Required: 120000") as warned:
        check(make((1, 20, 2, 2, 2, 48, 32)))
    assert len(warned) == 1
    assert not rows
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(make((1, 20, 2, 2, 2, 48, 32)))


def test_a_default_that_does_not_fit_is_an_error(monkeypatch):
    block_n = tuning.default("forward", 32, "float32").block_n
    monkeypatch.setattr(triton_kernels, "forward_kernel", TooLarge(triton_kernels.forward_kernel, block_n))
    with pytest.raises(triton.OutOfResources, match="Required: 120000"):
        flash_mhf(*make((1, 20, 2, 2, 2, 48, 32)))
