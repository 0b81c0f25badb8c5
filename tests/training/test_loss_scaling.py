"""The gradient of a step is that of the mean over all valid tokens, however they are dealt out."""

import pytest
import torch
import torch.multiprocessing as mp
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from torch.utils.data import DataLoader, Subset

from mhf_lightning.model import Decoder, DecoderConfig, FFNConfig
from mhf_lightning.training.module import PretrainModule
from mhf_lightning.training.optimizer import OptimizerConfig, ScheduleConfig

CONFIG = DecoderConfig(vocab_size=40, d_model=16, num_layers=1, num_attention_heads=2, ffn=FFNConfig("swiglu", 24))
Z_LOSS = 0.01


def blocks() -> list[dict[str, torch.Tensor]]:
    """Twelve blocks with very unequal numbers of targets."""
    generator = torch.Generator().manual_seed(3)
    items = []
    for i in range(12):
        tokens = torch.randint(40, (9,), generator=generator)
        labels = tokens[1:].clone()
        labels[i % 7 + 1 :] = -100
        items.append({"input_ids": tokens[:-1], "labels": labels, "sample_index": torch.tensor(i)})
    return items


class Blocks(LightningDataModule):
    def __init__(self, micro_batch_size: int) -> None:
        super().__init__()
        self.micro_batch_size = micro_batch_size

    def train_dataloader(self):
        window = self.micro_batch_size * self.trainer.world_size
        start = self.micro_batch_size * self.trainer.global_rank
        mine = [i for i in range(12) if start <= i % window < start + self.micro_batch_size]
        return DataLoader(Subset(blocks(), mine), batch_size=self.micro_batch_size)


def expected_gradients() -> tuple[float, dict[str, torch.Tensor]]:
    seed_everything(5)
    decoder = Decoder(CONFIG)
    batch = {key: torch.stack([item[key] for item in blocks()]) for key in ("input_ids", "labels")}
    sums = decoder(**batch)
    ((sums.nll + Z_LOSS * sums.squared_log_z) / sums.num_tokens).backward()
    return (sums.nll / sums.num_tokens).item(), {key: p.grad for key, p in decoder.named_parameters()}


class KeepGradients(PretrainModule):
    """Records the gradients that the optimiser is about to see."""

    def configure_gradient_clipping(self, *args, **kwargs):
        super().configure_gradient_clipping(*args, **kwargs)
        self.kept = {key: p.grad.clone() for key, p in self.decoder.named_parameters()}


def check(micro_batch_size: int, accumulate: int, devices: int) -> None:
    seed_everything(5)
    module = KeepGradients(CONFIG, OptimizerConfig(grad_clip=0.0), ScheduleConfig(warmup_steps=0), z_loss=Z_LOSS)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_steps=1,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, Blocks(micro_batch_size))
    loss, gradients = expected_gradients()
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(loss, rel=1e-5)
    for key, gradient in gradients.items():
        torch.testing.assert_close(
            module.kept[key], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize(("micro_batch_size", "accumulate"), [(12, 1), (3, 4), (1, 12)])
def test_accumulation(micro_batch_size, accumulate):
    check(micro_batch_size, accumulate, devices=1)


def test_old_gradients_go_before_the_forward():
    """But those of the same step stay."""
    held = []

    class Watch(KeepGradients):
        def training_step(self, batch, batch_idx):
            held.append({p.grad is not None for p in self.decoder.parameters()})
            return super().training_step(batch, batch_idx)

    module = Watch(CONFIG, OptimizerConfig(), ScheduleConfig(warmup_steps=0))
    options = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    Trainer(accelerator="cpu", devices=1, max_steps=2, accumulate_grad_batches=3, **options).fit(module, Blocks(2))
    assert held == [{False}, {True}, {True}] * 2


def test_a_fit_that_was_interrupted_leaves_nothing_to_the_next():
    class Interrupted(KeepGradients):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("interrupted")
            return super().training_step(batch, batch_idx)

    module = Interrupted(CONFIG, OptimizerConfig(), ScheduleConfig(warmup_steps=0))
    options = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    with pytest.raises(RuntimeError, match="interrupted"):
        Trainer(accelerator="cpu", devices=1, max_steps=1, accumulate_grad_batches=3, **options).fit(module, Blocks(2))
    trainer = Trainer(accelerator="cpu", devices=1, max_steps=1, **options)
    with torch.no_grad():
        sums = module.loss_sums(next(iter(DataLoader(blocks(), 12))))
    trainer.fit(module, Blocks(12))
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(float(sums.nll / sums.num_tokens), rel=1e-5)


def test_clipping_scales_to_the_norm():
    seed_everything(5)
    module = KeepGradients(CONFIG, OptimizerConfig(grad_clip=1e-3), ScheduleConfig(warmup_steps=0), z_loss=Z_LOSS)
    options = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", devices=1, max_steps=1, **options)
    trainer.fit(module, Blocks(12))
    _, gradients = expected_gradients()
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    assert norm > 1e-2
    assert trainer.callback_metrics["train/grad_norm"].item() == pytest.approx(norm.item(), rel=1e-4)
    for key, gradient in gradients.items():
        torch.testing.assert_close(module.kept[key], gradient * (1e-3 / norm), rtol=1e-3, atol=1e-8)


def _rank(rank: int, port: int) -> None:
    import os

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", RANK=str(rank))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2", NODE_RANK="0", GROUP_RANK="0")
    os.environ["TORCHELASTIC_RUN_ID"] = "test"  # what torchrun sets: Lightning then starts no processes itself
    check(micro_batch_size=2, accumulate=3, devices=2)


@pytest.mark.slow
def test_two_ranks_with_accumulation():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_rank, args=(port,), nprocs=2)
