"""One token of each row: the step of both scans, attention to the cache, and its memory after a chunk; see `ops_bmojo`.

Decoding moves bytes and computes little: every kernel reads states once, in blocks that follow each other in memory,
and asks nothing of the host, so that a CUDA graph can hold it. There are no gradients: where one is recorded the
definitions run.
"""

import torch
import triton
import triton.language as tl

from .attention import _LOG2E, _LOWEST, _load, _mix, _store
from .shared import Launch, architecture, namespace, on_device_of


# ----------------------------------------------------------------------------------------------------------------------
# Scans
# ----------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["x_stride", "dt_stride", "B_stride", "C_stride"])
def _scan_step_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    state_ptr,
    new_ptr,
    y_ptr,
    x_stride,
    dt_stride,
    B_stride,
    C_stride,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    PER_STEP: tl.constexpr,
    BY_STATE: tl.constexpr,
    N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Channels of one group, of which PER_STEP share a time step; A is for each of those, or BY_STATE for channel and state.

    The new state may be the state itself: a program reads what it writes before it does, and nothing else.
    """
    blocks: tl.constexpr = (PER_GROUP + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    group = program // blocks % GROUPS
    row = (program // blocks // GROUPS).to(tl.int64)
    channel = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channel < PER_GROUP
    channel += group * PER_GROUP
    dt = tl.load(dt_ptr + row * dt_stride + channel // PER_STEP, mask=real, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * x_stride + channel, mask=real, other=0.0).to(tl.float32)
    if not BY_STATE:
        decay = tl.exp(dt * tl.load(A_ptr + channel // PER_STEP, mask=real, other=0.0).to(tl.float32))[:, None]
    begin = row * (GROUPS * PER_GROUP * N)
    y = tl.zeros([BLOCK_C], dtype=tl.float32)
    for start in tl.static_range(0, N, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        inside = column < N
        mask = real[:, None] & inside[None, :]
        place = channel[:, None] * N + column[None, :]
        if BY_STATE:
            decay = tl.exp(dt[:, None] * tl.load(A_ptr + place, mask=mask, other=0.0).to(tl.float32))
        B = tl.load(B_ptr + row * B_stride + group * N + column, mask=inside, other=0.0).to(tl.float32)
        C = tl.load(C_ptr + row * C_stride + group * N + column, mask=inside, other=0.0).to(tl.float32)
        state = tl.load(state_ptr + begin + place, mask=mask, other=0.0).to(tl.float32)
        state = state * decay + (x * dt)[:, None] * B[None, :]
        if BLOCK_C * BLOCK_N < 128:  # fewer numbers than threads, which hold copies: all have read before one writes
            tl.debug_barrier()
        tl.store(new_ptr + begin + place, state.to(new_ptr.dtype.element_ty), mask=mask)
        y += tl.sum(state * C[None, :], 1)
    tl.store(y_ptr + row * (GROUPS * PER_GROUP) + channel, y.to(y_ptr.dtype.element_ty), mask=real)


_NUMBERS = 2048  # of the state that a program holds at once: 16 per thread, 4 loads of 16 bytes under way


def scan_settings(channels: int, groups: int, steps: int, by_state: bool, state_size: int) -> dict:
    """Constants and options of a step of a scan; steps: how many time steps a row has."""
    per_group = channels // groups
    block_n = min(256, triton.next_power_of_2(state_size))
    return {
        "GROUPS": groups,
        "PER_GROUP": per_group,
        "PER_STEP": channels // steps,
        "BY_STATE": by_state,
        "N": state_size,
        "BLOCK_C": min(_NUMBERS // block_n, triton.next_power_of_2(per_group)),
        "BLOCK_N": block_n,
        "num_warps": 4,
        "enable_fp_fusion": True,
    }


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The tensor with every row in one piece, and the distance of rows: parts of one projection need no copy."""
    size = 1
    for length, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if stride != size and length > 1:
            x = x.contiguous()
            break
        size *= length
    return x, x.stride(0)


