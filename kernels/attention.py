"""Attention over window, fading tokens and eidetic memory in one pass: see `ops_bmojo.memory_attention`.

Queries of one key-value head are taken as one sequence of seq_len * GROUP rows, row r being token r // GROUP and head
r % GROUP of the group, so that a program loads every key once for the whole group. A program has BLOCK_M rows and goes
through the keys of the three spans in blocks of BLOCK_N, with one running softmax; what no row of it can see it does
not visit. Positions count from the first query of the call; keys before it have negative ones.

The backward pass is deterministic. Keys of window and fading tokens collect their gradients from the rows that see
them. An entry of the memory is seen by the queries of many chunks: every chunk writes what it has for its places, and
each entry then adds up its places in their order, which a stable sort gives.
"""

import functools

import torch
import triton
import triton.language as tl

from .shared import Launch, architecture, dot, namespace, on_device_of


LOG2E = 1.4426950408889634
_LOG2E = tl.constexpr(LOG2E)
_LOWEST = tl.constexpr(-3e38)  # below every score: a maximum of nothing, from which exp2 yields 0 and no NaN


# ----------------------------------------------------------------------------------------------------------------------
# Blocks
# ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def _load(ptr, numbers, stride, exists, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a matrix by their numbers, (numbers, BLOCK_D); 0 where none exists and beyond column D.

    Numbers that are not bounded by the size of a block come in int64.
    """
    column = tl.arange(0, BLOCK_D)
    mask = exists[:, None] if D == BLOCK_D else exists[:, None] & (column < D)[None, :]
    return tl.load(ptr + numbers[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def _store(ptr, numbers, stride, exists, block, D: tl.constexpr, BLOCK_D: tl.constexpr):
    column = tl.arange(0, BLOCK_D)
    mask = exists[:, None] if D == BLOCK_D else exists[:, None] & (column < D)[None, :]
    tl.store(ptr + numbers[:, None] * stride + column[None, :], block.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _program(blocks, KV_HEADS: tl.constexpr):
    """This program's block, key-value head and row of the batch; neighbours share keys."""
    program = tl.program_id(0)
    head = program // blocks % KV_HEADS
    return program % blocks, head, (program // blocks // KV_HEADS).to(tl.int64)


@triton.jit
def _first_position(past_ptr, row, before):
    """The position of the first key that exists, of a span with so many keys before the first query."""
    if past_ptr is not None:
        before = tl.minimum(tl.load(past_ptr + row), before).to(tl.int32)
    return -before


@triton.jit
def _see_near(token, position, newest, window):
    age = token[:, None] - position[None, :] - newest
    return (age >= 0) & (age < window)


@triton.jit
def _near_keys(key_ptr, value_ptr, start, stop, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, stride):
    number = tl.arange(0, BLOCK_N)
    exists = number < stop - start
    offset = tl.cast(start, tl.int64) * stride
    key = _load(key_ptr + offset, number, stride, exists, D, BLOCK_D)
    return start + number, key, _load(value_ptr + offset, number, stride, exists, D, BLOCK_D)


@triton.jit
def _memory_keys(
    key_ptr, value_ptr, memory_ptr, start, stop, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, stride
):
    """Entries that the places start, start + 1, ... of the row's memories hold; where a place is empty, exists is False."""
    place = start + tl.arange(0, BLOCK_N)
    entry = tl.load(memory_ptr + place.to(tl.int64), mask=place < stop, other=-1)
    exists = entry >= 0
    key = _load(key_ptr, entry, stride, exists, D, BLOCK_D)
    return place, exists, key, _load(value_ptr, entry, stride, exists, D, BLOCK_D)


# ----------------------------------------------------------------------------------------------------------------------
# Forward
# ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def _mix(query, key, value, visible, mixed, top, total, scale, PRECISION: tl.constexpr):
    """One step of the running softmax: mixed and total are sums of exp2(score - top)."""
    score = dot(query, tl.trans(key.to(query.dtype)), None, PRECISION) * scale
    score = tl.where(visible, score, -float("inf"))
    new_top = tl.maximum(top, tl.max(score, 1))
    weight = tl.exp2(score - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weight, 1)
    mixed = dot(weight.to(query.dtype), value.to(query.dtype), mixed * shrink[:, None], PRECISION)
    return mixed, new_top, total


_LENGTHS = ["seq_len", "window_before", "fading_before", "entries", "places", "size", "window", "chunk_size"]


@triton.jit(do_not_specialize=_LENGTHS)
def _attention_fwd_kernel(
    query_ptr,
    window_key_ptr,
    window_value_ptr,
    fading_key_ptr,
    fading_value_ptr,
    eidetic_query_ptr,
    eidetic_key_ptr,
    eidetic_value_ptr,
    memory_ptr,
    past_ptr,
    fading_query_ptr,
    out_ptr,
    log_sum_ptr,
    seq_len,
    window_before,
    fading_before,
    entries,
    places,
    size,
    window,
    chunk_size,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block, head, row = _program(tl.cdiv(seq_len * GROUP, BLOCK_M), KV_HEADS)
    flat = block * BLOCK_M + tl.arange(0, BLOCK_M)
    real = flat < seq_len * GROUP
    token = flat // GROUP
    first = block * BLOCK_M // GROUP
    last = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // GROUP, seq_len - 1)
    number = (token - first) * (KV_HEADS * GROUP) + flat % GROUP  # among all heads of all tokens, from `begin` on
    begin = (row * seq_len + first) * (KV_HEADS * GROUP) + head * GROUP
    stride: tl.constexpr = KV_HEADS * D
    dtype = window_value_ptr.dtype.element_ty

    mixed = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    top = tl.full([BLOCK_M], _LOWEST, dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    scale *= _LOG2E

    query = _load(query_ptr + begin * D, number, D, real, D, BLOCK_D).to(dtype)
    offset = ((row * (window_before + seq_len) + window_before) * KV_HEADS + head) * D
    start = tl.maximum(first - window + 1, _first_position(past_ptr, row, window_before))
    for position in range(start, last + 1, BLOCK_N):
        seen, key, value = _near_keys(
            window_key_ptr + offset, window_value_ptr + offset, position, last + 1, D, BLOCK_D, BLOCK_N, stride
        )
        visible = _see_near(token, seen, 0, window)
        mixed, top, total = _mix(query, key, value, visible, mixed, top, total, scale, PRECISION)

    if fading_key_ptr is not None:
        if fading_query_ptr is not None:
            query = _load(fading_query_ptr + begin * D, number, D, real, D, BLOCK_D).to(dtype)
        offset = ((row * (fading_before + seq_len) + fading_before) * KV_HEADS + head) * D
        start = tl.maximum(first - 2 * window + 1, _first_position(past_ptr, row, fading_before))
        for position in range(start, last + 1 - window, BLOCK_N):
            seen, key, value = _near_keys(
                fading_key_ptr + offset,
                fading_value_ptr + offset,
                position,
                last + 1 - window,
                D,
                BLOCK_D,
                BLOCK_N,
                stride,
            )
            visible = _see_near(token, seen, window, window)
            mixed, top, total = _mix(query, key, value, visible, mixed, top, total, scale, PRECISION)

    if memory_ptr is not None:
        query = _load(eidetic_query_ptr + begin * D, number, D, real, D, BLOCK_D).to(dtype)
        chunk = token // chunk_size
        offset = (row * entries * KV_HEADS + head) * D
        stop = tl.minimum((last // chunk_size + 1) * size, places)
        for place in range(first // chunk_size * size, stop, BLOCK_N):
            seen, exists, key, value = _memory_keys(
                eidetic_key_ptr + offset,
                eidetic_value_ptr + offset,
                memory_ptr + row * places,
                place,
                stop,
                D,
                BLOCK_D,
                BLOCK_N,
                stride,
            )
            visible = exists[None, :] & (chunk[:, None] == (seen // size)[None, :])
            mixed, top, total = _mix(query, key, value, visible, mixed, top, total, scale, PRECISION)

    sees = total > 0  # every token sees itself; those at positions below 0 nothing
    total = tl.where(sees, total, 1)
    _store(out_ptr + begin * D, number, D, real, mixed / total[:, None], D, BLOCK_D)
    log_sum = tl.where(sees, (top + tl.log2(total)) / _LOG2E, -float("inf"))
    tl.store(log_sum_ptr + begin + number, log_sum, mask=real)


# ----------------------------------------------------------------------------------------------------------------------
# Backward
# ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def _load_log_sums(ptr, number, real):
    """The logarithms of the sums to base 2; infinity, that is, weights of 0, for rows that see nothing."""
    log_sum = tl.load(ptr + number, mask=real, other=float("inf")) * _LOG2E
    return tl.where(log_sum == -float("inf"), float("inf"), log_sum)


@triton.jit
def _add_to_query(d_query, query, d_out, log_sum, delta, key, value, visible, scale, PRECISION: tl.constexpr):
    key = key.to(query.dtype)
    score = dot(query, tl.trans(key), None, PRECISION) * scale
    weight = tl.exp2(tl.where(visible, score, -float("inf")) - log_sum[:, None])
    d_weight = dot(d_out, tl.trans(value.to(query.dtype)), None, PRECISION)
    d_score = weight * (d_weight - delta[:, None])
    return dot(d_score.to(query.dtype), key, d_query, PRECISION)


@triton.jit(do_not_specialize=_LENGTHS)
def _attention_bwd_query_kernel(
    query_ptr,
    window_key_ptr,
    window_value_ptr,
    fading_key_ptr,
    fading_value_ptr,
    eidetic_query_ptr,
    eidetic_key_ptr,
    eidetic_value_ptr,
    memory_ptr,
    past_ptr,
    fading_query_ptr,
    out_ptr,
    log_sum_ptr,
    d_out_ptr,
    delta_ptr,
    d_query_ptr,
    d_eidetic_query_ptr,
    d_fading_query_ptr,
    seq_len,
    window_before,
    fading_before,
    entries,
    places,
    size,
    window,
    chunk_size,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of the queries, and delta = sum(out * d_out) of every row, which the other kernels need."""
    block, head, row = _program(tl.cdiv(seq_len * GROUP, BLOCK_M), KV_HEADS)
    flat = block * BLOCK_M + tl.arange(0, BLOCK_M)
    real = flat < seq_len * GROUP
    token = flat // GROUP
    first = block * BLOCK_M // GROUP
    last = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // GROUP, seq_len - 1)
    number = (token - first) * (KV_HEADS * GROUP) + flat % GROUP
    begin = (row * seq_len + first) * (KV_HEADS * GROUP) + head * GROUP
    stride: tl.constexpr = KV_HEADS * D
    dtype = window_value_ptr.dtype.element_ty

    d_out = _load(d_out_ptr + begin * D, number, D, real, D, BLOCK_D)
    out = _load(out_ptr + begin * D, number, D, real, D, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    tl.store(delta_ptr + begin + number, delta, mask=real)
    log_sum = _load_log_sums(log_sum_ptr + begin, number, real)

    query = _load(query_ptr + begin * D, number, D, real, D, BLOCK_D).to(dtype)
    d_query = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    offset = ((row * (window_before + seq_len) + window_before) * KV_HEADS + head) * D
    start = tl.maximum(first - window + 1, _first_position(past_ptr, row, window_before))
    for position in range(start, last + 1, BLOCK_N):
        seen, key, value = _near_keys(
            window_key_ptr + offset, window_value_ptr + offset, position, last + 1, D, BLOCK_D, BLOCK_N, stride
        )
        visible = _see_near(token, seen, 0, window)
        d_query = _add_to_query(d_query, query, d_out, log_sum, delta, key, value, visible, scale * _LOG2E, PRECISION)

    if fading_key_ptr is not None:
        if fading_query_ptr is not None:
            _store(d_query_ptr + begin * D, number, D, real, d_query * scale, D, BLOCK_D)
            d_query = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
            query = _load(fading_query_ptr + begin * D, number, D, real, D, BLOCK_D).to(dtype)
        offset = ((row * (fading_before + seq_len) + fading_before) * KV_HEADS + head) * D
        start = tl.maximum(first - 2 * window + 1, _first_position(past_ptr, row, fading_before))
        for position in range(start, last + 1 - window, BLOCK_N):
            seen, key, value = _near_keys(
                fading_key_ptr + offset,
                fading_value_ptr + offset,
                position,
                last + 1 - window,
                D,
                BLOCK_D,
                BLOCK_N,
                stride,
            )
            visible = _see_near(token, seen, window, window)
            d_query = _add_to_query(
                d_query, query, d_out, log_sum, delta, key, value, visible, scale * _LOG2E, PRECISION
            )
    if fading_query_ptr is not None:
        _store(d_fading_query_ptr + begin * D, number, D, real, d_query * scale, D, BLOCK_D)
    else:
        _store(d_query_ptr + begin * D, number, D, real, d_query * scale, D, BLOCK_D)

    if memory_ptr is not None:
        query = _load(eidetic_query_ptr + begin * D, number, D, real, D, BLOCK_D).to(dtype)
        d_query = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        chunk = token // chunk_size
        offset = (row * entries * KV_HEADS + head) * D
        stop = tl.minimum((last // chunk_size + 1) * size, places)
        for place in range(first // chunk_size * size, stop, BLOCK_N):
            seen, exists, key, value = _memory_keys(
                eidetic_key_ptr + offset,
                eidetic_value_ptr + offset,
                memory_ptr + row * places,
                place,
                stop,
                D,
                BLOCK_D,
                BLOCK_N,
                stride,
            )
            visible = exists[None, :] & (chunk[:, None] == (seen // size)[None, :])
            d_query = _add_to_query(
                d_query, query, d_out, log_sum, delta, key, value, visible, scale * _LOG2E, PRECISION
            )
        _store(d_eidetic_query_ptr + begin * D, number, D, real, d_query * scale, D, BLOCK_D)


@triton.jit
def _add_to_keys(
    d_key,
    d_value,
    key,
    value,
    query_ptr,
    d_out_ptr,
    log_sum_ptr,
    delta_ptr,
    first,
    flat,
    real,
    visible,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What the rows `flat` of queries, `first` and BLOCK_M - 1 more, have for keys and values; visible is (keys, rows)."""
    number = (flat // GROUP - first // GROUP) * HEADS + flat % GROUP
    begin = tl.cast(first // GROUP, tl.int64) * HEADS
    log_sum = _load_log_sums(log_sum_ptr + begin, number, real)
    delta = tl.load(delta_ptr + begin + number, mask=real, other=0.0)
    query_ptr += begin * D
    d_out_ptr += begin * D
    query = _load(query_ptr, number, D, real, D, BLOCK_D).to(key.dtype)
    d_out = _load(d_out_ptr, number, D, real, D, BLOCK_D).to(key.dtype)
    score = dot(key, tl.trans(query), None, PRECISION) * scale
    weight = tl.exp2(tl.where(visible, score, -float("inf")) - log_sum[None, :])
    d_value = dot(weight.to(key.dtype), d_out, d_value, PRECISION)
    d_weight = dot(value, tl.trans(d_out), None, PRECISION)
    d_score = weight * (d_weight - delta[None, :])
    return dot(d_score.to(key.dtype), query, d_key, PRECISION), d_value


@triton.jit(do_not_specialize=["seq_len", "before", "newest", "window"])
def _attention_bwd_near_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    past_ptr,
    log_sum_ptr,
    d_out_ptr,
    delta_ptr,
    d_key_ptr,
    d_value_ptr,
    seq_len,
    before,
    newest,
    window,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of keys and values that are newest to newest + window - 1 tokens older than the queries."""
    block, head, row = _program(tl.cdiv(before + seq_len, BLOCK_N), KV_HEADS)
    slot = tl.arange(0, BLOCK_N)
    position = block * BLOCK_N - before + slot
    real = position < seq_len
    exists = real & (position >= _first_position(past_ptr, row, before))
    offset = ((row * (before + seq_len) + block * BLOCK_N) * KV_HEADS + head) * D
    dtype = d_out_ptr.dtype.element_ty
    key = _load(key_ptr + offset, slot, KV_HEADS * D, exists, D, BLOCK_D).to(dtype)
    value = _load(value_ptr + offset, slot, KV_HEADS * D, exists, D, BLOCK_D).to(dtype)
    d_key = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    d_value = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)

    begin = row * seq_len * (KV_HEADS * GROUP) + head * GROUP
    first = tl.maximum(block * BLOCK_N - before + newest, 0)
    stop = tl.minimum(block * BLOCK_N + BLOCK_N - 1 - before + newest + window, seq_len)
    for start in range(first * GROUP, stop * GROUP, BLOCK_M):
        flat = start + tl.arange(0, BLOCK_M)
        age = (flat // GROUP)[None, :] - position[:, None] - newest
        visible = exists[:, None] & (age >= 0) & (age < window)
        d_key, d_value = _add_to_keys(
            d_key,
            d_value,
            key,
            value,
            query_ptr + begin * D,
            d_out_ptr + begin * D,
            log_sum_ptr + begin,
            delta_ptr + begin,
            start,
            flat,
            flat < stop * GROUP,
            visible,
            scale * _LOG2E,
            KV_HEADS * GROUP,
            GROUP,
            D,
            BLOCK_D,
            PRECISION,
        )
    _store(d_key_ptr + offset, slot, KV_HEADS * D, real, d_key * scale, D, BLOCK_D)
    _store(d_value_ptr + offset, slot, KV_HEADS * D, real, d_value, D, BLOCK_D)


@triton.jit(do_not_specialize=["seq_len", "entries", "places", "size", "chunk_size"])
def _attention_bwd_memory_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    memory_ptr,
    log_sum_ptr,
    d_out_ptr,
    delta_ptr,
    d_key_ptr,
    d_value_ptr,
    seq_len,
    entries,
    places,
    size,
    chunk_size,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of the places of the memories, (rows, places, kv heads, head_dim); of empty ones nothing is written."""
    per_chunk = tl.cdiv(size, BLOCK_N)
    block, head, row = _program(places // size * per_chunk, KV_HEADS)
    chunk = block // per_chunk
    start = chunk * size + block % per_chunk * BLOCK_N
    offset = (row * entries * KV_HEADS + head) * D
    place, exists, key, value = _memory_keys(
        key_ptr + offset,
        value_ptr + offset,
        memory_ptr + row * places,
        start,
        (chunk + 1) * size,
        D,
        BLOCK_D,
        BLOCK_N,
        KV_HEADS * D,
    )
    dtype = d_out_ptr.dtype.element_ty
    key, value = key.to(dtype), value.to(dtype)
    d_key = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    d_value = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)

    begin = row * seq_len * (KV_HEADS * GROUP) + head * GROUP
    stop = tl.minimum((chunk + 1) * chunk_size, seq_len)
    for first in range(chunk * chunk_size * GROUP, stop * GROUP, BLOCK_M):
        flat = first + tl.arange(0, BLOCK_M)
        real = flat < stop * GROUP
        d_key, d_value = _add_to_keys(
            d_key,
            d_value,
            key,
            value,
            query_ptr + begin * D,
            d_out_ptr + begin * D,
            log_sum_ptr + begin,
            delta_ptr + begin,
            first,
            flat,
            real,
            exists[:, None] & real[None, :],
            scale * _LOG2E,
            KV_HEADS * GROUP,
            GROUP,
            D,
            BLOCK_D,
            PRECISION,
        )
    offset = (row * places * KV_HEADS + head) * D
    place = place.to(tl.int64)
    _store(d_key_ptr + offset, place, KV_HEADS * D, exists, d_key * scale, D, BLOCK_D)
    _store(d_value_ptr + offset, place, KV_HEADS * D, exists, d_value, D, BLOCK_D)


@triton.jit(do_not_specialize=["entries", "places"])
def _attention_bwd_entry_kernel(
    place_d_key_ptr,
    place_d_value_ptr,
    order_ptr,
    start_ptr,
    d_key_ptr,
    d_value_ptr,
    entries,
    places,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Gradients of the entries: for each the sum over the places that hold it, order[start[entry] : start[entry + 1]]."""
    block, entry, row = _entry_program(entries, tl.cdiv(WIDTH, BLOCK_W))
    column = block * BLOCK_W + tl.arange(0, BLOCK_W)
    inside = column < WIDTH
    start = tl.load(start_ptr + row * (entries + 1) + entry)
    stop = tl.load(start_ptr + row * (entries + 1) + entry + 1)
    d_key = tl.zeros([BLOCK_W], dtype=tl.float32)
    d_value = tl.zeros([BLOCK_W], dtype=tl.float32)
    for first in range(start, stop, BLOCK_P):
        number = first + tl.arange(0, BLOCK_P)
        place = tl.load(order_ptr + row * places + number, mask=number < stop, other=0)
        offset = (row * places + place)[:, None] * WIDTH + column[None, :]
        mask = (number < stop)[:, None] & inside[None, :]
        d_key += tl.sum(tl.load(place_d_key_ptr + offset, mask=mask, other=0.0), 0)
        d_value += tl.sum(tl.load(place_d_value_ptr + offset, mask=mask, other=0.0), 0)
    offset = (row * entries + entry) * WIDTH + column
    tl.store(d_key_ptr + offset, d_key.to(d_key_ptr.dtype.element_ty), mask=inside)
    tl.store(d_value_ptr + offset, d_value.to(d_value_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _entry_program(entries, blocks):
    program = tl.program_id(0)
    return program % blocks, (program // blocks % entries).to(tl.int64), (program // blocks // entries).to(tl.int64)


# ----------------------------------------------------------------------------------------------------------------------
# Launches
# ----------------------------------------------------------------------------------------------------------------------


# (BLOCK_M, BLOCK_N, num_warps) of the kernels "forward", "query", "keys", by bytes per number and the largest BLOCK_D
_BLOCKS = {
    ("ampere", 2): {
        32: ((64, 64, 4), (64, 32, 4), (32, 64, 4)),
        64: ((128, 64, 8), (128, 32, 8), (32, 128, 8)),
        128: ((128, 32, 8), (64, 32, 8), (64, 64, 8)),
        256: ((64, 32, 8), (64, 16, 8), (32, 32, 8)),
    },
    ("ampere", 4): {
        32: ((64, 32, 8), (16, 16, 4), (16, 32, 4)),
        64: ((32, 32, 4), (16, 16, 4), (32, 32, 8)),
        128: ((32, 32, 8), (16, 16, 8), (16, 16, 8)),
        256: ((32, 16, 8), (16, 16, 8), (16, 16, 8)),
    },
    ("turing", 2): {
        64: ((32, 16, 4), (32, 16, 4), (32, 16, 4)),
        128: ((16, 16, 4), (16, 16, 8), (16, 16, 8)),
        256: ((16, 16, 8), (16, 16, 8), (16, 16, 8)),
    },
    ("turing", 4): {
        64: ((16, 16, 4), (16, 16, 4), (16, 16, 4)),
        128: ((16, 16, 4), (16, 16, 8), (16, 16, 4)),
        256: ((16, 16, 4), (16, 16, 8), (16, 16, 8)),
    },
    ("amd", 2): {
        128: ((64, 64, 4), (64, 64, 4), (64, 64, 4)),
        256: ((32, 32, 4), (16, 16, 4), (16, 16, 4)),
    },
    ("amd", 4): {
        64: ((64, 64, 4), (64, 64, 4), (64, 64, 4)),
        128: ((32, 32, 4), (32, 32, 4), (32, 32, 4)),
        256: ((32, 32, 4), (16, 16, 4), (16, 16, 4)),
    },
}
_KERNELS = ("forward", "query", "keys")
_ENTRY = {"BLOCK_W": 128, "BLOCK_P": 16, "num_warps": 4, "enable_fp_fusion": True}


@functools.cache
def settings(kernel: str, head_dim: int, itemsize: int, architecture: str) -> dict:
    """Constants and options of a launch, by what a program has room for: never by a length, for which it would compile anew.

    The reasons are in the README; `compile_report.py` shows what fits.
    """
    block_d = max(16, triton.next_power_of_2(head_dim))
    if block_d > 256:
        raise ValueError(
            f"head_dim is {head_dim}; the attention kernel has room for 256. BMOJO_KERNELS=torch does without."
        )
    rows = _BLOCKS[architecture, itemsize]
    row = rows[min(largest for largest in rows if largest >= block_d)]
    block_m, block_n, num_warps = row[_KERNELS.index(kernel)]
    # float32 products on tensor cores, each as three of TF32, which err by as little; 256 columns of them do not fit
    exact = "tf32x3" if architecture == "ampere" and block_d <= 128 else "ieee"
    return {
        "D": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "PRECISION": exact if itemsize == 4 else "ieee",
        "num_warps": num_warps,
        "num_stages": 1 if architecture == "amd" else 2,
        "enable_fp_fusion": True,
    }


def _sizes(query, window_key, fading_key, eidetic_key, memory):
    seq_len = query.shape[1]
    return {
        "seq_len": seq_len,
        "window_before": window_key.shape[1] - seq_len,
        "fading_before": 0 if fading_key is None else fading_key.shape[1] - seq_len,
        "entries": 0 if memory is None else eidetic_key.shape[1],
        "places": 0 if memory is None else memory.shape[1] * memory.shape[2],
        "size": 0 if memory is None else memory.shape[2],
    }


def _contiguous(*tensors):
    return [None if x is None else x.contiguous() for x in tensors]


_NAMESPACE = namespace(__name__)


@torch.library.custom_op(f"{_NAMESPACE}::forward", mutates_args=())
def _forward(
    query: torch.Tensor,
    window_key: torch.Tensor,
    window_value: torch.Tensor,
    fading_key: torch.Tensor | None,
    fading_value: torch.Tensor | None,
    eidetic_query: torch.Tensor | None,
    eidetic_key: torch.Tensor | None,
    eidetic_value: torch.Tensor | None,
    memory: torch.Tensor | None,
    past: torch.Tensor | None,
    fading_query: torch.Tensor | None,
    window: int,
    chunk_size: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and the natural logarithm of every softmax's sum, (rows, seq_len, num_heads) float32."""
    tensors = _contiguous(
        query,
        window_key,
        window_value,
        fading_key,
        fading_value,
        eidetic_query,
        eidetic_key,
        eidetic_value,
        memory,
        past,
        fading_query,
    )
    out, log_sum = _empty_outputs(query, window_value)
    rows, seq_len, heads, head_dim = query.shape
    kv_heads = window_key.shape[2]
    chosen = settings("forward", head_dim, out.element_size(), architecture(query.device))
    grid = (triton.cdiv(seq_len * (heads // kv_heads), chosen["BLOCK_M"]) * kv_heads * rows,)
    with on_device_of(query):
        _attention_fwd_kernel[grid](
            *tensors,
            out,
            log_sum,
            **_sizes(query, window_key, fading_key, eidetic_key, memory),
            window=window,
            chunk_size=chunk_size,
            scale=scale,
            KV_HEADS=kv_heads,
            GROUP=heads // kv_heads,
            **chosen,
        )
    return out, log_sum


@_forward.register_fake
def _(query, window_key, window_value, *others):
    return _empty_outputs(query, window_value)


def _empty_outputs(query, value):
    out = query.new_empty(query.shape, dtype=value.dtype)
    return out, query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op(f"{_NAMESPACE}::backward", mutates_args=())
def _backward(
    d_out: torch.Tensor,
    out: torch.Tensor,
    log_sum: torch.Tensor,
    query: torch.Tensor,
    window_key: torch.Tensor,
    window_value: torch.Tensor,
    fading_key: torch.Tensor | None,
    fading_value: torch.Tensor | None,
    eidetic_query: torch.Tensor | None,
    eidetic_key: torch.Tensor | None,
    eidetic_value: torch.Tensor | None,
    memory: torch.Tensor | None,
    past: torch.Tensor | None,
    fading_query: torch.Tensor | None,
    window: int,
    chunk_size: int,
    scale: float,
) -> list[torch.Tensor]:
    """The gradients of the floating-point tensors that there are, in the order of the arguments."""
    rows, seq_len, heads, head_dim = query.shape
    kv_heads = window_key.shape[2]
    group = heads // kv_heads
    sizes = _sizes(query, window_key, fading_key, eidetic_key, memory)
    tensors = _contiguous(
        query,
        window_key,
        window_value,
        fading_key,
        fading_value,
        eidetic_query,
        eidetic_key,
        eidetic_value,
        memory,
        past,
        fading_query,
    )
    grads = _empty_gradients(tensors)
    (query, window_key, window_value, fading_key, fading_value) = tensors[:5]
    (eidetic_query, eidetic_key, eidetic_value, memory, past, fading_query) = tensors[5:]
    d_query, d_window_key, d_window_value, d_fading_key, d_fading_value = grads[:5]
    d_eidetic_query, d_eidetic_key, d_eidetic_value, _, _, d_fading_query = grads[5:]
    d_out, out = d_out.contiguous(), out.contiguous()
    delta = torch.empty_like(log_sum)
    common = {"KV_HEADS": kv_heads, "GROUP": group, "scale": scale}
    arch = architecture(query.device)
    chosen = settings("query", head_dim, out.element_size(), arch)
    grid = (triton.cdiv(seq_len * group, chosen["BLOCK_M"]) * kv_heads * rows,)
    with on_device_of(query):
        _attention_bwd_query_kernel[grid](
            *tensors,
            out,
            log_sum,
            d_out,
            delta,
            d_query,
            d_eidetic_query,
            d_fading_query,
            **sizes,
            window=window,
            chunk_size=chunk_size,
            **common,
            **chosen,
        )
        chosen = settings("keys", head_dim, out.element_size(), arch)
        near = [(query, window_key, window_value, d_window_key, d_window_value, 0)]
        if fading_key is not None:
            asking = query if fading_query is None else fading_query
            near.append((asking, fading_key, fading_value, d_fading_key, d_fading_value, window))
        for asking, key, value, d_key, d_value, newest in near:
            grid = (triton.cdiv(key.shape[1], chosen["BLOCK_N"]) * kv_heads * rows,)
            _attention_bwd_near_kernel[grid](
                asking,
                key,
                value,
                past,
                log_sum,
                d_out,
                delta,
                d_key,
                d_value,
                seq_len=seq_len,
                before=key.shape[1] - seq_len,
                newest=newest,
                window=window,
                **common,
                **chosen,
            )
        if memory is not None:
            _, chunks, size = memory.shape
            entries, places = sizes["entries"], sizes["places"]
            of_places = [query.new_empty(rows, places, kv_heads, head_dim, dtype=torch.float32) for _ in range(2)]
            grid = (triton.cdiv(size, chosen["BLOCK_N"]) * chunks * kv_heads * rows,)
            _attention_bwd_memory_kernel[grid](
                eidetic_query,
                eidetic_key,
                eidetic_value,
                memory,
                log_sum,
                d_out,
                delta,
                *of_places,
                seq_len=seq_len,
                entries=entries,
                places=places,
                size=size,
                chunk_size=chunk_size,
                **common,
                **chosen,
            )
            order, starts = _places_by_entry(memory, entries)
            width = kv_heads * head_dim
            grid = (triton.cdiv(width, _ENTRY["BLOCK_W"]) * entries * rows,)
            _attention_bwd_entry_kernel[grid](
                *of_places,
                order,
                starts,
                d_eidetic_key,
                d_eidetic_value,
                entries=entries,
                places=places,
                WIDTH=width,
                **_ENTRY,
            )
    return [grad for grad in grads if grad is not None]


def _places_by_entry(memory, entries: int):
    """The places (rows, places) in the order of what they hold, equals in their own, and where each entry's begin, (rows, entries + 1)."""
    held = memory.flatten(1)
    held, order = held.masked_fill(held < 0, entries).sort(dim=1, stable=True)
    numbers = torch.arange(entries + 1, device=memory.device).expand(memory.shape[0], -1)
    return order, torch.searchsorted(held, numbers.contiguous())


@_backward.register_fake
def _(d_out, out, log_sum, *others):
    return [grad for grad in _empty_gradients(others[:11]) if grad is not None]


def _empty_gradients(tensors):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) if _is_float(x) else None for x in tensors]


def _is_float(x) -> bool:
    return x is not None and x.is_floating_point()


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*output, *inputs[:11])
    ctx.options = inputs[11:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, d_out, _):
    if d_out is None:  # nothing depends on the output
        return (None,) * 14
    out, log_sum, *tensors = ctx.saved_tensors
    grads = iter(_backward(d_out, out, log_sum, *tensors, *ctx.options))
    return *(next(grads) if _is_float(x) else None for x in tensors), None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def memory_attention(
    query,
    window_key,
    window_value,
    fading_key=None,
    fading_value=None,
    eidetic_query=None,
    eidetic_key=None,
    eidetic_value=None,
    memory=None,
    past=None,
    fading_query=None,
    *,
    window: int,
    chunk_size: int,
    scale: float,
):
    """See `ops_bmojo.memory_attention`. Computes in the dtype of the values, sums in float32."""
    if fading_key is None:
        fading_query = None  # nothing to ask
    tensors = (query, window_key, window_value, fading_key, fading_value, eidetic_query, eidetic_key, eidetic_value)
    return _forward(*tensors, memory, past, fading_query, window, chunk_size, scale)[0]


def launches(itemsize: int, architecture: str):
    """What `compile_report.py` compiles: all kernels for head sizes of all settings, and the options at one of them."""
    integers = dict.fromkeys(("memory_ptr", "past_ptr", "order_ptr", "start_ptr"), "*i64")
    sums = dict.fromkeys(("log_sum_ptr", "delta_ptr", "place_d_key_ptr", "place_d_value_ptr"), "*fp32")
    types = integers | sums | {"scale": "fp32"}
    forward, query = ("forward", _attention_fwd_kernel), ("query", _attention_bwd_query_kernel)
    keys = [("keys", _attention_bwd_near_kernel), ("keys", _attention_bwd_memory_kernel)]

    def launch(kind, kernel, head_dim, what="", **absent):
        constants = {"KV_HEADS": 8, "GROUP": 4} | settings(kind, head_dim, itemsize, architecture)
        is_default = head_dim == 64 and not absent
        return Launch(f"{kernel.__name__} {head_dim}{what}", kernel, types | absent, constants, is_default)

    for head_dim in (16, 32, 64, 96, 128, 256):
        yield launch(*forward, head_dim)
        if head_dim <= 128 or itemsize == 2:  # a backward pass of float32 with 256 runs, but spills a few registers
            yield from (launch(*kernel, head_dim) for kernel in (query, *keys))
    simple = {"past_ptr": None, "fading_query_ptr": None, "d_fading_query_ptr": None}
    for kind, kernel in (forward, query, keys[0]):
        yield launch(kind, kernel, 64, " from the start", **simple)
    absent = simple | dict.fromkeys(_OPTIONAL)
    for kind, kernel in (forward, query):
        yield launch(kind, kernel, 64, " window alone", **absent)
    yield Launch("_attention_bwd_entry_kernel", _attention_bwd_entry_kernel, types, {"WIDTH": 512} | _ENTRY)


_OPTIONAL = [
    f"{name}_ptr"
    for name in (
        "fading_key fading_value eidetic_query eidetic_key eidetic_value memory d_eidetic_query d_fading_query"
    ).split()
]
