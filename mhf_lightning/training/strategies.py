"""Lightning's strategies with sizes, precision, accumulation and clipping made explicit. Knows Lightning and torch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import pad

from mhf_lightning.checkpoint.strategy import DeepSpeedCheckpoints, ShardedCheckpoints

BUCKET_MIB = 100  # of torch's 25, NCCL reduces each at half its bandwidth (RING_LL, on two H200s)


class MHFDDP(ShardedCheckpoints, DDPStrategy):
    """One replica of the model per process; gradients are reduced once an optimiser step, in their buckets' memory."""

    def __init__(self, process_group_backend: str | None = None) -> None:
        """Set up the strategy.

        Args:
            process_group_backend: torch.distributed backend; null takes nccl on GPUs and gloo on CPUs.
        """
        super().__init__(
            process_group_backend=process_group_backend, gradient_as_bucket_view=True, bucket_cap_mb=BUCKET_MIB
        )

    def configure_ddp(self) -> None:
        """Wrap the model.

        Blocks are compiled one by one, so that their gradients come block by block anyhow. Dynamo would cut each in two
        for the first bucket, and keep an activation more for the backward.
        """
        from torch import _dynamo

        _dynamo.config.optimize_ddp = False
        super().configure_ddp()


class MHFFSDP2(ShardedCheckpoints, ModelParallelStrategy):
    """FSDP2: weights, gradients and optimiser state sharded over data-parallel ranks, block by block.

    With ``tensor_parallel_size`` above 1 each replica is itself split by heads over that many neighbouring ranks. With
    precision bf16-mixed or bf16-true, weights are gathered in bfloat16; gradients are always reduced in float32. During
    accumulation each rank holds whole gradients and reduces them once, in the step's last backward.
    """

    def __init__(
        self, data_parallel_size: int, tensor_parallel_size: int = 1, process_group_backend: str | None = None
    ) -> None:
        """Set up the strategy.

        Args:
            data_parallel_size: Ranks that read different data.
            tensor_parallel_size: Ranks over which heads are split; the product of both is the number of processes.
            process_group_backend: torch.distributed backend; null takes nccl on GPUs and gloo on CPUs.

        Raises:
            ValueError: A size is not positive.
        """
        if data_parallel_size < 1 or tensor_parallel_size < 1:
            raise ValueError(
                f"data_parallel_size is {data_parallel_size}, tensor_parallel_size is {tensor_parallel_size}; "
                f"both must be at least 1"
            )
        self.sizes = data_parallel_size, tensor_parallel_size
        super().__init__(
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=tensor_parallel_size,
            process_group_backend=process_group_backend,
        )

    def setup_environment(self) -> None:
        """Check the sizes, then start the process group and make the mesh.

        Raises:
            ValueError: The sizes do not multiply to the number of processes.
        """
        processes = self.num_nodes * self.num_processes
        if self.sizes[0] * self.sizes[1] != processes:
            raise ValueError(
                f"data_parallel_size {self.sizes[0]} * tensor_parallel_size {self.sizes[1]} must be the number of "
                f"processes, which is {processes} (trainer.num_nodes * trainer.devices)"
            )
        super().setup_environment()

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Leave out the reduction in every backward but the last of an optimiser step."""
        assert self.model is not None
        root = next(module for module in self.model.modules() if isinstance(module, FSDPModule))
        root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            root.set_requires_gradient_sync(True)


# Keys of DeepSpeed's config that are made from other options, and which.
GENERATED_KEYS = {
    "train_batch_size": "data.micro_batch_size and trainer.accumulate_grad_batches",
    "train_micro_batch_size_per_gpu": "data.micro_batch_size",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "gradient_clipping": "model.optimizer.grad_clip",
    "optimizer": "model.optimizer",
    "scheduler": "model.schedule",
    "bf16": "trainer.precision",
    "fp16": "trainer.precision",
    "amp": "trainer.precision",
    "torch_autocast": "trainer.precision",
    "data_types": "trainer.precision",
    "communication_data_type": "trainer.precision",
    "activation_checkpointing": "model.activation_checkpointing",
}
# bfloat16 weights beside float32 ones in the optimiser; gradients are summed in float32.
_BF16: dict[str, Any] = {
    "bf16": {"enabled": True, "check_grad_overflow": False},  # the module has looked; see ZeroGradients
    "data_types": {"grad_accum_dtype": "fp32"},
    "communication_data_type": "fp32",
}
DEEPSPEED_PRECISIONS: dict[str, dict[str, Any]] = {"32-true": {}, "bf16-mixed": _BF16, "bf16-true": _BF16}


class MHFDeepSpeed(DeepSpeedCheckpoints, DeepSpeedStrategy):
    """DeepSpeed ZeRO-2 or ZeRO-3, its config made from the Trainer and the model's options.

    Clipping and the division by the number of tokens are done by the training module, so DeepSpeed's own clipping is
    off. A checkpoint continues only on as many ranks as it was saved from.
    """

    def __init__(
        self, stage: int = 2, config: dict[str, Any] | None = None, process_group_backend: str | None = None
    ) -> None:
        """Set up the strategy.

        Args:
            stage: 2 shards gradients and optimiser state over ranks, 3 the weights too.
            config: More keys of DeepSpeed's config, for instance ``{zero_optimization: {overlap_comm: false}}``.
            process_group_backend: torch.distributed backend; null takes nccl.

        Raises:
            ValueError: The stage is neither 2 nor 3, or ``config`` sets what other options set.
        """
        if stage not in (2, 3):
            raise ValueError(f"stage is {stage}; it must be 2 or 3")
        config = dict(config or {})
        zero = dict(config.pop("zero_optimization", {}))
        twice = [f"{key} (set {GENERATED_KEYS[key]})" for key in config if key in GENERATED_KEYS]
        twice += ["zero_optimization.stage (set stage)"] if "stage" in zero else []
        if twice:
            raise ValueError(f"DeepSpeed's config holds keys that are made from other options: {', '.join(twice)}")
        offload = [f"zero_optimization.{key}" for key in zero if key.startswith("offload")]
        if offload:
            raise ValueError(f"DeepSpeed's config asks for {', '.join(offload)}, which is not supported; remove it")
        # ZeRO-2 need not take the norm again, tensor by tensor; ZeRO-3 knows no such key.
        once = {"compute_grad_norm": False} if stage == 2 else {}
        config |= {"zero_optimization": {**once, **zero, "stage": stage}, "zero_allow_untested_optimizer": True}
        super().__init__(config=config, process_group_backend=process_group_backend)

    def _format_config(self) -> None:
        """Add what the Trainer and the module say.

        Raises:
            ValueError: DeepSpeed does not know the Trainer's precision.
        """
        precision = str(self.precision_plugin.precision)
        if precision not in DEEPSPEED_PRECISIONS:
            raise ValueError(
                f"trainer.precision is {precision}; with DeepSpeed it must be one of {', '.join(DEEPSPEED_PRECISIONS)}"
            )
        assert self.lightning_module is not None
        assert isinstance(self.config, dict)
        trainer = self.lightning_module.trainer
        self.config |= {
            **DEEPSPEED_PRECISIONS[precision],
            "train_micro_batch_size_per_gpu": getattr(getattr(trainer, "datamodule", None), "micro_batch_size", 1),
            "gradient_accumulation_steps": trainer.accumulate_grad_batches,
            "gradient_clipping": 0.0,
        }

    def init_deepspeed(self) -> None:
        """Start the engine, without the warning that DeepSpeed ignores the clipping hook: it takes part here."""
        assert self.lightning_module is not None
        weights = {name: weight.detach() for name, weight in self.lightning_module.named_parameters()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Since DeepSpeed handles gradient clipping internally")
            super().init_deepspeed()
        if self.lightning_module.trainer.training:
            self._keep_in_float32(weights)

    def _keep_in_float32(self, weights: dict[str, Tensor]) -> None:
        """Give the optimiser the weights as they were; it has them rounded to bfloat16.

        Those lie where rounding begins anew, so that no step would be seen that is under half a bfloat16's: a whole
        warm-up's first steps. All ranks take those of the first, as DeepSpeed does.
        """
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        assert self.lightning_module is not None
        for name, rounded in self.lightning_module.named_parameters():
            if weights[name].dtype != torch.float32 or rounded.dtype == torch.float32:
                continue
            exact = weights.pop(name).to(self.root_device).contiguous()
            dist.broadcast(exact, src=0)
            if hasattr(rounded, "ds_tensor"):  # of ZeRO-3: this rank's part of what is filled up to equal parts
                size = rounded.ds_tensor.numel()
                filled = pad(exact.flatten(), (0, size * self.world_size - exact.numel()))
                safe_set_local_fp32_param(rounded, filled.narrow(0, self.global_rank * size, size))
            else:
                safe_set_full_fp32_param(rounded, exact)

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run the engine's backward; Lightning has divided the loss by the number of micro-batches already."""
        self.deepspeed_engine.optimizer.override_loss_scale(1.0)  # the previous step's scaling, see ZeroGradients
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)
