"""The LightningModule: loss over global valid tokens, optimiser, schedule, and what a checkpoint must hold."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from mhf_kernels import FlashMHF
from torch import Tensor

from mhf_lightning.callbacks.deferred import HostCopy
from mhf_lightning.callbacks.exact_resume import ExactResume
from mhf_lightning.metrics import TokenPerplexity
from mhf_lightning.model import Decoder, DecoderConfig
from mhf_lightning.model.checkpointing import ActivationCheckpointing
from mhf_lightning.model.loss import LossSums
from mhf_lightning.model.parallel import broadcast_weights, shard, split_heads
from mhf_lightning.training.gradients import Gradients, ParameterGradients, ZeroGradients
from mhf_lightning.training.optimizer import OptimizerConfig, ScheduleConfig, build_adamw, leave_out_on_device
from mhf_lightning.training.ranks import data_parallel_group, data_parallel_ranks, sum_over_ranks
from mhf_lightning.training.weights import check_architecture, check_config, load_weights, warn_of_other_tokens


class NonFiniteError(RuntimeError):
    """Loss or gradients were NaN or infinite more often in a row than ``max_skipped_steps`` allows."""


@dataclass
class _Step:
    """An optimiser step of which the host does not know yet whether it was left out.

    Attributes:
        number: Steps before it.
        measured: Loss and gradient norm, and 1 where they had it left out, else 0; the last one is that of all ranks.
        window: Of each micro-batch ``[nll, tokens]`` and sample_index, on the device.
    """

    number: int
    measured: HostCopy
    window: list[tuple[Tensor, Tensor]]


class PretrainModule(LightningModule):
    """Next-token pretraining of a :class:`~mhf_lightning.model.Decoder`.

    The loss of an optimiser step is the sum of the token losses over all ranks and micro-batches, divided by the
    number of tokens that have a target. Each micro-batch contributes its plain sum; the gradients are divided once,
    before clipping, when the number of tokens is known. So the result is the same however tokens are dealt to ranks.

    A step whose loss or gradient norm is NaN or infinite on any rank is left out on all of them, without a trace in
    weights or optimiser; the schedule and the data go on. Where the optimiser decides that on the device (torch's
    fused AdamW, that is on GPUs without DeepSpeed), the host hears of it before the next update, a save, a validation
    and the end of training: counters, warning and error come at most one step later, with the number of their own.
    """

    def __init__(
        self,
        decoder: DecoderConfig,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 - never changed
        schedule: ScheduleConfig = ScheduleConfig(),  # noqa: B008
        z_loss: float = 0.0,
        compile_blocks: bool = False,
        activation_checkpointing: ActivationCheckpointing = "none",
        fully_checkpointed_blocks: int = 0,
        max_skipped_steps: int = 3,
        tune_kernels: bool = False,
        init_from: Optional[str] = None,  # noqa: UP045 - the CLI evaluates annotations, also on Python 3.10
    ) -> None:
        """Build the model.

        Args:
            decoder: Architecture.
            optimizer: AdamW's settings.
            schedule: Learning rate over the run.
            z_loss: Weight of the mean squared log-normaliser of the softmax, added to the loss; 0 turns it off.
            compile_blocks: Compile every block with torch.compile; checkpoint keys stay the same.
            activation_checkpointing: What each block keeps for its backward: ``none`` everything, ``full`` its input,
                ``ffn`` also the output of FlashMHF's op, ``selective`` that of attention too.
            fully_checkpointed_blocks: First blocks that keep their input only, whatever activation_checkpointing says.
            max_skipped_steps: Steps with a loss or gradient that is not finite to leave out in a row before the run
                stops with an error; 0 stops at the first.
            tune_kernels: Measure the tiles of FlashMHF's Triton kernels before training instead of taking them from the
                shipped table: minutes, on one rank, which tells the others.
            init_from: A safetensors file of ``mhf import`` or ``mhf export``: the weights to start from in place of
                random ones. ``mhf`` does not read it where it is given a checkpoint.
        """
        super().__init__()
        if z_loss < 0:
            raise ValueError(f"z_loss is {z_loss}; it must be 0 or more")
        if max_skipped_steps < 0:
            raise ValueError(f"max_skipped_steps is {max_skipped_steps}; it must be 0 or more")
        self.decoder = Decoder(decoder)
        self.decoder.set_activation_checkpointing(activation_checkpointing, fully_checkpointed_blocks)
        self.optimizer_config = optimizer
        self.schedule_config = schedule
        self.z_loss = z_loss
        self.compile_blocks = compile_blocks
        self.activation_checkpointing = activation_checkpointing
        self.fully_checkpointed_blocks = fully_checkpointed_blocks
        self.max_skipped_steps = max_skipped_steps
        self.tune_kernels = tune_kernels
        self.init_from = init_from
        self.val_perplexity = TokenPerplexity()
        self.initial_validation: dict[str, float] = {}
        self.validated_step = 0
        self.tokens_seen = 0
        self.skipped_steps = 0
        self._skipped_in_a_row = 0
        self._model_configured = False
        self.step_loss: Tensor | None = None  # of the last optimiser step, over all ranks; on the device
        self.step_grad_norm: Tensor | None = None  # the same, before clipping
        self.step_left_out: Tensor | None = None  # 1 where the step was left out, else 0; the same on all ranks
        self._uncounted: _Step | None = None  # the last step, until the host knows of it
        self._positions_per_batch = 0
        self._window: list[tuple[Tensor, Tensor]] = []  # ([nll, tokens] float64, sample_index) of each micro-batch
        self._stop_is_due = False  # when the step is done

    def configure_callbacks(self) -> list[Callback]:
        """Bring the callback without which a resume would not be exact."""
        return [ExactResume()]

    def setup(self, stage: str) -> None:
        """Check that trainer, data and model fit.

        Raises:
            ValueError: The dataset's tokens do not fit into the model's vocabulary, or clipping is set on the trainer.
        """
        if self.trainer.gradient_clip_val is not None:
            raise ValueError("trainer.gradient_clip_val is set; set model.optimizer.grad_clip instead")
        manifest = getattr(getattr(self.trainer, "datamodule", None), "manifest", None)
        vocab_size = self.decoder.config.vocab_size
        if manifest is not None and manifest.vocab_size > vocab_size:
            raise ValueError(
                f"the dataset's tokenizer has {manifest.vocab_size} tokens, but model.decoder.vocab_size is "
                f"{vocab_size}; set it to {manifest.vocab_size} or more, or prepare the data with a smaller tokenizer"
            )
        if manifest is not None and self.init_from is not None:
            path: Any = self.trainer.datamodule.path  # type: ignore[attr-defined]
            warn_of_other_tokens(Path(self.init_from), Path(path) / manifest.tokenizer.file)

    def configure_model(self) -> None:
        """Take the weights to start from, then split, compile and shard the blocks, once, as options and strategy say.

        Raises:
            ValueError: The weights are of another model, it cannot be split like this, or options exclude each other.
        """
        if self._model_configured:
            return
        mesh: Any = self.device_mesh  # of FSDP2 and tensor parallelism, else None
        self.check_compiling(
            zero_stage_3=getattr(self.trainer.strategy, "zero_stage_3", False),
            tensor_parallel=1 if mesh is None else mesh["tensor_parallel"].size(),
        )
        self._model_configured = True
        if self.init_from is not None:
            load_weights(self.decoder, Path(self.init_from))
        if mesh is not None:
            broadcast_weights(self.decoder, self.trainer.strategy.root_device)
            split_heads(self.decoder, mesh["tensor_parallel"])
        for block in self.decoder.blocks:
            if self.compile_blocks:
                block.compile(fullgraph=True)
        if mesh is not None:
            in_bf16 = str(self.trainer.precision).startswith("bf16")
            shard(self.decoder, mesh["data_parallel"], torch.bfloat16 if in_bf16 else None)

    def on_fit_start(self) -> None:
        """Forget what a fit that was interrupted has left, and tune the kernels where that is asked for.

        Raises:
            ValueError: There is nothing to tune: no FlashMHF, or no GPU.
        """
        self._window, self._uncounted, self._stop_is_due = [], None, False
        if not self.tune_kernels:
            return
        d_h = {layer.d_h for layer in self.decoder.modules() if isinstance(layer, FlashMHF)}
        if not d_h or self.device.type != "cuda":
            raise ValueError("model.tune_kernels is for FlashMHF layers on a GPU; turn it off")
        from mhf_kernels.tune import tune_on_one_rank

        dtype = torch.bfloat16 if str(self.trainer.precision).startswith("bf16") else torch.float32
        tune_on_one_rank(d_h.pop(), dtype, log=rank_zero_info)

    def on_train_start(self) -> None:
        """Validate first where that was due after the step that training continues from, but came after its save.

        Lightning takes such a validation as done; if the run was killed in it, its point would be missing.
        """
        loop: Any = self.trainer.fit_loop.epoch_loop
        is_due = loop.restarting and loop._should_check_val_fx(self.trainer.fit_loop._data_fetcher)
        if is_due and self.validated_step < self.trainer.global_step:
            loop.val_loop.restarting = False  # from its first batch
            self.trainer.validating = True
            loop.val_loop.run()
            self.trainer.training = True

    def check_compiling(self, zero_stage_3: bool, tensor_parallel: int) -> None:
        """Refuse what torch.compile cannot do (torch 2.11 to 2.13).

        Args:
            zero_stage_3: Whether DeepSpeed shards the weights.
            tensor_parallel: GPUs over which heads are split.

        Raises:
            ValueError: Blocks are to be compiled, and cannot be.
        """
        if not self.compile_blocks:
            return
        if zero_stage_3:
            raise ValueError("model.compile_blocks does not work with ZeRO-3, whose hooks break the graph; turn it off")
        if tensor_parallel > 1 and (self.activation_checkpointing in ("ffn", "full") or self.fully_checkpointed_blocks):
            raise ValueError(
                "model.compile_blocks with tensor parallelism does not work with blocks that do not keep attention's "
                "output; set model.activation_checkpointing to selective or none, and "
                "model.fully_checkpointed_blocks to 0"
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW and the schedule, stepped after every optimiser step."""
        optimizer = build_adamw(self.decoder, self.optimizer_config)
        schedule, steps = self.schedule_config, self.trainer.max_steps
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined] # a trial may end within the warm-up
            steps = max(steps, schedule.warmup_steps + schedule.decay_steps)
        factor = schedule.factor(steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the logits ``[B, L, vocab_size]`` of ``input_ids [B, L]``."""
        logits = self.decoder(input_ids)
        assert isinstance(logits, Tensor)
        return logits

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
        """Return the micro-batch's summed loss over its number of positions (the step divides by tokens instead)."""
        sums = self.loss_sums(batch)
        seen = torch.stack((sums.nll.detach().double(), sums.num_tokens.double()))
        self._window.append((seen, batch["sample_index"]))
        loss = sums.nll if not self.z_loss else sums.nll + self.z_loss * sums.squared_log_z
        return loss / batch["labels"].numel()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Divide the gradients by the global number of tokens, clip their global norm, and log the step.

        What is not finite is left out, by the optimiser on the device where it can. The host then waits for what was
        queued before the last step's update only, so the device always has nearly a step's work before it; else it
        waits for this step's gradients, and the device for the host.

        Raises:
            NonFiniteError: More steps in a row than allowed were not finite; the message names their last samples.
        """
        if self.trainer.fit_loop._should_accumulate():
            return  # DeepSpeed asks after every micro-batch
        self._count_step()  # before anything else: an error has to come before this update
        window, self._window = self._window, []
        totals = torch.stack([seen for seen, _ in window]).sum(0)
        totals = sum_over_ranks(totals, data_parallel_group(self.trainer))
        loss, num_tokens = totals[0] / totals[1].clamp_min(1), totals[1].clamp_min(1)

        # Backward has summed losses over positions, averaged over micro-batches and data-parallel ranks.
        _, ranks = data_parallel_ranks(self.trainer)
        terms = self._positions_per_batch * self.trainer.accumulate_grad_batches * ranks
        gradients = self._gradients()
        norm = gradients.norm() * terms / num_tokens
        max_norm = self.optimizer_config.grad_clip or float("inf")
        left_out = sum_over_ranks((loss + norm).isfinite().logical_not().double()).clamp_max(1.0)
        skipped_steps = self.skipped_steps + left_out  # with this one
        self._uncounted = _Step(self.trainer.global_step, HostCopy(torch.stack((loss, norm, left_out))), window)
        if leave_out_on_device(optimizer, left_out) or self._count_step():
            gradients.scale(terms / num_tokens * (max_norm / (norm + 1e-6)).clamp_max(1.0))
        else:
            gradients.drop()
        self.step_loss, self.step_grad_norm, self.step_left_out = loss, norm, left_out
        # No step waits for the device here: without prog_bar Lightning makes no numbers of tensors at its end, and what
        # the host knows stays a tensor of the host, where a float would be copied to the device.
        self.log("train/loss", loss.float())
        self.log("train/perplexity", loss.exp().float())
        self.log_dict({f"train/{key}": value.float() for key, value in self._bits_per_byte(loss, "train").items()})
        self.log("train/grad_norm", norm.float())
        self.log("train/lr", torch.tensor(optimizer.param_groups[0]["lr"], dtype=torch.float64))
        self.log("train/tokens", torch.tensor(self.tokens_seen, dtype=torch.float64))
        self.log("train/skipped_steps", skipped_steps.float())

    def _gradients(self) -> Gradients:
        zero_optimizer = getattr(self.trainer.model, "optimizer", None)  # the model is DeepSpeed's engine, if any
        if hasattr(zero_optimizer, "averaged_gradients"):
            return ZeroGradients(zero_optimizer)
        return ParameterGradients(self.decoder.parameters())

    def _count_step(self) -> bool:
        """Hear of the last step, unless that was done before; return False and count it where it was left out.

        All ranks hear the same.

        Raises:
            NonFiniteError: It is one too many (a collective: the message names the samples of all ranks).
        """
        step, self._uncounted = self._uncounted, None
        if step is None:
            return True
        loss, norm, left_out = step.measured.read().tolist()
        if not left_out:
            self._skipped_in_a_row = 0
            return True
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        what = f"step {step.number}: loss {loss}, gradient norm {norm}"
        if self._skipped_in_a_row <= self.max_skipped_steps:
            rank_zero_warn(
                f"{what}: left out, {self._skipped_in_a_row} in a row of at most {self.max_skipped_steps}",
                category=RuntimeWarning,
            )
            return False
        samples = [(sample, bool(seen[0].isfinite())) for seen, ids in step.window for sample in ids.tolist()]
        gathered: list[Any] = [samples]
        if dist.is_available() and dist.is_initialized():
            gathered = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, samples)
        every = {sample for part in gathered for sample, _ in part}
        bad = {sample for part in gathered for sample, finite in part if not finite}  # none where only gradients are
        raise NonFiniteError(
            f"{what}; {self._skipped_in_a_row} in a row are more than model.max_skipped_steps, which is "
            f"{self.max_skipped_steps}. Samples (sample_index) of "
            f"{'the micro-batches whose loss is not finite' if bad else 'the step'}: "
            f"{', '.join(map(str, sorted(bad or every)))}. Weights and optimiser are those before these steps"
        )

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Remember the size of a micro-batch, the same for all of a run, and count tokens over all ranks.

        The last step's gradients go now; Lightning would hold them through the forward, at whose end memory peaks.
        """
        if not self._window:
            # Not the decoder's: after a forward without a backward, FSDP2's root shows gathered parameters, whose
            # gradients are always None, in place of those that the optimiser updates.
            self.trainer.optimizers[0].zero_grad()
        self._positions_per_batch = batch["labels"].numel()
        self.tokens_seen += self._positions_per_batch * data_parallel_ranks(self.trainer)[1]

    def on_train_batch_end(self, *_: Any) -> None:
        """After the last step ask Lightning to stop, before which it validates (and logs), whatever the interval.

        Who asks within a step (``trainer.max_time``) is heard at its end: else its first micro-batches would be lost.
        """
        trainer = self.trainer
        if trainer.fit_loop._should_accumulate():
            self._stop_is_due |= trainer.should_stop
            trainer.should_stop = False
            return
        trainer.should_stop |= self._stop_is_due
        if 0 < trainer.max_steps <= trainer.global_step and trainer.enable_validation:
            trainer.should_stop = True

    def on_validation_start(self) -> None:
        """Count the last step before its validation."""
        self._count_step()

    def on_train_epoch_end(self) -> None:
        """Count the last step; callbacks take ``on_train_end``, which is later, for a good end."""
        self._count_step()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add a batch to the validation perplexity."""
        sums = self.loss_sums(batch)
        self.val_perplexity.update(sums.nll, sums.num_tokens)

    def on_validation_epoch_end(self) -> None:
        """Log loss, perplexity and bits per byte; the pass before training is logged as step 0."""
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
        values |= self._bits_per_byte(values["loss"], "validation")
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

    def _bits_per_byte(self, loss: Tensor, split: str) -> dict[str, Tensor]:
        """Return a loss in bits per byte, by the mean number of bytes of a split's tokens, where that is known."""
        manifest = getattr(getattr(self.trainer, "datamodule", None), "manifest", None)
        if manifest is None:
            return {}
        counts = manifest.splits[split]
        return {"bits_per_byte": loss / math.log(2) * (counts.tokens / counts.text_bytes)}

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
        self._count_step()
        checkpoint["decoder_config"] = self.decoder.config.to_dict()
        checkpoint["schedule_steps"] = self.schedule_config.length(self.trainer.max_steps)
        checkpoint["tokens_seen"] = self.tokens_seen
        # Not under "skipped_steps": DeepSpeed keeps a count of its own by that name among these values.
        checkpoint["non_finite_steps"] = {"total": self.skipped_steps, "in_a_row": self._skipped_in_a_row}
        checkpoint["initial_validation"] = self.initial_validation
        checkpoint["validated_step"] = self.validated_step

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the weights of another architecture, and restore the counters.

        Raises:
            ValueError: Keys or shapes differ; the message lists them.
        """
        check_architecture(self.state_dict(), checkpoint["state_dict"])
        check_config(self.decoder.config, checkpoint["decoder_config"])
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            now = self.schedule_config.length(self.trainer.max_steps)
            before = checkpoint.get("schedule_steps", now)  # older ones do not tell
            if now != before:
                rank_zero_info(
                    f"the learning-rate schedule has {now:,} steps, and had {before:,} when the checkpoint was saved; "
                    f"--model.schedule.total_steps {before} keeps it as it was"
                )
        self.tokens_seen = checkpoint.get("tokens_seen", 0)
        skipped = checkpoint.get("non_finite_steps", {"total": 0, "in_a_row": 0})
        self.skipped_steps, self._skipped_in_a_row = skipped["total"], skipped["in_a_row"]
        self.initial_validation = checkpoint.get("initial_validation", {})
        self.validated_step = checkpoint.get("validated_step", checkpoint["global_step"])
