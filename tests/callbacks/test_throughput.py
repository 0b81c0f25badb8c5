"""Tokens per second against a fake clock: the first batch and validation do not count."""

from types import SimpleNamespace

import pytest
import torch

from mhf_lightning.callbacks.throughput import Throughput

BATCH = {"labels": torch.zeros(2, 50)}


def test_rate_is_tokens_over_training_time(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(Throughput, "_now", staticmethod(lambda module: clock.now))
    loop = SimpleNamespace(_should_accumulate=lambda: False)
    trainer = SimpleNamespace(global_step=0, log_every_n_steps=2, fit_loop=loop, sanity_checking=False)
    trainer.strategy = SimpleNamespace(distributed_sampler_kwargs={"rank": 0, "num_replicas": 3})
    logged = []
    module = SimpleNamespace(log=lambda tag, value, **_: logged.append((tag, value)))
    meter = Throughput()

    def step(seconds: float) -> None:
        clock.now += seconds
        trainer.global_step += 1
        meter.on_train_batch_end(trainer, module, None, BATCH, 0)

    step(100.0)  # compilation
    step(1.0)
    assert logged == [("throughput/tokens_per_s", pytest.approx(300.0))]
    step(1.0)
    meter.on_validation_start(trainer, module)
    clock.now += 50.0
    meter.on_validation_end(trainer, module)
    step(2.0)
    assert logged[-1][1] == pytest.approx(150.0)
    meter.on_train_end(trainer, module)
    assert meter.tokens_per_s == pytest.approx(3 * 300 / 4.0)
