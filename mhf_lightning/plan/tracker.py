"""Counts the bytes of all live tensors while a step runs on fake tensors, as CUDA's allocator would. Torch only."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PARTS = ("weights", "weight copies", "gradients", "optimiser", "activations", "logits", "workspace")
ALLOCATION = 512  # bytes; CUDA's caching allocator hands out multiples of this


class LiveMemory(TorchDispatchMode):
    """Follows every storage from the operation that makes it until it is freed.

    Attributes:
        now: Live bytes of each part of ``PARTS``.
        at_peak: Live bytes of each part when their sum was largest.
        largest: Largest live bytes of each part, each at its own moment.
    """

    def __init__(self, vocab_size: int, workspace: int, scratch: dict[Any, Callable[..., int]]) -> None:
        """Start with nothing alive.

        Args:
            vocab_size: Tensors whose last dimension is this are logits.
            workspace: Bytes that libraries hold all the time.
            scratch: Bytes that the CUDA kernel of an operation takes while it runs, from the operation's arguments.
        """
        super().__init__()
        self.vocab_size, self.workspace, self.scratch = vocab_size, workspace, scratch
        self._storages: dict[int, tuple[weakref.ref[torch.UntypedStorage], int, str]] = {}
        self._resize = torch.UntypedStorage.resize_
        self._kernels: frozenset[Any] | None = None
        self._fused: list[tuple[weakref.ref[torch.UntypedStorage], str]] = []
        self.now = dict.fromkeys(PARTS, 0) | {"workspace": workspace}
        self.reset_peak()

    def reset_peak(self) -> None:
        """Forget what was before now."""
        self.at_peak, self.largest = dict(self.now), dict(self.now)
        self._peak = sum(self.now.values())

    @property
    def peak(self) -> int:
        """Largest sum of live bytes."""
        return self._peak

    def tag(self, tensors: Iterable[Tensor | None], part: str) -> None:
        """Say which part these tensors belong to."""
        for tensor in tensors:
            if tensor is not None:
                storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
                if self._storages.get(id(storage), (None, 0, ""))[2] != part:
                    self._forget(id(storage))
                    self._add(storage, part)

    def move(self, part: str, to: str) -> None:
        """Count all that lives of one part as another."""
        self._storages = {k: (ref, n, to if p == part else p) for k, (ref, n, p) in self._storages.items()}
        self.now[to] += self.now[part]
        self.now[part] = 0
        self._observe(to)

    def forget(self, *parts: str) -> None:
        """Stop counting what lives of these parts."""
        self._storages = {k: (ref, 0 if p in parts else n, p) for k, (ref, n, p) in self._storages.items()}
        self.now |= dict.fromkeys(parts, 0)

    @contextmanager
    def fusing(self, kernels: frozenset[Any]) -> Iterator[None]:
        """Run a compiled graph: what other operations make is memory only where a kernel reads it, or it is kept."""
        self._kernels = kernels
        try:
            yield
        finally:
            self._kernels = None
            for ref, part in self._fused:
                storage = ref()
                if storage is not None and id(storage) not in self._storages:
                    self._add(storage, part)
            self._fused = []

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Stop counting these tensors."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._forget(id(storage))
            self._add(storage, "weights", size=0)

    def __enter__(self) -> LiveMemory:
        memory, resize = self, self._resize

        def resize_and_count(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            entry = memory._storages.get(id(storage))
            if entry is not None:
                memory._forget(id(storage))
                memory._add(storage, "weight copies")
            return result

        # FSDP2 frees and allocates gathered weights so, and nobody else resizes.
        torch.UntypedStorage.resize_ = resize_and_count  # type: ignore[assignment, method-assign]
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it made."""
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # let DTensor split the operation into local ones first
        kwargs = kwargs or {}
        if self._kernels is not None and func in self._kernels:
            self._materialise(tree_leaves((args, kwargs)))
        result = func(*args, **kwargs)
        if func is torch.ops.prim.device.default:
            return result
        part = "activations"
        if func is torch.ops.aten._to_copy.default and self._part_of(args[0]) == "weights":
            part = "weight copies"
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                is_logits = leaf.ndim == 2 and leaf.shape[-1] == self.vocab_size
                self._made(leaf, "logits" if is_logits and part == "activations" else part, func)
        if func in self.scratch:
            size = _rounded(self.scratch[func](*args, **kwargs))
            self.now["workspace"] += size
            self._observe("workspace")
            self.now["workspace"] -= size
        return result

    def _made(self, tensor: Tensor, part: str, func: Any) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self._storages:
            return
        if self._kernels is None or func in self._kernels:
            self._add(storage, part)
        else:
            self._fused.append((weakref.ref(storage), part))

    def _materialise(self, leaves: list[Any]) -> None:
        read = {id(leaf.untyped_storage()) for leaf in leaves if isinstance(leaf, Tensor)}
        for ref, part in self._fused:
            storage = ref()
            if storage is not None and id(storage) in read and id(storage) not in self._storages:
                self._add(storage, part)

    def _part_of(self, tensor: Tensor) -> str | None:
        entry = self._storages.get(id(tensor.untyped_storage()))
        return None if entry is None else entry[2]

    def _add(self, storage: torch.UntypedStorage, part: str, size: int | None = None) -> None:
        key, size = id(storage), _rounded(storage.nbytes()) if size is None else size
        self._storages[key] = (weakref.ref(storage, lambda _: self._forget(key)), size, part)
        self.now[part] += size
        self._observe(part)

    def _forget(self, key: int) -> None:
        entry = self._storages.pop(key, None)
        if entry is not None:
            self.now[entry[2]] -= entry[1]

    def _observe(self, part: str) -> None:
        self.largest[part] = max(self.largest[part], self.now[part])
        total = sum(self.now.values())
        if total > self._peak:
            self._peak, self.at_peak = total, dict(self.now)


def _rounded(size: int) -> int:
    return -(-size // ALLOCATION) * ALLOCATION
