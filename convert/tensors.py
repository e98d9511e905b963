"""Tensors that are read in stretches: what a conversion moves, never whole in memory unless they have to be computed.

All of them are seen as flat sequences of elements in row-major order, so rows of one tensor, seen in another shape or put
one after the other, are stretches again.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod

import torch


CHUNK = 1 << 20  # elements that are in memory at once


class Stretch:
    """A tensor to be read: `shape`, `dtype`, and `read`."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def read(self, begin: int, end: int) -> Iterator[torch.Tensor]:
        """Elements [begin, end) of the flattened tensor, in flat tensors one after the other."""
        raise NotImplementedError

    def whole(self) -> torch.Tensor:
        """The tensor in memory."""
        return torch.cat([part.clone() for part in self.read(0, self.numel)]).view(self.shape)


@dataclass
class Assembled(Stretch):
    """Rows of other tensors, each (tensor, first row, last row + 1), one after the other; in the widest of their dtypes."""

    shape: tuple[int, ...]
    parts: list[tuple[Stretch, int, int]]

    @property
    def dtype(self) -> torch.dtype:
        dtype = self.parts[0][0].dtype
        for part, _, _ in self.parts[1:]:
            dtype = torch.promote_types(dtype, part.dtype)
        return dtype

    def read(self, begin, end):
        at = 0
        for part, first, last in self.parts:
            row = prod(part.shape[1:])
            start, stop = max(begin, at), min(end, at + (last - first) * row)
            if start < stop:
                offset = first * row - at
                for piece in part.read(start + offset, stop + offset):
                    yield piece.to(self.dtype)
            at += (last - first) * row


@dataclass
class Computed(Stretch):
    """A tensor that `make` returns in blocks, one after the other when flattened; made anew whenever it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Iterable[torch.Tensor]]

    def read(self, begin, end):
        at = 0
        for block in self.make():
            if at < end and begin < at + block.numel():
                yield block.to(self.dtype).reshape(-1)[max(begin - at, 0) : end - at]
            at += block.numel()
        if at != self.numel:
            raise ValueError(f"a tensor of shape {self.shape} was announced, {at} elements were made.")
