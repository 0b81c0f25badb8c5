"""How TensorBoard shows a run: charts that belong together, curves against tokens, and a line in its table of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from mhf_lightning.callbacks import is_logging_step, write_points
from mhf_lightning.callbacks.deferred import Deferring, HostCopy
from mhf_lightning.callbacks.router_health import SCALARS
from mhf_lightning.callbacks.throughput import PHASES
from mhf_lightning.model import Decoder, count_parameters
from mhf_lightning.training.module import PretrainModule

TOKENS_FOLDER = "tokens"


def _chart(*tags: str) -> list[Any]:
    return ["Multiline", list(tags)]


# Tab "Custom scalars": category -> chart -> tags (regular expressions).
CHARTS = {
    "learning": {
        "loss": _chart("train/loss", "val/loss"),
        "perplexity": _chart("train/perplexity", "val/perplexity"),
        "bits per byte": _chart("train/bits_per_byte", "val/bits_per_byte"),
        "gradient norm": _chart("train/grad_norm", "health/grad_norm/.*"),
        "loss spikes": _chart("health/loss_spike"),
        "update to weight": _chart("health/update_to_weight"),
        "learning rate": _chart("train/lr"),
    },
    "speed": {
        "tokens per second": _chart("throughput/tokens_per_s", "throughput/tokens_per_s_average"),
        "model FLOPs utilisation": _chart("throughput/mfu"),
        "shares of the time": _chart(*(f"time/{phase}" for phase in PHASES)),
    },
    "memory": {
        "peak over ranks, GiB": _chart("memory/peak_min_gib", "memory/peak_mean_gib", "memory/peak_max_gib"),
        "reserved over ranks, GiB": _chart(*(f"memory/peak_reserved_{of}_gib" for of in ("min", "mean", "max"))),
        "peak by phase, GiB": _chart("memory/peak_in_.*"),
    },
    "routers": {name.replace("_", " "): _chart(f"router/{name}/.*") for name in SCALARS},
}


class Layout(Deferring):
    """Groups the charts, writes ``tokens/*``, and fills the tab of hyperparameters; on rank 0, and only TensorBoard's.

    The curves against tokens are event files of their own, in a folder below the logger's: TensorBoard drops all points
    of a file whose step is above that of a resume, and takes tokens for steps. A logging step costs one point more,
    which is deferred.
    """

    def __init__(self) -> None:
        super().__init__()
        self._tokens: SummaryWriter | None = None

    def on_train_start(self, trainer: Trainer, pl_module: PretrainModule) -> None:  # type: ignore[override]
        """Write the layout and the hyperparameters, and open the file of the curves against tokens."""
        writer = _writer(trainer)
        if writer is None:
            return
        writer.add_custom_scalars(CHARTS)
        experiment, start, self._end = hparams(hyperparameters(trainer, pl_module), {"hparam/val_perplexity": 0.0})
        for summary in (experiment, start):
            writer._get_file_writer().add_summary(summary)
        folder = str(Path(writer.log_dir) / TOKENS_FOLDER)
        self._tokens = SummaryWriter(folder, purge_step=pl_module.tokens_seen + 1)

    def on_train_batch_end(self, trainer: Trainer, pl_module: PretrainModule, *_: Any) -> None:  # type: ignore[override]
        """Write the loss against tokens."""
        if self._tokens is not None and is_logging_step(trainer):
            assert pl_module.step_loss is not None
            loss, tokens, writer = HostCopy(pl_module.step_loss), pl_module.tokens_seen, self._tokens
            self.defer(lambda: writer.add_scalar("tokens/train_loss", float(loss.read()), tokens))

    def on_validation_end(self, trainer: Trainer, pl_module: PretrainModule) -> None:  # type: ignore[override]
        """Write the loss against tokens, and the perplexity that the table of runs shows."""
        if self._tokens is not None:
            found = trainer.callback_metrics
            self._tokens.add_scalar("tokens/val_loss", float(found["val/loss"]), pl_module.tokens_seen)
            self._tokens.flush()
            write_points(trainer, {"hparam/val_perplexity": float(found["val/perplexity"])})

    def on_train_end(self, trainer: Trainer, pl_module: PretrainModule) -> None:  # type: ignore[override]
        """Say that the run ended well."""
        super().on_train_end(trainer, pl_module)
        writer = _writer(trainer)
        if writer is not None:
            writer._get_file_writer().add_summary(self._end)
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: PretrainModule, exception: BaseException) -> None:  # type: ignore[override]
        """Write what the files' queues hold."""
        super().on_exception(trainer, pl_module, exception)
        self._close()

    def _close(self) -> None:
        if self._tokens is not None:
            self._tokens.close()
            self._tokens = None


def hyperparameters(trainer: Trainer, module: PretrainModule) -> dict[str, str | float]:
    """Return what runs are told apart by, as a flat table."""
    config = module.decoder.config
    with torch.device("meta"):  # the module's own parameters may be a rank's part
        size = count_parameters(Decoder(config))
    ffn = {key: value for key, value in vars(config.ffn).items() if isinstance(value, str | int | float)}
    return {
        **{f"ffn/{key}": value for key, value in ffn.items()},
        "d_model": config.d_model,
        "num_layers": config.num_layers,
        "initialization": config.initialization,
        "non_embedding_parameters": size.non_embedding,
        "lr": module.optimizer_config.lr,
        "weight_decay": module.optimizer_config.weight_decay,
        "schedule": module.schedule_config.name,
        "max_steps": trainer.max_steps,
        "ranks": trainer.world_size,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "micro_batch_size": getattr(getattr(trainer, "datamodule", None), "micro_batch_size", 0),
        "precision": str(trainer.precision),
    }


def _writer(trainer: Trainer) -> SummaryWriter | None:
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                return logger.experiment
    return None
