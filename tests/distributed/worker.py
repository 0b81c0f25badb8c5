"""One process of a distributed run: trains each of the given cases with the real Trainer and writes what came out.

Started by ``conftest.py`` as ``python worker.py CASES.json OUT_DIR`` with torchrun's variables in the environment, so
that Lightning starts no process itself. All cases of a file share the start-up.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Subset

from mhf_lightning.model import DecoderConfig, FFNConfig
from mhf_lightning.training.module import PretrainModule
from mhf_lightning.training.optimizer import OptimizerConfig, ScheduleConfig
from mhf_lightning.training.ranks import data_parallel_ranks
from mhf_lightning.training.strategies import MHFDDP, MHFFSDP2, MHFDeepSpeed

GLOBAL_MICRO_BATCH = 4
LENGTH = 8
FFN = {
    "flash_mhf": FFNConfig("flash_mhf", num_heads=4, num_subnetworks=2, d_e=8),
    "flash_mhf_grouped": FFNConfig("flash_mhf", num_heads=4, num_kuv_heads=2, num_subnetworks=2, d_e=8),
    "flash_mhf_softmax": FFNConfig("flash_mhf", num_heads=4, num_subnetworks=2, d_e=8, gate="softmax"),
    "swiglu": FFNConfig("swiglu", d_ff=24),
    "mh_ffn": FFNConfig("mh_ffn", num_heads=4, d_ff=16),
    "pkv": FFNConfig("pkv", num_heads=4, d_ff=24),
    "gated_swiglu": FFNConfig("gated_swiglu", num_subnetworks=2, d_e=12),
    "dense_moe": FFNConfig("dense_moe", num_subnetworks=2, d_e=12),
}


class CPUDeepSpeed(MHFDeepSpeed):
    """ZeRO on gloo: Lightning refuses DeepSpeed on CPUs, DeepSpeed itself does not."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", self.local_rank)

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        # Else a shared-memory collective is compiled for a minute. (`deepspeed.comm.torch` is torch itself.)
        vars(importlib.import_module("deepspeed.comm.torch"))["build_shm_op"] = lambda: None
        self.set_world_ranks()
        self._init_deepspeed_distributed()


