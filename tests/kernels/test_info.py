"""`python -m mhf_kernels.info` tells what the dispatcher does, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from mhf_kernels import dispatch, info

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what holds without a GPU")


def run(**environment: str) -> tuple[int, str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("MHF_BACKEND", "TRITON_INTERPRET")}
    done = subprocess.run(
        [sys.executable, "-m", "mhf_kernels.info"],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def picks(printed: str) -> set[str]:
    """Every name in the table of what would be used."""
    return {word for line in printed.splitlines() if line.startswith("  d_h ") for word in line.split()[2:]}


@without_gpu
def test_versions_backends_and_reasons():
    code, printed = run()
    assert code == 0
    assert f"torch {torch.__version__}" in printed
    assert "torch sees no CUDA device" in printed
    assert "MHF_BACKEND: auto (unset)" in printed
    listed = dict(
        line.strip().split(maxsplit=1) for line in printed.split("d_h 128)\n")[1].split("\n\n")[0].splitlines()
    )
    assert list(listed) == list(dispatch.NAMES)
    assert listed["reference"] == "available"
    for name in dispatch.NAMES[:-1]:
        assert "CUDA" in listed[name] or "has no" in listed[name]
    assert picks(printed) == {"reference"}


@without_gpu
@pytest.mark.parametrize(("backend", "reason"), [("gluon", "not available here"), ("fast", "unknown; allowed: auto")])
def test_a_backend_that_is_not_there_is_an_error_with_the_reason(backend, reason):
    code, printed = run(MHF_BACKEND=backend)
    assert code == 1
    assert picks(printed) == {"none"}
    assert f"none: MHF_BACKEND={backend}" in printed
    assert reason in printed


def test_the_interpreter_counts_as_a_device():
    if "triton" not in dispatch.BACKENDS:
        pytest.skip("no triton kernels in this version")
    code, printed = run(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert code == 0
    assert picks(printed) == {"triton", "reference"}  # float64 has the reference only


def test_a_module_that_cannot_be_imported_is_a_reason(monkeypatch):
    monkeypatch.setitem(dispatch.BACKENDS, "gluon", "mhf_kernels.no_such_module")
    inputs = info.probe(torch.device("cpu"), torch.bfloat16, 64)
    assert "cannot be imported (No module named" in dispatch.why_not("gluon", *inputs)
    assert dispatch.why_not("reference", *inputs) is None
