"""The LightningModule: loss over global valid tokens, optimiser, schedule, and what a checkpoint must hold."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from mhf_lightning.callbacks.exact_resume import ExactResume
from mhf_lightning.metrics import TokenPerplexity
from mhf_lightning.model import Decoder, DecoderConfig
from mhf_lightning.model.loss import LossSums
from mhf_lightning.training.optimizer import OptimizerConfig, ScheduleConfig, build_adamw


class PretrainModule(LightningModule):
    """Next-token pretraining of a :class:`~mhf_lightning.model.Decoder`.

    The loss of an optimiser step is the sum of the token losses over all ranks and micro-batches, divided by the
    number of tokens that have a target. Each micro-batch contributes its plain sum; the gradients are divided once,
    before clipping, when the number of tokens is known. So the result is the same however tokens are dealt to ranks.
    """

    def __init__(
        self,
        decoder: DecoderConfig,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 - never changed
        schedule: ScheduleConfig = ScheduleConfig(),  # noqa: B008
        z_loss: float = 0.0,
        compile_blocks: bool = False,
    ) -> None:
        """Build the model.

        Args:
            decoder: Architecture.
            optimizer: AdamW's settings.
            schedule: Learning rate over the run.
            z_loss: Weight of the mean squared log-normaliser of the softmax, added to the loss; 0 turns it off.
            compile_blocks: Compile every block with torch.compile; checkpoint keys stay the same.
        """
        super().__init__()
        if z_loss < 0:
            raise ValueError(f"z_loss is {z_loss}; it must be 0 or more")
        self.decoder = Decoder(decoder)
        self.optimizer_config = optimizer
        self.schedule_config = schedule
        self.z_loss = z_loss
        self.compile_blocks = compile_blocks
        self.val_perplexity = TokenPerplexity()
        self.initial_validation: dict[str, float] = {}
        self.validated_step = 0
        self.tokens_seen = 0
        self._positions_per_batch = 0
        self._window: Tensor | None = None  # [nll, tokens] of this optimiser step, this rank, float64

    def configure_callbacks(self) -> list[Callback]:
        """Bring the callback without which a resume would not be exact."""
        return [ExactResume()]

    def setup(self, stage: str) -> None:
        """Check that data and model fit, and compile the blocks.

        Raises:
            ValueError: The dataset's tokens do not fit into the model's vocabulary.
        """
        manifest = getattr(getattr(self.trainer, "datamodule", None), "manifest", None)
        vocab_size = self.decoder.config.vocab_size
        if manifest is not None and manifest.vocab_size > vocab_size:
            raise ValueError(
                f"the dataset's tokenizer has {manifest.vocab_size} tokens, but model.decoder.vocab_size is "
                f"{vocab_size}; set it to {manifest.vocab_size} or more, or prepare the data with a smaller tokenizer"
            )
        if self.compile_blocks:
            for block in self.decoder.blocks:
                block.compile(fullgraph=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW and the schedule, stepped after every optimiser step."""
        optimizer = build_adamw(self.decoder, self.optimizer_config)
        factor = self.schedule_config.factor(self.trainer.max_steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def loss_sums(self, batch: dict[str, Tensor]) -> LossSums:
        """Run the decoder on a batch of the datamodule."""
        sums = self.decoder(
            batch["input_ids"],
            batch["labels"],
            position_ids=batch.get("position_ids"),
            document_ids=batch.get("document_ids"),
        )
        assert isinstance(sums, LossSums)
        return sums

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the micro-batch's summed loss over its number of positions (see :meth:`normalize_gradients`)."""
        sums = self.loss_sums(batch)
        seen = torch.stack((sums.nll.detach().double(), sums.num_tokens.double()))
        self._window = seen if self._window is None else self._window + seen
        loss = sums.nll if not self.z_loss else sums.nll + self.z_loss * sums.squared_log_z
        return loss / batch["labels"].numel()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Divide the gradients by the global number of tokens, clip their global norm, and log the step."""
        if gradient_clip_val is not None:
            raise ValueError("trainer.gradient_clip_val is set; set model.optimizer.grad_clip instead")
        totals = self._take_window()
        self.normalize_gradients(totals[1])
        parameters = [p for p in self.decoder.parameters() if p.grad is not None]
        max_norm = self.optimizer_config.grad_clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        loss = totals[0] / totals[1].clamp_min(1)
        self.log("train/loss", loss.float(), prog_bar=True)
        self.log("train/perplexity", loss.exp().float())
        self.log("train/grad_norm", norm.float())
        self.log("train/lr", optimizer.param_groups[0]["lr"])
        self.log("train/tokens", float(self.tokens_seen))

    def normalize_gradients(self, num_tokens: Tensor) -> None:
        """Turn gradients of ``mean over ranks and micro-batches of sum / positions`` into those of the global mean.

        Args:
            num_tokens: Tokens with a target in this optimiser step over all ranks (float64 scalar).
        """
        terms = self._positions_per_batch * self.trainer.accumulate_grad_batches * self.trainer.world_size
        scale = (terms / num_tokens.clamp_min(1)).float()
        gradients = [p.grad for p in self.decoder.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, scale.to(gradients[0].device))

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Remember the size of a micro-batch, the same for all of a run, and count tokens over all ranks."""
        self._positions_per_batch = batch["labels"].numel()
        self.tokens_seen += self._positions_per_batch * self.trainer.world_size

    def _take_window(self) -> Tensor:
        assert self._window is not None
        totals, self._window = self._window, None
        return self.trainer.strategy.reduce(totals, reduce_op="sum")

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add a batch to the validation perplexity."""
        sums = self.loss_sums(batch)
        self.val_perplexity.update(sums.nll, sums.num_tokens)

    def on_validation_epoch_end(self) -> None:
        """Log loss and perplexity; the pass before training is logged as step 0."""
        self._log_evaluation("val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add a batch to the test perplexity."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log loss and perplexity."""
        self._log_evaluation("test")

    def _log_evaluation(self, name: str) -> None:
        values = self.val_perplexity.compute()
        self.val_perplexity.reset()
        if self.trainer.sanity_checking:
            self.initial_validation = {key: float(value) for key, value in values.items()}
            for logger in self.trainer.loggers:
                logger.log_metrics({f"{name}/{key}": float(value) for key, value in values.items()}, step=0)
            return
        self.validated_step = self.trainer.global_step
        # The values are already global, so there is nothing left to reduce.
        self.log_dict(
            {f"{name}/{key}": value.float() for key, value in values.items()}, prog_bar=True, rank_zero_only=True
        )

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return each block's summed negative log-likelihood (nats) and number of target tokens."""
        rows = [
            self.loss_sums({key: value[i : i + 1] for key, value in batch.items()}) for i in range(len(batch["labels"]))
        ]
        return {
            "sample_index": batch["sample_index"],
            "nll": torch.stack([row.nll for row in rows]),
            "num_tokens": torch.stack([row.num_tokens for row in rows]),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the architecture as a plain dictionary, and the counters."""
        checkpoint["decoder_config"] = self.decoder.config.to_dict()
        checkpoint["tokens_seen"] = self.tokens_seen
        checkpoint["initial_validation"] = self.initial_validation

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the weights of another architecture, and restore the counters.

        Raises:
            ValueError: Keys or shapes differ; the message lists them.
        """
        check_architecture(self.state_dict(), checkpoint["state_dict"])
        check_config(self.decoder.config, checkpoint["decoder_config"])
        self.tokens_seen = checkpoint.get("tokens_seen", 0)
        self.initial_validation = checkpoint.get("initial_validation", {})


def check_config(own: DecoderConfig, stored: dict[str, Any]) -> None:
    """Compare what changes a model's function without changing the shape of a weight.

    Raises:
        ValueError: A value differs; the message names it.
    """
    keys = ("num_attention_heads", "num_kv_heads", "rope_theta", "norm_eps", "tie_embeddings")
    ours = own.to_dict()
    differences = [f"{key}: model {ours[key]}, checkpoint {stored[key]}" for key in keys if ours[key] != stored[key]]
    if ours["ffn"]["name"] != stored["ffn"]["name"]:
        differences.append(f"ffn.name: model {ours['ffn']['name']}, checkpoint {stored['ffn']['name']}")
    if differences:
        raise ValueError(
            f"the checkpoint holds another architecture: {'; '.join(differences)}; "
            f"use the model config that the run was started with (config.yaml in its run folder)"
        )


def check_architecture(own: dict[str, Tensor], stored: dict[str, Tensor]) -> None:
    """Compare the keys and shapes of a model and a checkpoint.

    Raises:
        ValueError: They differ; the message names up to eight differences.
    """
    differences = [f"{key}: only in the model" for key in own.keys() - stored.keys()]
    differences += [f"{key}: only in the checkpoint" for key in stored.keys() - own.keys()]
    differences += [
        f"{key}: model {tuple(own[key].shape)}, checkpoint {tuple(stored[key].shape)}"
        for key in own.keys() & stored.keys()
        if own[key].shape != stored[key].shape
    ]
    if differences:
        shown = "\n  ".join(sorted(differences)[:8])
        more = f"\n  and {len(differences) - 8} more" if len(differences) > 8 else ""
        raise ValueError(
            f"the checkpoint holds another architecture:\n  {shown}{more}\n"
            f"use the model config that the run was started with (config.yaml in its run folder)"
        )
