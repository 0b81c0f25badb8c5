"""From the state of a trainer to JSON and named tensors, and back; optimisers by the names of their parameters.

Imports ``files.py`` and torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mhf_lightning.checkpoint.files import CheckpointError

# How an optimiser computes, not what: belongs to the machine that goes on, not to the one that saved.
_IMPLEMENTATION = ("fused", "foreach", "capturable", "differentiable")


def encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return a JSON value for a nest of plain Python values; its tensors go into ``tensors`` under their paths.

    Raises:
        TypeError: A value is neither plain nor a tensor; the message has its path.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"__tensor__": path}
    if isinstance(value, list | tuple):
        items = [encode(item, f"{path}.{i}", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"__tuple__": items}
    if isinstance(value, dict):
        if all(type(key) is str and not key.startswith("__") for key in value):
            return {key: encode(item, f"{path}.{key}", tensors) for key, item in value.items()}
        pairs = [[encode(k, f"{path}.key", tensors), encode(v, f"{path}.{k}", tensors)] for k, v in value.items()]
        return {"__dict__": pairs}
    raise TypeError(
        f"{path} is a {type(value).__name__}; a checkpoint holds None, bool, int, float, str, list, tuple, dict and "
        "tensors only: convert it in the state_dict that it comes from"
    )


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo :func:`encode`.

    Raises:
        KeyError: A tensor is missing.
    """
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "__tensor__" in value:
        return tensors[value["__tensor__"]]
    if "__tuple__" in value:
        return tuple(decode(item, tensors) for item in value["__tuple__"])
    if "__dict__" in value:
        return {decode(key, tensors): decode(item, tensors) for key, item in value["__dict__"]}
    return {key: decode(item, tensors) for key, item in value.items()}


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _names(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    known = {id(parameter): name for name, parameter in module.named_parameters()}
    return [known[id(parameter)] for parameter in _parameters(optimizer)]


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return ``{"state": {name: {key: value}}, "param_groups": [{"params": [name], ...}]}``, uncopied.

    PyTorch numbers the parameters instead, which ties a state to the order of one process's groups.
    """
    names, state = _names(module, optimizer), optimizer.state_dict()
    groups = [
        {key: value for key, value in group.items() if key not in _IMPLEMENTATION}
        | {"params": [names[i] for i in group["params"]]}
        for group in state["param_groups"]
    ]
    return {"state": {names[i]: values for i, values in state["state"].items()}, "param_groups": groups}


def empty_optimizer_state(
    module: nn.Module, optimizer: torch.optim.Optimizer, shapes: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """Return tensors to load an optimiser's state into, laid out as the parameters are.

    Args:
        module: The model.
        optimizer: Of its parameters.
        shapes: By parameter and key, a tensor (on the meta device, say) with the global shape and dtype.
    """
    empty: dict[str, dict[str, Tensor]] = {}
    for name, parameter in zip(_names(module, optimizer), _parameters(optimizer), strict=True):
        empty[name] = {
            key: torch.empty_like(parameter, dtype=like.dtype, requires_grad=False)
            if like.shape == parameter.shape
            else torch.empty(like.shape, dtype=like.dtype)
            for key, like in shapes.get(name, {}).items()
        }
    return empty


def load_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, stored: Mapping[str, Any]) -> list[int]:
    """Load what :func:`optimizer_state` returned.

    The groups may be cut otherwise (tensor parallelism cuts them by device mesh), as long as each parameter has the
    settings it had, and this optimiser was made with the same.

    Returns:
        For each group of ``optimizer``, the number of a stored group with its settings.

    Raises:
        CheckpointError: It is of other parameters, a group here mixes parameters that had different settings, or the
            settings are others now.
    """
    names = _names(module, optimizer)
    source = {name: i for i, group in enumerate(stored["param_groups"]) for name in group["params"]}
    if source.keys() != set(names):
        differing = ", ".join(sorted(source.keys() ^ set(names))[:5])
        raise CheckpointError(f"the checkpoint's optimiser is of other parameters than this one: {differing}")
    groups, sources = [], []
    for own in optimizer.state_dict()["param_groups"]:
        candidates = {source[names[i]] for i in own["params"]}
        settings = [
            {key: value for key, value in stored["param_groups"][i].items() if key != "params"}
            for i in sorted(candidates)
        ]
        if any(other != settings[0] for other in settings):
            raise CheckpointError(
                f"the checkpoint's optimiser has different settings for parameters of one group: {settings}; "
                "start with the model.optimizer that the run was started with (weight_decay, router_lr_scale)"
            )
        _refuse_changes(settings[0], own)
        sources.append(min(candidates))
        implementation = {key: own[key] for key in _IMPLEMENTATION if key in own}
        groups.append({**settings[0], **implementation, "params": own["params"]})
    state = {i: stored["state"][name] for i, name in enumerate(names) if stored["state"].get(name)}
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return sources


def _refuse_changes(stored: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise where a run would go on with other settings than its configuration names.

    The learning rate is the peak: what a group began with, before its schedule.
    """
    peak = {"lr": "initial_lr" if "initial_lr" in own and "initial_lr" in stored else "lr"}
    for name in ("lr", "betas", "eps", "weight_decay"):
        key = peak.get(name, name)
        before, now = (tuple(x) if isinstance(x, list) else x for x in (stored[key], own[key]))
        if before != now:
            raise CheckpointError(
                f"the run was begun with {name} {before}, and this start has {now}; leave model.optimizer as it was, "
                "or begin a new run from its weights (mhf export, then mhf fit --model.init_from FILE)"
            )


def regroup_scheduler(state: dict[str, Any], sources: list[int]) -> None:
    """Convert, in place, a learning-rate schedule's values by group to the groups here.

    Args:
        state: Of a ``torch.optim.lr_scheduler``.
        sources: From :func:`load_optimizer`.
    """
    for key in ("base_lrs", "_last_lr", "lr_lambdas"):
        if key in state:
            state[key] = [state[key][i] for i in sources]
