"""Converts other people's checkpoints to B'MOJO models and back: `python -m convert --help`."""

from .core import Refusal
from .engine import convert


__all__ = ["Refusal", "convert"]
