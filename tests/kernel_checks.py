"""What the tests of kernels share: where they run, memory that shows what was not written, and one measure of error."""

import importlib.util
from contextlib import contextmanager

import pytest
import torch


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@contextmanager
def poisoned():
    """Memory that was allocated and never written holds NaN, or the largest integer."""
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def rel_error(got, want):
    """Root mean square error relative to ``want``: one number, whatever the scale."""
    assert got.shape == want.shape
    assert got.isfinite().all()
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-12)).item()
