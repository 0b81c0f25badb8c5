"""These tests run in Triton's interpreter, which must be chosen before triton is imported: see ../test_triton.py."""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
