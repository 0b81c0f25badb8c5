"""The Triton kernels on the CPU: the tests of `interpreted/`, in a process of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path


def test_the_kernels_in_the_interpreter():
    folder = Path(__file__).with_name("interpreted")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-8000:]
    assert int(re.search(r"(\d+) passed", result.stdout).group(1)) > 40