def _launch_scan_step(x, dt, A, B, C, state, new) -> torch.Tensor:
    y = state.new_empty(x.shape)
    groups, state_size = B.shape[1] if B.dim() == 3 else 1, state.shape[-1]
    channels = state[0].numel() // state_size if state.numel() else 0
    if not y.numel():
        return y
    chosen = scan_settings(channels, groups, dt.shape[1], A.dim() == 2, state_size)
    (x, x_stride), (dt, dt_stride), (B, B_stride), (C, C_stride) = map(_rows, (x, dt, B, C))
    grid = (triton.cdiv(chosen["PER_GROUP"], chosen["BLOCK_C"]) * groups * len(x),)
    with on_device_of(x):
        _scan_step_kernel[grid](
            x, dt, A.contiguous(), B, C, state, new, y, x_stride, dt_stride, B_stride, C_stride, **chosen
        )
    return y


_NAMESPACE = namespace(__name__)


@torch.library.custom_op(f"{_NAMESPACE}::scan_step", mutates_args=())
def _scan_step(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    state = state.contiguous()
    new = torch.empty_like(state)
    return _launch_scan_step(x, dt, A, B, C, state, new), new


@_scan_step.register_fake
def _(x, dt, A, B, C, state):
    return state.new_empty(x.shape), torch.empty_like(state, memory_format=torch.contiguous_format)


@torch.library.custom_op(f"{_NAMESPACE}::scan_step_", mutates_args=("state",))
def _scan_step_(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, state: torch.Tensor
) -> torch.Tensor:
    whole = state.contiguous()
    y = _launch_scan_step(x, dt, A, B, C, whole, whole)
    if whole is not state:
        state.copy_(whole)
    return y


@_scan_step_.register_fake
def _(x, dt, A, B, C, state):
    return state.new_empty(x.shape)


def ssd_step(x, dt, A, B, C, state, in_place: bool = False):
    """See `ops_bmojo.ssd_step`. Computes in float32, whatever the dtype of inputs and state."""
    if in_place:
        return _scan_step_(x, dt, A, B, C, state), state
    return _scan_step(x, dt, A, B, C, state)


def selective_step(x, dt, A, B, C, state, in_place: bool = False):
    """See `ops_bmojo.selective_step`. Computes in float32, whatever the dtype of inputs and state."""
    return ssd_step(x, dt, A, B, C, state, in_place)  # heads of one channel, with a decay for each state


# ----------------------------------------------------------------------------------------------------------------------
# Attention to the cache
# ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def _attend(
    query,
    key_ptr,
    value_ptr,
    mask_ptr,
    start,
    stop,
    mixed,
    top,
    total,
    stride: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The running softmax over the slots from start to stop; of those that are not seen nothing is read."""
    for first in range(start, stop, BLOCK_N):
        slot = first + tl.arange(0, BLOCK_N)
        seen = tl.load(mask_ptr + slot, mask=slot < stop, other=-float("inf")) == 0
        key = _load(key_ptr, slot.to(tl.int64), stride, seen, D, BLOCK_D)
        value = _load(value_ptr, slot.to(tl.int64), D, seen, D, BLOCK_D)
        mixed, top, total = _mix(query, key, value, seen[None, :], mixed, top, total, _LOG2E, PRECISION)
    return mixed, top, total


_SLOTS = [
    "slots",
    "fading",
    "memory",
    "splits",
    "per_split",
    "query_stride",
    "eidetic_stride",
    "fading_stride",
    "mask_stride",
]


@triton.jit(do_not_specialize=_SLOTS)
def _cache_attention_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    mask_ptr,
    eidetic_query_ptr,
    fading_query_ptr,
    eidetic_key_ptr,
    out_ptr,
    mixed_ptr,
    top_ptr,
    total_ptr,
    query_stride,
    eidetic_stride,
    fading_stride,
    mask_stride,
    slots,
    fading,
    memory,
    splits,
    per_split,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The heads of one group, over one part of the slots: the output, or what `_merge_kernel` makes it of."""
    split = tl.program_id(0) % splits
    pair = (tl.program_id(0) // splits).to(tl.int64)  # of row and key-value head
    head, row = pair % KV_HEADS, pair // KV_HEADS
    member = tl.arange(0, BLOCK_M)
    real = member < GROUP
    own = head * GROUP * D
    first = split * per_split
    last = tl.minimum(first + per_split, slots)
    key_ptr += pair * slots * D
    value_ptr += pair * slots * D
    mask_ptr += pair * mask_stride

    mixed = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    top = tl.full([BLOCK_M], _LOWEST, dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)

    query = _load(query_ptr + row * query_stride + own, member, D, real, D, BLOCK_D)
    stop = memory if fading_query_ptr is None else fading
    mixed, top, total = _attend(
        query,
        key_ptr,
        value_ptr,
        mask_ptr,
        first,
        tl.minimum(last, stop),
        mixed,
        top,
        total,
        D,
        D,
        BLOCK_D,
        BLOCK_N,
        PRECISION,
    )
    if fading_query_ptr is not None:
        query = _load(fading_query_ptr + row * fading_stride + own, member, D, real, D, BLOCK_D)
        mixed, top, total = _attend(
            query,
            key_ptr,
            value_ptr,
            mask_ptr,
            tl.maximum(first, fading),
            tl.minimum(last, memory),
            mixed,
            top,
            total,
            D,
            D,
            BLOCK_D,
            BLOCK_N,
            PRECISION,
        )
    if eidetic_query_ptr is not None:
        query = _load(eidetic_query_ptr + row * eidetic_stride + own, member, D, real, D, BLOCK_D)
        stride: tl.constexpr = D if eidetic_key_ptr is None else KV_HEADS * D
        if eidetic_key_ptr is not None:
            key_ptr = eidetic_key_ptr + ((row * (slots - memory) - memory) * KV_HEADS + head) * D
        mixed, top, total = _attend(
            query,
            key_ptr,
            value_ptr,
            mask_ptr,
            tl.maximum(first, memory),
            last,
            mixed,
            top,
            total,
            stride,
            D,
            BLOCK_D,
            BLOCK_N,
            PRECISION,
        )

    if mixed_ptr is None:
        total = tl.where(total > 0, total, 1)
        _store(out_ptr + pair * GROUP * D, member, D, real, mixed / total[:, None], D, BLOCK_D)
    else:
        number = (pair * GROUP + member) * splits + split
        _store(mixed_ptr, number, D, real, mixed, D, BLOCK_D)
        tl.store(top_ptr + number, top, mask=real)
        tl.store(total_ptr + number, total, mask=real)


@triton.jit(do_not_specialize=["splits"])
def _merge_kernel(
    mixed_ptr, top_ptr, total_ptr, out_ptr, splits, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr
):
    """The output of one head from its parts."""
    head = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    mixed = tl.zeros([BLOCK_D], dtype=tl.float32)
    highest = tl.full([], _LOWEST, dtype=tl.float32)
    whole = tl.zeros([], dtype=tl.float32)
    for start in range(0, splits, BLOCK_S):
        split = start + tl.arange(0, BLOCK_S)
        real = split < splits
        top = tl.load(top_ptr + head * splits + split, mask=real, other=_LOWEST)
        total = tl.load(total_ptr + head * splits + split, mask=real, other=0.0)
        part = _load(mixed_ptr + head * splits * D, split, D, real, D, BLOCK_D)
        new = tl.maximum(highest, tl.max(top, 0))
        shrink, weight = tl.exp2(highest - new), tl.exp2(top - new)
        mixed = mixed * shrink + tl.sum(part * weight[:, None], 0)
        whole = whole * shrink + tl.sum(total * weight, 0)
        highest = new
    mixed = mixed / tl.where(whole > 0, whole, 1)
    tl.store(out_ptr + head * D + column, mixed.to(out_ptr.dtype.element_ty), mask=column < D)


_PROGRAMS = 256  # at least so many where there are slots enough: few rows alone would leave most of a GPU idle
_MERGE = {"BLOCK_S": 16, "num_warps": 4, "enable_fp_fusion": True}


def attention_settings(head_dim: int, group: int, itemsize: int, architecture: str) -> dict:
    """Constants and options of attention to the cache."""
    block_d = max(16, triton.next_power_of_2(head_dim))
    if block_d > 256:
        raise ValueError(
            f"head_dim is {head_dim}; attention to the cache has room for 256. BMOJO_KERNELS=torch does without."
        )
    exact = "tf32x3" if architecture == "ampere" and block_d <= 128 else "ieee"
    return {
        "D": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_M": max(16, triton.next_power_of_2(group)),
        "BLOCK_N": min(64, max(16, 8192 // (block_d * itemsize))),  # up to 8 KiB of keys, as much of values
        "PRECISION": exact if itemsize == 4 else "ieee",
        "num_warps": 4,
        "num_stages": 1 if architecture == "amd" else 3,
        "enable_fp_fusion": True,
    }


@torch.library.custom_op(f"{_NAMESPACE}::cache_attention", mutates_args=())
def _cache_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    eidetic_query: torch.Tensor | None,
    fading_query: torch.Tensor | None,
    eidetic_key: torch.Tensor | None,
    fading: int,
    memory: int,
) -> torch.Tensor:
    rows, _, heads, head_dim = query.shape
    kv_heads, slots = key.shape[1:3]
    out = query.new_empty(query.shape)
    if not out.numel():
        return out
    mask = mask.expand(rows * kv_heads, 1, slots)
    if mask.stride(2) != 1:
        mask = mask.contiguous()
    group = heads // kv_heads
    chosen = attention_settings(head_dim, group, out.element_size(), architecture(query.device))
    asking = [(None, 0) if x is None else _rows(x) for x in (query, eidetic_query, fading_query)]
    (query, query_stride), (eidetic_query, eidetic_stride), (fading_query, fading_stride) = asking
    blocks = triton.cdiv(slots, chosen["BLOCK_N"])
    per_split = triton.cdiv(blocks, min(blocks, triton.cdiv(_PROGRAMS, rows * kv_heads))) * chosen["BLOCK_N"]
    splits = triton.cdiv(slots, per_split)
    parts = [None] * 3
    if splits > 1:
        sizes = (rows * heads, splits, head_dim), (rows * heads, splits), (rows * heads, splits)
        parts = [query.new_empty(size, dtype=torch.float32) for size in sizes]
    with on_device_of(query):
        _cache_attention_kernel[rows * kv_heads * splits,](
            query,
            key.contiguous(),
            value.contiguous(),
            mask,
            eidetic_query,
            fading_query,
            None if eidetic_key is None else eidetic_key.contiguous(),
            out,
            *parts,
            query_stride,
            eidetic_stride,
            fading_stride,
            mask.stride(0),
            slots,
            fading,
            memory,
            splits,
            per_split,
            KV_HEADS=kv_heads,
            GROUP=group,
            **chosen,
        )
        if splits > 1:
            _merge_kernel[rows * heads,](*parts, out, splits, D=head_dim, BLOCK_D=chosen["BLOCK_D"], **_MERGE)
    return out


@_cache_attention.register_fake
def _(query, *others):
    return query.new_empty(query.shape)


def cache_attention(
    query,
    key,
    value,
    mask,
    eidetic_query=None,
    fading_query=None,
    eidetic_key=None,
    *,
    fading: int | None = None,
    memory: int | None = None,
):
    """See `ops_bmojo.cache_attention`. Computes in the dtype of the query, sums in float32."""
    if eidetic_query is None:
        memory = key.shape[2]
    if fading_query is None:
        fading = memory
    return _cache_attention(query, key, value, mask, eidetic_query, fading_query, eidetic_key, fading, memory)


# ----------------------------------------------------------------------------------------------------------------------
# The memory after a chunk
# ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def _candidates(window_score_ptr, memory_score_ptr, number, first, size, chunk, ring):
    """Scores of the memory's places and, behind them, of the tokens at the positions first, first + 1, ... if they may enter."""
    position = first + (number - size)
    enters = (number >= size) & (number < size + chunk) & (position >= 0)
    entering = tl.load(window_score_ptr + position % ring, mask=enters, other=-float("inf"))
    kept = tl.load(memory_score_ptr + number, mask=number < size, other=-float("inf"))
    return tl.where(number < size, kept, entering), position


@triton.jit(do_not_specialize=["size", "chunk", "ring"])
def _select_kernel(
    window_score_ptr,
    memory_score_ptr,
    memory_position_ptr,
    past_ptr,
    boundary_ptr,
    index_ptr,
    new_score_ptr,
    new_position_ptr,
    size,
    chunk,
    ring,
    BLOCK: tl.constexpr,
):
    """Which candidates stay: those with fewer than `size` better ones, of equals the earlier; in the order of time."""
    row = tl.program_id(0).to(tl.int64)
    window_score_ptr += row * ring
    memory_score_ptr += row * size
    first = tl.load(past_ptr + row) - ring + 1
    first = tl.where(tl.load(boundary_ptr + row) != 0, first, -chunk)  # below 0 are no tokens: none enters
    taken = 0
    for start in range(0, size + chunk, BLOCK):
        number = start + tl.arange(0, BLOCK)
        score, position = _candidates(window_score_ptr, memory_score_ptr, number, first, size, chunk, ring)
        better = tl.zeros([BLOCK], dtype=tl.int32)
        for other_start in range(0, size + chunk, BLOCK):
            other = other_start + tl.arange(0, BLOCK)
            rival, _ = _candidates(window_score_ptr, memory_score_ptr, other, first, size, chunk, ring)
            ahead = rival[None, :] > score[:, None]
            ahead = ahead | ((rival[None, :] == score[:, None]) & (other[None, :] < number[:, None]))
            better += tl.sum(ahead.to(tl.int32), 1)
        stays = (better < size) & (number < size + chunk)
        place = taken + tl.cumsum(stays.to(tl.int32), 0) - 1
        taken += tl.sum(stays.to(tl.int32), 0)
        stays = stays & (place < size)  # a score that is no number would not be counted
        place = row * size + place
        held = tl.load(memory_position_ptr + row * size + number, mask=number < size, other=0)
        tl.store(index_ptr + place, number, mask=stays)
        tl.store(new_score_ptr + place, score, mask=stays)
        tl.store(new_position_ptr + place, tl.where(number < size, held, position), mask=stays)


@triton.jit(do_not_specialize=["size", "chunk", "ring", "slots"])
def _move_kernel(
    key_ptr,
    value_ptr,
    index_ptr,
    past_ptr,
    cos_ptr,
    sin_ptr,
    size,
    chunk,
    ring,
    slots,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Keys and values of one head to their new places, in place.

    Indices ascend, so that a place takes from itself or from a later one: what a block reads, no block before it wrote.
    """
    pair = tl.program_id(0).to(tl.int64)
    row = pair // KV_HEADS
    key_ptr += pair * slots * D
    value_ptr += pair * slots * D
    memory = slots - size
    first = tl.load(past_ptr + row) - ring + 1
    column = tl.arange(0, BLOCK_D)
    partner = column
    if WIDTH > 0:
        partner = tl.where(column < WIDTH, (column + WIDTH // 2) % WIDTH, column)
    for start in range(0, size, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        source = tl.load(index_ptr + row * size + place, mask=place < size, other=0)
        moves = (place < size) & (source != place)
        enters = moves & (source >= size)
        slot = tl.where(enters, (first + (source - size)) % ring, memory + source)
        key = _load(key_ptr, slot, D, moves, D, BLOCK_D)
        value = _load(value_ptr, slot, D, moves, D, BLOCK_D)
        turns = enters[:, None] & (column < D)[None, :]
        token = (row * chunk + source - size)[:, None]
        cos = tl.load(cos_ptr + token * D + column[None, :], mask=turns, other=1.0)
        turns = turns & (column < WIDTH)[None, :]
        sin = tl.load(sin_ptr + token * WIDTH + column[None, :], mask=turns, other=0.0)
        across = tl.load(key_ptr + slot[:, None] * D + partner[None, :], mask=turns, other=0.0)
        key = key.to(tl.float32) * cos.to(tl.float32) + across.to(tl.float32) * sin.to(tl.float32)
        tl.debug_barrier()  # all have read before one writes
        _store(key_ptr, memory + place, D, moves, key, D, BLOCK_D)
        _store(value_ptr, memory + place, D, moves, value, D, BLOCK_D)


_SELECT = {"BLOCK": 64, "num_warps": 4, "enable_fp_fusion": True}


def move_settings(head_dim: int, width: int) -> dict:
    """Constants and options of the move; width: how many entries of a head are rotated."""
    block_d = triton.next_power_of_2(head_dim)
    sizes = {"D": head_dim, "WIDTH": width, "BLOCK_D": block_d, "BLOCK_N": max(1, 2048 // block_d)}
    return sizes | {"num_warps": 4, "enable_fp_fusion": True}


@torch.library.custom_op(f"{_NAMESPACE}::update_memory_", mutates_args=("key", "value"))
def _update_memory_(
    key: torch.Tensor,
    value: torch.Tensor,
    window_innovation: torch.Tensor,
    eidetic_innovation: torch.Tensor,
    eidetic_position: torch.Tensor,
    past: torch.Tensor,
    boundary: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Overwrites the memory's keys and values; returns its innovation and positions."""
    rows, kv_heads, slots, head_dim = key.shape
    new = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (eidetic_innovation, eidetic_position)]
    sizes = {"size": eidetic_innovation.shape[1], "chunk": cos.shape[1], "ring": window_innovation.shape[1]}
    if not new[0].numel():
        return tuple(new)
    index = torch.empty_like(new[1], dtype=torch.int32)
    past, whole = past.contiguous(), [x.contiguous() for x in (key, value)]
    with on_device_of(key):
        _select_kernel[rows,](
            window_innovation.contiguous(),
            eidetic_innovation.contiguous(),
            eidetic_position.contiguous(),
            past,
            boundary.contiguous().view(torch.uint8),
            index,
            *new,
            **sizes,
            **_SELECT,
        )
        _move_kernel[rows * kv_heads,](
            *whole,
            index,
            past,
            cos.contiguous(),
            sin.contiguous(),
            **sizes,
            slots=slots,
            KV_HEADS=kv_heads,
            **move_settings(head_dim, sin.shape[-1]),
        )
    for x, copy in zip((key, value), whole, strict=True):
        if copy is not x:
            x.copy_(copy)
    return tuple(new)


@_update_memory_.register_fake
def _(key, value, window_innovation, eidetic_innovation, eidetic_position, *others):
    memory = eidetic_innovation, eidetic_position
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in memory)


def update_memory(
    key,
    value,
    window_innovation,
    eidetic_innovation,
    eidetic_position,
    past,
    boundary,
    cos,
    sin,
    in_place: bool = False,
):
    """See `ops_bmojo.update_memory`. Keys are rotated in float32."""
    if not in_place:
        key, value = key.clone(), value.clone()
    memory = eidetic_innovation, eidetic_position
    return key, value, *_update_memory_(key, value, window_innovation, *memory, past, boundary, cos, sin)


# ----------------------------------------------------------------------------------------------------------------------
# For the report
# ----------------------------------------------------------------------------------------------------------------------


def launches(itemsize: int, architecture: str):
    """What `compile_report.py` compiles: both scans with states of several sizes, attention and memory with heads of several."""
    wide = dict.fromkeys(("dt_ptr", "A_ptr", "state_ptr", "new_ptr", "y_ptr"), "*fp32")
    for groups, state_size in ((1, 64), (1, 128), (8, 256), (64, 128)):
        constants = scan_settings(4096, groups, 64, False, state_size)
        is_default = (groups, state_size) == (1, 64)
        yield Launch(f"_scan_step_kernel ssd {groups} {state_size}", _scan_step_kernel, wide, constants, is_default)
    constants = scan_settings(4096, 1, 4096, True, 16)
    yield Launch("_scan_step_kernel selective 16", _scan_step_kernel, wide, constants, True)

    sums = dict.fromkeys(("mask_ptr", "mixed_ptr", "top_ptr", "total_ptr"), "*fp32")
    whole = sums | dict.fromkeys(("mixed_ptr", "top_ptr", "total_ptr"))
    alone = whole | dict.fromkeys(("eidetic_query_ptr", "fading_query_ptr", "eidetic_key_ptr"))
    for head_dim in (16, 64, 128, 256):
        constants = {"KV_HEADS": 8, "GROUP": 4} | attention_settings(head_dim, 4, itemsize, architecture)
        for title, types in (("", sums), (" whole", whole), (" window alone", alone)):
            name = f"_cache_attention_kernel {head_dim}{title}"
            yield Launch(name, _cache_attention_kernel, types, constants, head_dim == 64 and not title)
        constants = {"D": head_dim, "BLOCK_D": head_dim} | _MERGE
        yield Launch(f"_merge_kernel {head_dim}", _merge_kernel, sums, constants, head_dim == 64)
    scores = dict.fromkeys(("window_score_ptr", "memory_score_ptr", "new_score_ptr", "cos_ptr", "sin_ptr"), "*fp32")
    integers = dict.fromkeys(("memory_position_ptr", "new_position_ptr", "past_ptr"), "*i64")
    types = scores | integers | {"index_ptr": "*i32", "boundary_ptr": "*u8"}
    yield Launch("_select_kernel", _select_kernel, types, _SELECT, True)
    for head_dim in (16, 64, 128, 256):
        constants = {"KV_HEADS": 8} | move_settings(head_dim, head_dim)
        yield Launch(f"_move_kernel {head_dim}", _move_kernel, types, constants, head_dim == 64)
