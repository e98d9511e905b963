"""Which tokens of a batch belong together: padding and packed documents, read once and taken away before the layers.

The layers only ever see rows whose real tokens stand at the front: `RowLayout` moves the tokens there and back. A padded
row is thereby the row alone, and a packed document is a row of its own.
"""

from dataclasses import dataclass

import torch


@dataclass
class RowLayout:
    """Where the tokens of a (batch, seq_len) input stand in the rows that the layers see.

    Attributes:
        index: (rows, columns), which token of the flattened input stands there.
        real: (rows, columns) bool, False behind a row's last token.
        inverse: (batch, seq_len), where in the flattened rows a token went.
        tokens: (batch, seq_len) bool, False for padding.
        packed: rows are documents, not rows of the batch.
    """

    index: torch.Tensor
    real: torch.Tensor
    inverse: torch.Tensor
    tokens: torch.Tensor
    packed: bool

    @property
    def lengths(self) -> torch.Tensor:
        """Real tokens of every row, (rows,)."""
        return self.real.sum(1)

    def to_rows(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, seq_len, ...) to (rows, columns, ...), zero behind a row's last token."""
        rows = x.flatten(0, 1)[self.index]
        return rows.masked_fill(~self.real.view(*self.real.shape, *[1] * (rows.dim() - 2)), 0)

    def from_rows(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, columns, ...) to (batch, seq_len, ...), zero where there is padding."""
        back = x.flatten(0, 1)[self.inverse]
        return back.masked_fill(~self.tokens.view(*self.tokens.shape, *[1] * (back.dim() - 2)), 0)

    def shift_labels(self, labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
        """For every token the label of the next token of its row or document, (batch, seq_len).

        Ignored are padding, and the last token of every row or document, which nothing follows.
        """
        rows = labels.flatten()[self.index].masked_fill(~self.real, ignore_index)
        rows = torch.cat([rows[:, 1:], torch.full_like(rows[:, :1], ignore_index)], 1)
        return rows.flatten()[self.inverse].masked_fill(~self.tokens, ignore_index)


def read_mask(attention_mask, batch: int, seq_len: int, past_columns: int, past_lengths=None):
    """Check a 2-D padding mask and return its part for the new tokens, bool (batch, seq_len), or None for no padding.

    Raises:
        ValueError: the mask has another shape or other values than 0 and 1, or contradicts what the cache has seen.
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        shape = (
            tuple(attention_mask.shape) if isinstance(attention_mask, torch.Tensor) else type(attention_mask).__name__
        )
        raise ValueError(
            f"attention_mask must be 2-D (batch, seq_len) with 1 for tokens and 0 for padding, got {shape}. B'MOJO makes the "
            "causal and window masks itself; for packed documents pass seq_idx, cu_seq_lens_q or position_ids."
        )
    if attention_mask.shape not in ((batch, seq_len), (batch, past_columns + seq_len)):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected ({batch}, {seq_len}) for the new tokens"
            + (
                f" or ({batch}, {past_columns + seq_len}) with the {past_columns} in the cache."
                if past_columns
                else "."
            )
        )
    tokens = attention_mask[:, attention_mask.shape[1] - seq_len :].bool()
    if torch.compiler.is_compiling():
        return tokens
    if not ((attention_mask == 0) | (attention_mask == 1)).all():
        raise ValueError("attention_mask must hold only 0 (padding) and 1 (token); additive masks are not supported.")
    if past_lengths is not None and attention_mask.shape[1] > seq_len:
        seen = attention_mask[:, :-seq_len].sum(1) if seq_len else attention_mask.sum(1)
        if not torch.equal(seen.to(past_lengths), past_lengths):
            raise ValueError(
                f"attention_mask counts {seen.tolist()} tokens in the past, past_key_values has seen {past_lengths.tolist()}. "
                "Past tokens can't be masked later: pass the mask that they were read with."
            )
    return None if bool(tokens.all()) else tokens


def read_layout(tokens, like, position_ids=None, seq_idx=None, cu_seq_lens=None, has_past=False) -> RowLayout | None:
    """Find padding and document boundaries.

    Args:
        tokens: (batch, seq_len) bool from `read_mask`, or None.
        like: any tensor (batch, seq_len, ...): shape and device of the input.
        position_ids: (batch or 1, seq_len); a step that is not + 1 starts a document. Where they start is no matter.
        seq_idx: (batch, seq_len), the number of a token's document.
        cu_seq_lens: (documents + 1,), where documents begin in a batch of one row, and its length.
        has_past: tokens came before, in a cache.

    Returns:
        The layout, or None where every row is one document without padding.

    Raises:
        ValueError: shapes do not fit, or the ways of saying it contradict each other.
    """
    batch, seq_len = like.shape[:2]
    device = like.device
    padding = None if tokens is None else _padding_layout(tokens)
    boundaries = {
        "position_ids": _from_positions(position_ids, batch, seq_len, padding),
        "seq_idx": _from_documents(seq_idx, batch, seq_len, padding),
        "cu_seq_lens": _from_offsets(cu_seq_lens, batch, seq_len, padding, device),
    }
    said = {name: breaks.to(device) for name, breaks in boundaries.items() if breaks is not None}
    if not any(breaks.any() for breaks in said.values()):
        return padding
    (first, breaks), *others = said.items()
    for name, other in others:
        if not torch.equal(breaks, other):
            raise ValueError(
                f"{first} and {name} put document boundaries at different tokens; pass one of them, or fix one."
            )
    if has_past:
        raise ValueError(
            f"{first} starts a new document inside a call that continues past_key_values. Packed documents need a call "
            "without cache; a new sequence needs a new (or reset) cache."
        )
    return _packed_layout(breaks, padding, batch, seq_len)


