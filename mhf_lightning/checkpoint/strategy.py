"""The mixins that give Lightning's strategies the checkpoints of this package, and the strategy of a single device.

Knows Lightning; imports the other modules of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from mhf_lightning.checkpoint.files import CheckpointError
from mhf_lightning.checkpoint.folder import Manifest, abandon, begin, commit, sync_and_list, temporary, verify
from mhf_lightning.checkpoint.shards import (
    TRAINER,
    Ranks,
    Reader,
    SaveOptions,
    Saver,
    after_commit,
    read_trainer,
    snapshot,
    write,
)
from mhf_lightning.checkpoint.state import (
    empty_optimizer_state,
    encode,
    load_optimizer,
    optimizer_state,
    regroup_scheduler,
)


class CommittedCheckpoints(Strategy):
    """What all kinds of checkpoints share: who saves, that a save is waited for, and verification before loading.

    Attributes:
        kind: As in the manifest.
        on_commit: Called on every rank with the step of a checkpoint that is committed now, maybe by another thread.
    """

    kind: str
    on_commit: Callable[[int], None] = staticmethod(lambda step: None)

    @cached_property
    def ranks(self) -> Ranks:
        """The processes that save together; first asked for by all of them at the same time."""
        return Ranks()

    @cached_property
    def saver(self) -> Saver:
        """Runs the saves."""
        return Saver()

    def wait_for_save(self) -> None:
        """Return when no save is running.

        Raises:
            CheckpointError: The last one failed.
        """
        self.saver.wait()

    def teardown(self) -> None:
        """Let a running save end before the process group goes."""
        try:
            self.wait_for_save()
        finally:
            super().teardown()

    def verified(self, path: Any) -> tuple[Path, Manifest]:
        """Let rank 0 choose and verify the folder, for all ranks.

        Raises:
            CheckpointError: It is damaged, or of a strategy whose checkpoints this one cannot read.
        """

        def check() -> tuple[Path, Manifest]:
            manifest = verify(path)
            if manifest.kind != self.kind:
                raise CheckpointError(
                    f"{path} is a {manifest.kind} checkpoint, {type(self).__name__} reads {self.kind} ones: continue "
                    "it with a strategy of that kind"
                )
            return Path(path), manifest

        return self.ranks.first(check)

    def about(self, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """What the manifest tells people."""
        data = checkpoint.get("TokenDataModule", {})
        return {
            "strategy": type(self).__name__,
            "ranks": self.ranks.size,
            "torch": torch.__version__,
            "tokens_seen": checkpoint.get("tokens_seen"),
            "consumed_samples": data.get("consumed_samples"),
        }


class ShardedCheckpoints(CommittedCheckpoints):
    """Saves and loads the sharded format, under any layout of parameters. Goes before a Lightning strategy's class."""

    kind = "sharded"
    _reader: Reader | None = None

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning asks for the optimiser's state after the model's."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Tensor]:
        """The model's own tensors and DTensors, uncopied."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The optimiser's state by names of parameters, uncopied."""
        assert self.lightning_module is not None
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        return optimizer_state(self.lightning_module, optimizer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Save a trainer's state (a collective).

        Where the previous save in the background has failed, this one is waited for: if it succeeds, nothing is lost,
        and a warning names the one that is missing.

        Args:
            checkpoint: What Lightning collected.
            filepath: The folder to become.
            storage_options: :class:`~mhf_lightning.checkpoint.shards.SaveOptions`; by default nothing is pruned, and
                the save is done when this returns.

        Raises:
            CheckpointError: It failed.
        """
        options, ranks, failure = storage_options or SaveOptions(), self.ranks, None
        try:
            self.saver.wait()
        except CheckpointError as error:
            failure, options = error, replace(options, background=False)
        rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
        state = {f"model/{name}": tensor for name, tensor in checkpoint["state_dict"].items()}
        rest["optimizer_states"] = []
        for i, optimizer in enumerate(checkpoint.get("optimizer_states", [])):
            plain: dict[str, dict[str, Any]] = {}
            for name, values in optimizer["state"].items():
                for key, value in values.items():
                    if isinstance(value, Tensor):
                        state[f"optimizer/{i}/{name}/{key}"] = value
                    else:
                        plain.setdefault(name, {})[key] = value
            rest["optimizer_states"].append({"state": plain, "param_groups": optimizer["param_groups"]})
        tensors: dict[str, Tensor] = {}
        content = snapshot(state, (encode(rest, "trainer", tensors), tensors), ranks)
        if options.background:
            content = self.saver.staging.copy(content)
        path, step, about = Path(filepath), checkpoint["global_step"], self.about(checkpoint)

        def save() -> None:
            write(path, content, step, about, ranks, options)
            self.on_commit(step)

        self.saver.run(save, options.background)
        if failure is not None:
            rank_zero_warn(f"{path} is saved, but the checkpoint before it is missing: {failure}")

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Verify a checkpoint and read all but its tensors, which follow when Lightning asks for them."""
        path, manifest = self.verified(checkpoint_path)
        self._reader = Reader(path)
        checkpoint = read_trainer(path)
        if checkpoint.get("global_step") != manifest.step:
            raise CheckpointError(f"{path / TRAINER} is of step {checkpoint.get('global_step')}, not {manifest.step}")
        checkpoint["state_dict"] = self._reader.shapes("model/")
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Fill the model's tensors in place."""
        assert self.lightning_module is not None
        self._open_reader.load({f"model/{name}": value for name, value in self.lightning_module.state_dict().items()})

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimisers, laid out as their parameters are here."""
        module, reader = self.lightning_module, self._open_reader
        assert module is not None
        for i, (optimizer, stored) in enumerate(zip(self.optimizers, checkpoint["optimizer_states"], strict=True)):
            shapes: dict[str, dict[str, Tensor]] = {}
            for path, like in reader.shapes(f"optimizer/{i}/").items():
                name, _, key = path.rpartition("/")
                shapes.setdefault(name, {})[key] = like
            state = empty_optimizer_state(module, optimizer, shapes)
            reader.load({f"optimizer/{i}/{n}/{key}": value for n, s in state.items() for key, value in s.items()})
            whole = {name: {**values, **stored["state"].get(name, {})} for name, values in state.items()}
            sources = load_optimizer(module, optimizer, {"state": whole, "param_groups": stored["param_groups"]})
            regroup_scheduler(checkpoint["lr_schedulers"][i], sources)  # Lightning loads the schedules after this
        reader.close()

    @property
    def _open_reader(self) -> Reader:
        assert self._reader is not None
        return self._reader


class DeepSpeedCheckpoints(CommittedCheckpoints):
    """Commits and verifies the files that DeepSpeed writes. They are pickles, read by DeepSpeed: trust their source.

    A save is not in the background, and a checkpoint continues on the same number of ranks and ZeRO stage only.
    """

    kind = "deepspeed"

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Let DeepSpeed write into the temporary folder, then commit it (a collective)."""
        options, ranks = storage_options or SaveOptions(), self.ranks
        path = Path(filepath)
        ranks.first(lambda: begin(path) and None)
        try:
            ranks.every(
                lambda: cast(Any, super(DeepSpeedCheckpoints, self)).save_checkpoint(checkpoint, temporary(path))
            )
            about, step = self.about(checkpoint), checkpoint["global_step"]
            ranks.first(lambda: commit(path, Manifest(step, "deepspeed", sync_and_list(temporary(path)), about)))
        except CheckpointError:
            if ranks.rank == 0:
                abandon(path)
            raise
        ranks.first(lambda: after_commit(path, options))
        self.on_commit(checkpoint["global_step"])

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Verify the files, then let DeepSpeed load them."""
        assert self.lightning_module is not None
        path, _ = self.verified(checkpoint_path)
        optimizer: Any = getattr(self.lightning_module.trainer.model, "optimizer", None)
        if optimizer is not None and not hasattr(optimizer, "_restore_from_bit16_weights"):
            # Under ZeRO-3 without training there are no float32 copies to restore, but DeepSpeed 0.19 asks for it.
            optimizer._restore_from_bit16_weights = lambda: None
        rest = super().load_checkpoint(path, weights_only=weights_only)
        return {**rest, "state_dict": self.lightning_module.state_dict()}  # which DeepSpeed has filled by now


class MHFSingleDevice(ShardedCheckpoints, SingleDeviceStrategy):
    """One process on one device."""
