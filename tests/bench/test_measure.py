"""What the benchmarks say of the machine and the code."""

import errno

import pytest
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


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("--steps is 0"), "error: --steps is 0"),
        (
            FileExistsError(errno.EEXIST, "File exists", "a.png"),
            "error: a.png: it is there already",
        ),
        (
            FileNotFoundError(errno.ENOENT, "No such file", "a.csv"),
            "error: a.csv: No such file",
        ),
        (FileExistsError("out exists; name another --output"), "error: out exists; name another --output"),
    ],
)
def test_what_is_wrong_is_one_line_without_numbers_of_the_system(error, said, capsys):
    assert measure.refuse(error) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(said)
    assert printed.count("\n") == 1