def _padding_layout(tokens) -> RowLayout:
    batch, seq_len = tokens.shape
    rows = torch.arange(batch, device=tokens.device)[:, None] * seq_len
    order = (~tokens).to(torch.uint8).argsort(dim=1, stable=True)
    rank = (tokens.cumsum(1) - 1).clamp(min=0)
    real = torch.arange(seq_len, device=tokens.device) < tokens.sum(1, keepdim=True)
    return RowLayout(rows + order, real, rows + rank, tokens, packed=False)


def _check_shape(name, value, batch, seq_len):
    if value.shape not in ((batch, seq_len), (1, seq_len)):
        raise ValueError(f"{name} has shape {tuple(value.shape)}, the input is (batch {batch}, seq_len {seq_len}).")
    return value.expand(batch, seq_len)


def _compacted(values, padding):
    """The values in the order of the rows' real tokens, and where two neighbours are both real."""
    if padding is None:
        return values, torch.ones_like(values[:, 1:], dtype=torch.bool)
    return values.flatten()[padding.index], padding.real[:, 1:]


def _from_positions(position_ids, batch, seq_len, padding):
    """(batch, seq_len) bool, where a document begins in a compacted row (never at 0)."""
    if position_ids is None:
        return None
    values, both = _compacted(_check_shape("position_ids", position_ids, batch, seq_len), padding)
    step = values[:, 1:] - values[:, :-1]
    breaks = (step != 1) & both
    if torch.compiler.is_compiling():
        if seq_len > 1:
            torch._assert_async(~breaks.any(), "position_ids that restart (packed documents) need an uncompiled call")
        return None
    if ((step > 1) & both).any():
        raise ValueError(
            "position_ids jump forward by more than 1. B'MOJO counts tokens itself, so gaps can't be honoured: positions must rise by "
            "1 inside a document and fall where the next one begins."
        )
    return torch.cat([torch.zeros_like(breaks[:, :1]), breaks], 1)


def _from_documents(seq_idx, batch, seq_len, padding):
    if seq_idx is None:
        return None
    values, both = _compacted(_check_shape("seq_idx", seq_idx, batch, seq_len), padding)
    breaks = (values[:, 1:] != values[:, :-1]) & both
    return torch.cat([torch.zeros_like(breaks[:, :1]), breaks], 1)


def _from_offsets(cu_seq_lens, batch, seq_len, padding, device):
    if cu_seq_lens is None:
        return None
    if batch != 1 or padding is not None:
        raise ValueError(
            "cu_seq_lens describe one flattened row without padding: pass a batch of 1 and no attention_mask."
        )
    offsets = cu_seq_lens.to(device, torch.int64)
    if (
        offsets.dim() != 1
        or not len(offsets)
        or offsets[0] != 0
        or offsets[-1] != seq_len
        or (offsets.diff() < 0).any()
    ):
        raise ValueError(f"cu_seq_lens must rise from 0 to seq_len {seq_len}, got {cu_seq_lens.tolist()}.")
    breaks = torch.zeros(1, seq_len, dtype=torch.bool, device=device)
    inner = offsets[(offsets > 0) & (offsets < seq_len)]
    breaks[0, inner] = True
    return breaks


def _packed_layout(breaks, padding, batch, seq_len) -> RowLayout:
    device = breaks.device
    if padding is None:
        tokens = torch.ones(batch, seq_len, dtype=torch.bool, device=device)
        padding = _padding_layout(tokens)
    starts = (breaks | (torch.arange(seq_len, device=device) == 0)) & padding.real  # in compacted order
    where = padding.index[padding.real]  # real tokens, row after row, as indices into the flattened input
    starts = starts[padding.real]
    document = starts.cumsum(0) - 1
    rank = torch.arange(len(where), device=device)
    offset = rank - rank[starts][document]
    rows, columns = (int(document[-1]) + 1, int(offset.max()) + 1) if len(where) else (0, 0)
    index = torch.zeros(rows, columns, dtype=torch.int64, device=device)
    real = torch.zeros(rows, columns, dtype=torch.bool, device=device)
    index[document, offset], real[document, offset] = where, True
    inverse = torch.zeros(batch * seq_len, dtype=torch.int64, device=device)
    inverse[where] = document * columns + offset
    return RowLayout(index, real, inverse.view(batch, seq_len), padding.tokens, packed=True)
