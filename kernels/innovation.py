"""The innovation and the running choice of the largest: see `ops_bmojo.prediction_error` and `ops_bmojo.running_selection`.

A program of `prediction_error` has BLOCK_T outputs of one row and goes through their channels in blocks of BLOCK_D. The
outputs before them it reads again, from the cache. Every product and sum of a channel is rounded as in the definition.

A program of `running_selection` goes through the chunks of one row, with the memory in registers: of every place its
score, its number, how many others of the memory beat it, and how many are older. Entering tokens come BLOCK_C at a time.
What M or more beat leaves; the k-th token that stays takes the place of the one that M + k beat. Nothing is sorted, and
a tie is settled by counting the older one as the better. The chunks of a long sequence are cut into segments, whose
largest are found side by side, then merged into one another in their order, and what each segment begins with is then
known: the largest of all tokens up to one are the largest of the largest of their parts.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from .shared import Launch, namespace, on_device_of


# ----------------------------------------------------------------------------------------------------------------------
# The error of the prediction
# ----------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["seq_len", "position_stride"])
def _prediction_error_kernel(
    y_ptr,
    history_ptr,
    position_ptr,
    weight_ptr,
    error_ptr,
    seq_len,
    position_stride,
    SIZE: tl.constexpr,
    KERNEL: tl.constexpr,
    LEARNED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(seq_len, BLOCK_T)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK_T
    token = tl.arange(0, BLOCK_T)
    real = first + token < seq_len
    position = tl.load(position_ptr + row * position_stride + first + token, mask=real, other=0)
    norm = tl.zeros([BLOCK_T], dtype=tl.float32)
    for k in range(1, KERNEL + 1):
        if LEARNED:
            norm += tl.where(position >= k, 1.0 / KERNEL, 0.0)
        else:
            norm += tl.where(position >= k, tl.load(weight_ptr + k - 1).to(tl.float32), 0.0)
    norm = tl.where(norm > 0, norm, 1.0)
    inverse = tl.div_rn(1.0, norm)

    y_ptr += (row * seq_len + first) * SIZE
    history_ptr += row * KERNEL * SIZE
    error = tl.zeros([BLOCK_T], dtype=tl.float32)
    for start in range(0, SIZE, BLOCK_D):
        channel = start + tl.arange(0, BLOCK_D)
        inside = channel < SIZE
        place = token[:, None] * SIZE + channel[None, :]
        mask = real[:, None] & inside[None, :]
        total = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
        for k in tl.range(1, KERNEL + 1, loop_unroll_factor=4):
            earlier = first + token - k
            exists = real & (position >= k)
            here = (exists & (earlier >= 0))[:, None] & inside[None, :]
            past = tl.load(y_ptr + place - k * SIZE, mask=here, other=0.0).to(tl.float32)
            if first < KERNEL:
                before = (exists & (earlier < 0))[:, None] & inside[None, :]
                old = (earlier + KERNEL)[:, None] * SIZE + channel[None, :]
                past = tl.where(before, tl.load(history_ptr + old, mask=before, other=0.0).to(tl.float32), past)
            if LEARNED:
                weight = tl.load(weight_ptr + (k - 1) * SIZE + channel, mask=inside, other=0.0).to(tl.float32)
                total += past * weight[None, :]
            else:
                total += past * tl.load(weight_ptr + k - 1).to(tl.float32)
        # a quotient mended by its remainder is the exact one, without the function call of a division
        quotient = total * inverse[:, None]
        mended = tl.fma(tl.fma(-quotient, norm[:, None], total), inverse[:, None], quotient)
        quotient = tl.where(mended == mended, mended, quotient)  # infinity has no remainder
        difference = tl.load(y_ptr + place, mask=mask, other=0.0).to(tl.float32) - quotient
        error += tl.sum(difference * difference, 1)
    tl.store(error_ptr + row * seq_len + first + token, error, mask=real)


# ----------------------------------------------------------------------------------------------------------------------
# The largest so far
# ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def _load_scores(ptr, number, exists):
    """Scores in float32; NaN, like what does not exist, is the last of all."""
    score = tl.load(ptr + number, mask=exists, other=-float("inf")).to(tl.float32)
    return tl.where(score == score, score, -float("inf"))


@triton.jit(do_not_specialize=["tokens", "first", "chunk_size", "chunks", "length", "segments"])
def _running_selection_kernel(
    score_ptr,
    number_ptr,
    kept_score_ptr,
    kept_ptr,
    out_score_ptr,
    out_ptr,
    tokens,
    first,
    chunk_size,
    chunks,
    length,
    segments,
    SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVERY: tl.constexpr,
):
    """Walks one segment of `length` chunks.

    score, number: (rows, tokens); without numbers a token is its own. kept_score, kept: (rows, segments, SIZE), the
    older one first; None for a memory of nothing. out_score, out: (rows, 1 + chunks, SIZE) where EVERY, the memory before
    chunk 0 and of every chunk; else (rows, segments, SIZE), that of the segment's last chunk.
    """
    segment = tl.program_id(0) % segments
    row = (tl.program_id(0) // segments).to(tl.int64)
    place = tl.arange(0, BLOCK_M)
    is_place = place < SIZE
    entry = tl.arange(0, BLOCK_C)
    score_ptr += row * tokens
    offset = (row * segments + segment) * SIZE

    older = place  # how many of the memory are older than each
    if kept_ptr is not None:
        score = _load_scores(kept_score_ptr + offset, place, is_place)
        number = tl.load(kept_ptr + offset + place, mask=is_place, other=0)
        beaten = tl.zeros([BLOCK_M], dtype=tl.int32)  # how many of the memory beat each
        for start in range(0, SIZE, BLOCK_C):
            other = _load_scores(kept_score_ptr + offset, start + entry, start + entry < SIZE)
            beats = (other[None, :] > score[:, None]) | (
                (other[None, :] == score[:, None]) & ((start + entry)[None, :] < place[:, None])
            )
            beaten += tl.sum((beats & (start + entry < SIZE)[None, :]).to(tl.int32), 1)
    else:
        score = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
        number = tl.full([BLOCK_M], -1, dtype=tl.int64)
        beaten = place

    if EVERY and segment == 0:
        tl.store(out_ptr + row * (1 + chunks) * SIZE + place, number, mask=is_place)
        if out_score_ptr is not None:
            tl.store(out_score_ptr + row * (1 + chunks) * SIZE + place, score, mask=is_place)
    for chunk in range(segment * length, tl.minimum(segment * length + length, chunks)):
        begin = first + tl.cast(chunk, tl.int64) * chunk_size
        for start in range(0, chunk_size, BLOCK_C):
            token = begin + start + entry
            exists = (start + entry < chunk_size) & (token >= 0) & (token < tokens)
            new = _load_scores(score_ptr, token, exists)
            named = token
            if number_ptr is not None:
                named = tl.load(number_ptr + row * tokens + token, mask=exists, other=0)

            # who stays: of two equals the older one, and those of the memory are older than those that enter
            wins = (new[None, :] > score[:, None]) & is_place[:, None]
            loses = (new[None, :] <= score[:, None]) & is_place[:, None]
            earlier = entry[:, None] < entry[None, :]
            among = (new[:, None] > new[None, :]) | ((new[:, None] == new[None, :]) & earlier)
            new_beaten = tl.sum(loses.to(tl.int32), 0) + tl.sum(among.to(tl.int32), 0)
            stays = new_beaten < SIZE
            beaten += tl.sum((wins & stays[None, :]).to(tl.int32), 1)
            changes = tl.sum(stays.to(tl.int32), 0)
            if changes > 0:
                rank = tl.cumsum(stays.to(tl.int32), 0) - 1  # among those that stay, in their order
                leaves = is_place & (beaten >= SIZE)

                # what leaves is one less that is older
                gone = (beaten - SIZE)[:, None] == entry[None, :]
                age_of_gone = tl.sum(tl.where(gone & leaves[:, None], older[:, None] + 1, 0), 0)
                gone_before = (age_of_gone > 0)[None, :] & (age_of_gone[None, :] <= older[:, None])
                older -= tl.sum(gone_before.to(tl.int32), 1)

                # the k-th that stays takes the place that SIZE + k beat
                takes = (leaves[:, None] & stays[None, :]) & ((beaten - SIZE)[:, None] == rank[None, :])
                score = tl.where(leaves, tl.sum(tl.where(takes, new[None, :], 0.0), 1), score)
                number = tl.where(leaves, tl.sum(tl.where(takes, named[None, :], 0), 1), number)
                older = tl.where(leaves, SIZE - changes + (beaten - SIZE), older)
                beaten = tl.where(leaves, tl.sum(tl.where(takes, new_beaten[None, :], 0), 1), beaten)
        if EVERY:
            to = (row * (1 + chunks) + 1 + chunk) * SIZE + older
            tl.store(out_ptr + to, number, mask=is_place)
            if out_score_ptr is not None:
                tl.store(out_score_ptr + to, score, mask=is_place)
    if not EVERY:
        tl.store(out_ptr + offset + older, number, mask=is_place)
        tl.store(out_score_ptr + offset + older, score, mask=is_place)


# ----------------------------------------------------------------------------------------------------------------------
# Launches
# ----------------------------------------------------------------------------------------------------------------------


# the sums of a channel are those of the definition, bit for bit: no fused multiply-add
_ERROR = {"BLOCK_T": 16, "num_warps": 8, "enable_fp_fusion": False}
_BLOCK_D = {2: 128, 4: 64}  # by bytes per number
# (BLOCK_C, num_warps) by the largest BLOCK_M
_BLOCKS = {32: (32, 1), 64: (16, 2), 128: (32, 4), 256: (32, 8), 512: (16, 8), 1024: (8, 8)}


@functools.cache
def settings(size: int) -> dict:
    """Constants and options of a launch of `running_selection`, by the size of the memory: never by a length."""
    block_m = triton.next_power_of_2(size)
    if block_m > max(_BLOCKS):
        raise ValueError(
            f"eidetic_size is {size}; the kernel of the selection has room for {max(_BLOCKS)}. "
            "BMOJO_KERNELS=torch does without."
        )
    block_c, num_warps = _BLOCKS[min(largest for largest in _BLOCKS if largest >= block_m)]
    return {"SIZE": size, "BLOCK_M": block_m, "BLOCK_C": block_c, "num_warps": num_warps}


_NAMESPACE = namespace(__name__)


@torch.library.custom_op(f"{_NAMESPACE}::prediction_error", mutates_args=())
def _prediction_error(
    y: torch.Tensor, history: torch.Tensor, positions: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    y, history, positions, weights = (tensor.contiguous() for tensor in (y, history, positions, weights))
    rows, seq_len, size = y.shape
    errors = y.new_empty(rows, seq_len, dtype=torch.float32)
    with on_device_of(y):
        _prediction_error_kernel[triton.cdiv(seq_len, _ERROR["BLOCK_T"]) * rows,](
            y,
            history,
            positions,
            weights,
            errors,
            seq_len=seq_len,
            position_stride=seq_len if positions.shape[0] > 1 else 0,
            SIZE=size,
            KERNEL=weights.shape[0],
            LEARNED=weights.dim() == 2,
            BLOCK_D=_BLOCK_D[y.element_size()],
            **_ERROR,
        )
    return errors


@_prediction_error.register_fake
def _(y, history, positions, weights):
    return y.new_empty(y.shape[:2], dtype=torch.float32)


def prediction_error(y, history, positions, weights):
    """See `ops_bmojo.prediction_error`; without gradients."""
    return _prediction_error(y, history, positions, weights)


@torch.library.custom_op(f"{_NAMESPACE}::running_selection", mutates_args=())
def _running_selection(
    scores: torch.Tensor, kept_scores: torch.Tensor, kept: torch.Tensor, first: int, chunk_size: int, chunks: int
) -> torch.Tensor:
    scores, kept_scores, kept = (tensor.contiguous() for tensor in (scores, kept_scores, kept))
    (rows, tokens), size = scores.shape, kept.shape[1]
    chosen = settings(size)
    found = kept.new_empty(rows, 1 + chunks, size)
    # as many steps in the walks through segments, of which there are two, as in the merge of segments
    length = max(1, math.isqrt(chunks * size // (2 * chunk_size)))
    segments = triton.cdiv(chunks, length)
    if segments <= 2:
        length, segments = chunks, 1
    sizes = {"first": first, "chunk_size": chunk_size, "chunks": chunks, "length": length, "segments": segments}
    with on_device_of(scores):
        if segments > 1:
            best = kept.new_empty(rows, segments, size)
            best_scores = scores.new_empty(best.shape, dtype=torch.float32)
            _running_selection_kernel[segments * rows,](
                scores, None, None, None, best_scores, best, tokens=tokens, **sizes, EVERY=False, **chosen
            )
            starts, start_scores = torch.empty_like(best), torch.empty_like(best_scores)
            _running_selection_kernel[rows,](
                best_scores,
                best,
                kept_scores,
                kept,
                start_scores,
                starts,
                tokens=segments * size,
                first=0,
                chunk_size=size,
                chunks=segments - 1,
                length=segments - 1,
                segments=1,
                EVERY=True,
                **chosen,
            )
            kept_scores, kept = start_scores, starts
        _running_selection_kernel[segments * rows,](
            scores, None, kept_scores, kept, None, found, tokens=tokens, **sizes, EVERY=True, **chosen
        )
    return found


@_running_selection.register_fake
def _(scores, kept_scores, kept, first, chunk_size, chunks):
    return kept.new_empty(kept.shape[0], 1 + chunks, kept.shape[1])


def running_selection(scores, kept_scores, kept, first: int, chunk_size: int, chunks: int):
    """See `ops_bmojo.running_selection`. NaN counts as -inf."""
    return _running_selection(scores, kept_scores, kept, first, chunk_size, chunks)


def launches(itemsize: int, architecture: str):
    """What `compile_report.py` compiles: errors with fixed and learned weights, memories of all settings, and the three walks."""
    types = {"position_ptr": "*i64", "weight_ptr": "*fp32", "error_ptr": "*fp32"}
    for learned in (False, True):
        chosen = {"SIZE": 1024, "KERNEL": 8, "LEARNED": learned, "BLOCK_D": _BLOCK_D[itemsize]} | _ERROR
        name = f"{_prediction_error_kernel.__name__} {'learned' if learned else 'fixed'}"
        yield Launch(name, _prediction_error_kernel, types, chosen)
    if itemsize != 4:  # scores are in float32 always
        return
    types = dict.fromkeys(("score_ptr", "kept_score_ptr", "out_score_ptr"), "*fp32")
    types |= dict.fromkeys(("number_ptr", "kept_ptr", "out_ptr"), "*i64")
    walks = {
        "parts": (False, {"number_ptr": None, "kept_score_ptr": None, "kept_ptr": None}),
        "merge": (True, {}),
        "all": (True, {"number_ptr": None, "out_score_ptr": None}),
    }
    for size in (16, 64, 100, 128, 256, 512, 1024):
        for walk, (every, absent) in walks.items():
            name = f"{_running_selection_kernel.__name__} {size} {walk}"
            yield Launch(name, _running_selection_kernel, types | absent, {"EVERY": every} | settings(size))