class Blocks(LightningDataModule):
    """The same samples in the same order on any number of ranks, with very unequal numbers of targets."""

    def __init__(self, steps: int, accumulate: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.items = []
        for i in range(steps * accumulate * GLOBAL_MICRO_BATCH):
            tokens = torch.randint(40, (LENGTH + 1,), generator=generator)
            labels = tokens[1:].clone()
            labels[i % GLOBAL_MICRO_BATCH * 2 + 1 :] = -100  # 1, 3, 5 or 7 targets: ranks differ in every batch
            self.items.append({"input_ids": tokens[:-1], "labels": labels, "sample_index": torch.tensor(i)})

    def train_dataloader(self) -> DataLoader:
        rank, ranks = data_parallel_ranks(self.trainer)
        size = GLOBAL_MICRO_BATCH // ranks
        mine = [i for i in range(len(self.items)) if i % GLOBAL_MICRO_BATCH // size == rank]
        return DataLoader(Subset(self.items, mine), batch_size=size)


class Record(Callback):
    """Loss and norm of every optimiser step as logged; of every micro-batch, what its backward did to gradients."""

    def __init__(self) -> None:
        self.loss: list[float] = []
        self.grad_norm: list[float] = []
        self.reduce_scatters: list[int] = []
        self.gradients: list[int] = []
        self.barriers: list[int] = []
        self.exact_weights: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Keep what the optimiser begins with: DeepSpeed has it apart from the module's weights."""
        if isinstance(trainer.strategy, MHFDeepSpeed):
            from deepspeed.utils import safe_get_full_fp32_param

            exact = [safe_get_full_fp32_param(p) for p in pl_module.decoder.parameters()]
            self.exact_weights = [] if exact[0] is None else [bits(weight) for weight in exact]
        else:
            self.exact_weights = [bits(p) for p in pl_module.decoder.parameters() if not isinstance(p, DTensor)]

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        if isinstance(trainer.strategy, MHFDDP):
            self.gradients.append(bits(pl_module.decoder.final_norm.weight.grad))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.reduce_scatters.append(reduce_scatters.pop())
        reduce_scatters.append(0)
        self.barriers.append(barriers[0])
        if not trainer.fit_loop._should_accumulate():
            self.loss.append(trainer.callback_metrics["train/loss"].item())
            self.grad_norm.append(trainer.callback_metrics["train/grad_norm"].item())


# Calls by FSDP2 since the last micro-batch ended, and the types of the case; it calls the newer one of two functions.
reduce_scatters = [0]
reduced_types: set[str] = set()
NAME = next(n for n in ("reduce_scatter_single", "reduce_scatter_tensor") if hasattr(torch.distributed, n))
real_reduce_scatter = getattr(torch.distributed, NAME)


def counted_reduce_scatter(*args: Any, **kwargs: Any) -> Any:
    reduce_scatters[0] += 1
    reduced_types.update(str(x.dtype) for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
    return real_reduce_scatter(*args, **kwargs)


setattr(torch.distributed, NAME, counted_reduce_scatter)

# Calls by anyone, so far.
barriers = [0]
real_barrier = torch.distributed.barrier


def counted_barrier(*args: Any, **kwargs: Any) -> Any:
    barriers[0] += 1
    return real_barrier(*args, **kwargs)


torch.distributed.barrier = counted_barrier


def strategy_of(name: str, world: int) -> Any:
    """Build a strategy by its short name."""
    return {
        "single": lambda: SingleDeviceStrategy(torch.device("cpu")),
        "ddp": MHFDDP,
        "fsdp2": lambda: MHFFSDP2(world, 1),
        "tp": lambda: MHFFSDP2(1, world),
        "fsdp2_tp": lambda: MHFFSDP2(world // 2, 2),
        "wrong_sizes": lambda: MHFFSDP2(world, 2),
        "zero2": lambda: CPUDeepSpeed(2, process_group_backend="gloo"),
        "zero3": lambda: CPUDeepSpeed(3, process_group_backend="gloo"),
    }[name]()


class Poisoned(PretrainModule):
    """Makes loss or gradients of the last rank non-finite at chosen steps, and keeps weights and state around them."""

    poison: dict[str, Any]

    def configure_optimizers(self) -> Any:
        configured: Any = super().configure_optimizers()
        for group in configured["optimizer"].param_groups:
            group["fused"] = self.poison.get("fused")  # as on a GPU, where the device leaves steps out
        return configured

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        here = self.trainer.global_step in self.poison["steps"] and self.trainer.global_rank == self.poison["rank"]
        if here and self.poison["what"] in ("loss", "reported loss"):
            seen, ids = self._window[-1]
            self._window[-1] = (seen * float("nan"), ids)
            return loss * float("nan") if self.poison["what"] == "loss" else loss
        if here and self.poison["what"] == "gradient":  # the loss stays finite
            loss.register_hook(lambda grad: grad * float("inf"))
        return loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            before, self.before = getattr(self, "before", None), fingerprint(self)
            if before is not None:
                self.changed.append(before != self.before)


def fingerprint(module: PretrainModule) -> list[float]:
    """Hashes of this rank's part of all weights and optimiser states; zeros, which AdamW begins with, are none."""
    # Under ZeRO-3 a parameter holds its weight only while its module runs; ds_tensor is this rank's part.
    tensors = [getattr(p, "ds_tensor", p).detach() for p in module.decoder.parameters()]
    optimizer = module.trainer.optimizers[0]
    inner = getattr(optimizer, "optimizer", optimizer)
    for state in inner.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor) and value.any()]
    if hasattr(inner, "param_groups"):
        tensors += [p.detach() for group in inner.param_groups for p in group["params"]]
    return [bits(t.to_local() if isinstance(t, DTensor) else t) for t in tensors]


def bits(tensor: torch.Tensor) -> int:
    """Return a hash of a tensor's bytes (PYTHONHASHSEED is set, so ranks agree)."""
    return hash(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def train(case: dict[str, Any]) -> dict[str, Any]:
    """Run one case; see ``conftest.run_cases`` for its keys."""
    torch._dynamo.reset()
    counters.clear()
    world = int(os.environ["WORLD_SIZE"])
    accumulate, steps = case.get("accumulate", 3), case.get("steps", 20)
    seed_everything(5 + (int(os.environ["RANK"]) if case.get("seed_differs") else 0))
    config = DecoderConfig(
        vocab_size=40,
        d_model=32,
        num_layers=2,
        num_attention_heads=4,
        num_kv_heads=case.get("num_kv_heads"),
        ffn=FFN[case.get("ffn", "flash_mhf")],
        tie_embeddings=case.get("tie_embeddings", True),
        dropout=case.get("dropout", 0.0),
    )
    module = (Poisoned if "poison" in case else PretrainModule)(
        config,
        # With an epsilon near zero, Adam turns the rounding of gradients near zero into steps of full size.
        OptimizerConfig(lr=3e-3, eps=1e-5, grad_clip=case.get("grad_clip", 0.5)),
        ScheduleConfig(warmup_steps=2),
        z_loss=0.01,
        **case.get("module", {}),
    )
    if "poison" in case:
        module.poison, module.changed = case["poison"], []
    record = Record()
    reduced_types.clear()
    trainer = Trainer(
        accelerator="cpu",
        devices=1 if case["strategy"] == "single" else world,
        strategy=strategy_of(case["strategy"], world),
        precision=case.get("precision", "32-true"),
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        callbacks=[record],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
    )
    trainer.fit(module, Blocks(steps, accumulate))
    result = {"loss": record.loss, "grad_norm": record.grad_norm, "tokens_seen": module.tokens_seen}
    result |= {"reduce_scatters": record.reduce_scatters, "gradients": record.gradients}
    result |= {"barriers": record.barriers}
    result |= {"skipped_steps": module.skipped_steps, "reduced_types": sorted(reduced_types)}
    if "poison" in case:
        result["changed"] = module.changed
    result["exact_weights"] = record.exact_weights
    result["compiled_graphs"] = [counters["stats"]["unique_graphs"], counters["aot_autograd"]["total"]]
    whole = [p for p in module.decoder.parameters() if not isinstance(p, DTensor) or p.device_mesh.ndim == 1]
    result["whole_weights"] = [bits(p.full_tensor() if isinstance(p, DTensor) else p) for p in whole]
    return result


def main() -> None:
    """Run all cases; a case that fails is recorded with its traceback, the others go on."""
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 1024  # so that a block is larger than DDP's first bucket
    results = {}
    for name, case in cases.items():
        try:
            results[name] = train(case)
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    (out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
