"""What the benchmarks say of the machine and the code."""

import torch

from mhf_lightning.bench import measure


def test_visible_gpus_keep_their_names(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-3c")
    assert measure.visible_gpus() == ["5", "GPU-3c"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert measure.visible_gpus() == ["0", "1"]


def test_the_commit_is_given_or_that_of_the_checkout(monkeypatch, tmp_path):
    monkeypatch.setenv("MHF_COMMIT", "0123456789abcdef0123456789abcdef01234567-dirty")
    assert measure.commit() == "0123456789ab-dirty"  # forty digits would be taken for a secret
    monkeypatch.delenv("MHF_COMMIT")
    monkeypatch.setattr(measure, "__file__", str(tmp_path / "measure.py"))
    assert measure.commit() is None
