"""Packages of the extras, without which some tests have nothing to test."""

import importlib.util
import os

import pytest


def is_missing(package: str) -> bool:
    """Say whether to leave tests out; CI installs every extra, so there it is an error."""
    missing = importlib.util.find_spec(package) is None
    if missing and os.environ.get("CI") == "true":
        raise pytest.UsageError(f"CI=true, and {package} is not installed: its tests must not be skipped (make test)")
    return missing


def need(package: str) -> None:
    """Skip a test or a module without the package, as :func:`is_missing` says."""
    if is_missing(package):
        pytest.skip(f"needs {package}", allow_module_level=True)
