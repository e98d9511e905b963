"""Which tokens of a batch belong together: padding and packed documents, read once before the layers.

Mixers only ever see rows whose real tokens stand at the front. A padded row is thereby the row alone (`RowLayout`), and a
packed document is a row of its own, beside documents of similar length (`PackedLayout`).
"""

from dataclasses import dataclass

import torch


def _mask_rows(x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Zeros in x (rows, columns, ...) where keep (rows, columns) is False."""
    return x.masked_fill(~keep.view(*keep.shape, *[1] * (x.dim() - 2)), 0)


@dataclass
class Rows:
    """Rows cut out of a (batch, seq_len) input, their real tokens at the front.

    Attributes:
        index: (rows, columns), which token of the flattened input stands there.
        real: (rows, columns) bool, False behind a row's last token.
    """

    index: torch.Tensor
    real: torch.Tensor

    @property
    def lengths(self) -> torch.Tensor:
        """Real tokens of every row, (rows,)."""
        return self.real.sum(1)

    def to_rows(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, seq_len, ...) to (rows, columns, ...), zero behind a row's last token."""
        return _mask_rows(x.flatten(0, 1)[self.index], self.real)


@dataclass
class RowLayout(Rows):
    """A padded batch, every row with its real tokens at the front: the layers run on those rows.

    Attributes:
        inverse: (batch, seq_len), where in the flattened rows a token went.
        tokens: (batch, seq_len) bool, False for padding.
    """

    inverse: torch.Tensor
    tokens: torch.Tensor

    def from_rows(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, columns, ...) to (batch, seq_len, ...), zero where there is padding."""
        return _mask_rows(x.flatten(0, 1)[self.inverse], self.tokens)

    def shift_labels(self, labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
        """For every token the label of the next token of its row, (batch, seq_len); padding and last tokens are ignored."""
        rows = labels.flatten()[self.index].masked_fill(~self.real, ignore_index)
        rows = torch.cat([rows[:, 1:], torch.full_like(rows[:, :1], ignore_index)], 1)
        return rows.flatten()[self.inverse].masked_fill(~self.tokens, ignore_index)


@dataclass
class PackedLayout:
    """Packed documents: layers run on the batch as it is, and only mixers on the documents, a group of them at a time.

    The documents of a group differ in length by less than a factor of two, so its rows hold less than twice their tokens.

    Attributes:
        groups: the documents as rows.
        members: of every group, which documents its rows are, (rows,) int64.
        where: (real tokens,), their places in the flattened input, document after document.
        document: (real tokens,), the document of each.
        tokens: (batch, seq_len) bool, False for padding.
    """

    groups: list[Rows]
    members: list[torch.Tensor]
    where: torch.Tensor
    document: torch.Tensor
    tokens: torch.Tensor

    def from_rows(self, x: torch.Tensor) -> torch.Tensor:
        """What the layers made of a batch, with zeros for padding."""
        return _mask_rows(x, self.tokens)

    def shift_labels(self, labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
        """For every token the label of the next token of its document, (batch, seq_len); last tokens are ignored."""
        following = labels.flatten()[self.where].roll(-1)
        ends = self.document != self.document.roll(-1)
        ends[-1:] = True
        shifted = torch.full_like(labels.flatten(), ignore_index)
        shifted[self.where] = following.masked_fill(ends, ignore_index)
        return shifted.view_as(labels)


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
        # no look at the values, among which 0 and -inf would be read the wrong way round
        if attention_mask.is_floating_point():
            raise ValueError(
                f"attention_mask is {attention_mask.dtype}; in a compiled call it must be bool or of integers, 1 for tokens and 0 "
                "for padding. Additive masks are not supported."
            )
        return tokens
    questions = [tokens.all(), ((attention_mask == 0) | (attention_mask == 1)).all()]
    if past_lengths is not None and attention_mask.shape[1] > seq_len:
        seen = attention_mask[:, :-seq_len].sum(1) if seq_len else attention_mask.sum(1)
        fits = seen.shape == past_lengths.shape
        questions.append((seen == past_lengths.to(seen.device)).all() if fits else tokens.new_zeros(()))
    is_full, is_mask, *agrees = torch.stack(questions).tolist()  # at once: a GPU has to answer
    if not is_mask:
        raise ValueError("attention_mask must hold only 0 (padding) and 1 (token); additive masks are not supported.")
    if not all(agrees):
        raise ValueError(
            f"attention_mask counts {seen.tolist()} tokens in the past, the cache has seen {past_lengths.tolist()}. "
            "Past tokens can't be masked later: pass the mask that they were read with."
        )
    return None if is_full else tokens


def read_layout(
    tokens, like, position_ids=None, seq_idx=None, cu_seq_lens=None, has_past=False
) -> RowLayout | PackedLayout | None:
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
    if tokens is None and position_ids is None and seq_idx is None and cu_seq_lens is None:
        return None
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
            f"{first} starts a new document inside a call that continues a cache. Packed documents need a call "
            "without cache; a new sequence needs a new (or reset) cache."
        )
    return _packed_layout(breaks, padding, batch, seq_len)


def _padding_layout(tokens) -> RowLayout:
    batch, seq_len = tokens.shape
    rows = torch.arange(batch, device=tokens.device)[:, None] * seq_len
    order = (~tokens).to(torch.uint8).argsort(dim=1, stable=True)
    rank = (tokens.cumsum(1) - 1).clamp(min=0)
    real = torch.arange(seq_len, device=tokens.device) < tokens.sum(1, keepdim=True)
    return RowLayout(rows + order, real, rows + rank, tokens)


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


def _packed_layout(breaks, padding, batch, seq_len) -> PackedLayout:
    device = breaks.device
    if padding is None:
        padding = _padding_layout(torch.ones(batch, seq_len, dtype=torch.bool, device=device))
    starts = (breaks | (torch.arange(seq_len, device=device) == 0))[padding.real]  # breaks are in the rows' order
    where = padding.index[padding.real]  # real tokens, row after row, as indices into the flattened input
    document = starts.cumsum(0) - 1
    rank = torch.arange(len(where), device=device)
    offset = rank - rank[starts][document]
    sizes = document.bincount()
    buckets = torch.tensor([(size - 1).bit_length() for size in sizes.tolist()], device=device)  # 1, 2, 3-4, 5-8, ...
    groups, members = [], []
    for bucket in buckets.unique().tolist():
        chosen = (buckets == bucket).nonzero().squeeze(-1)
        row = torch.zeros_like(sizes).index_copy(0, chosen, torch.arange(len(chosen), device=device))
        inside = buckets[document] == bucket
        shape = (len(chosen), int(sizes[chosen].max()))
        index = torch.zeros(shape, dtype=torch.int64, device=device)
        real = torch.zeros(shape, dtype=torch.bool, device=device)
        place = row[document[inside]], offset[inside]
        index[place], real[place] = where[inside], True
        groups.append(Rows(index, real))
        members.append(chosen)
    return PackedLayout(groups, members, where, document, padding.tokens)
