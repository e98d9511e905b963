"""Windows of a stream of tokens to train on, and windows made of it that teach a model to look back."""

from pathlib import Path

import numpy as np
import torch


class TokenWindows(torch.utils.data.Dataset):
    """Fixed-length windows of a token file.

    Args:
        path: a file of uint16 token ids.
        seq_len: tokens per window.
        length: number of windows. More than the file holds starts another pass with other borders.
        seed: of the order; None for evenly spread windows in the order of the text.
    """

    def __init__(self, path: Path, seq_len: int, length: int, seed: int | None):
        self.tokens = np.memmap(path, dtype=np.uint16, mode="r")
        self.seq_len, self.length, self.seed = seq_len, length, seed
        self.per_pass = (len(self.tokens) + 1) // seq_len - 1  # leaves room to shift the borders by seq_len - 1
        if self.per_pass < 1:
            raise SystemExit(f"{len(self.tokens)} tokens are too few for windows of --seq-len {seq_len}.")
        self._order = (None, None, None)  # number of the pass, its permutation, its shift

    def __len__(self):
        return self.length

    def _start(self, index: int) -> int:
        if self.seed is None:
            return index * self.per_pass // self.length * self.seq_len
        number, position = divmod(index, self.per_pass)
        if self._order[0] != number:
            rng = np.random.default_rng((self.seed, number))
            self._order = (number, rng.permutation(self.per_pass), int(rng.integers(self.seq_len)))
        return int(self._order[1][position]) * self.seq_len + self._order[2]

    def _read(self, index: int) -> np.ndarray:
        start = self._start(index)
        return self.tokens[start : start + self.seq_len].astype(np.int64)

    def __getitem__(self, index):
        ids = torch.from_numpy(self._read(index))
        return {"input_ids": ids, "labels": ids.clone()}


class RecallWindows(TokenWindows):
    """As `TokenWindows`, but among the first windows are some that can be predicted only from their own past.

    In the first quarter of them every other one is made of blocks of tokens drawn at random from the texts, each twice, one
    behind the other: a model learns to copy from near. Blocks have up to 4 tokens at first and up to 64 in the end; at once it
    is not learned. Of the rest 15 in 100 are such blocks, and 50 in 100 are text into which a few phrases of random tokens are
    strewn, again and again: whoever remembers them can continue them, near or far behind.

    Args:
        path, seq_len, length, seed: of `TokenWindows`, the seed an int.
        recall: so many of the windows are the first ones; 0: all are plain.
    """

    SHORTEST, LONGEST = 4, 64  # the greatest length of a block, at the beginning and at the end of the first quarter

    def __init__(self, path: Path, seq_len: int, length: int, seed: int, recall: int):
        super().__init__(path, seq_len, length, seed)
        self.recall = recall

    def _draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Tokens from anywhere in the texts, each for itself."""
        return self.tokens[rng.integers(0, len(self.tokens), count)].astype(np.int64)

    def _twice(self, rng: np.random.Generator, longest: int) -> np.ndarray:
        blocks, have = [], 0
        while have < self.seq_len:
            blocks += [self._draw(rng, int(rng.integers(2, longest + 1)))] * 2
            have += 2 * len(blocks[-1])
        return np.concatenate(blocks)

    def _strewn(self, rng: np.random.Generator, text: np.ndarray) -> np.ndarray:
        phrases = [self._draw(rng, int(rng.integers(3, 8))) for _ in range(int(rng.integers(2, 7)))]
        parts, start = [], 0
        while start < len(text):
            stop = start + int(rng.integers(4, 60))
            parts += [text[start:stop], phrases[int(rng.integers(len(phrases)))]]
            start = stop
        return np.concatenate(parts)

    def _read(self, index):
        text = super()._read(index)
        if index >= self.recall:
            return text
        rng = np.random.default_rng((self.seed, index, 1))
        kind, begun = rng.random(), 4 * index / self.recall
        twice, strewn, longest = 0.15, 0.5, self.LONGEST
        if begun < 1:
            twice, strewn, longest = 0.5, 0.0, int(self.SHORTEST * (self.LONGEST / self.SHORTEST) ** begun)
        if kind < twice:
            text = self._twice(rng, longest)
        elif kind < twice + strewn:
            text = self._strewn(rng, text)
        return text[: self.seq_len]
