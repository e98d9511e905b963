"""Mamba2's scan: see `ops_bmojo.ssd_scan`, whose letters these are.

Time is cut in blocks of BLOCK_T tokens. Kernel "state" runs over BLOCKS of them, a chunk, with a state in registers: first
over all chunks at once from zeros, for what each adds, which kernel "pass" sums over the chunks; then once more from these
sums, to write the state before every block. Kernel "fwd" reads it, and has one block of one head per program.

The gradient of the state is the same scan from the end to the start, of d_y and C in place of x and B. The backward pass
runs both scans, and then the gradients of a block are products within it: of x and dt by head, of B and C in programs that
add up several heads of a group in registers. Nothing is added atomically, so the same bits come every time.

Products take the dtype of x, sums float32. Logarithms of decays are to base 2 and add up from the start of a block.
"""

import functools

import torch
import triton
import triton.language as tl

from .shared import Launch, architecture, dot, namespace, on_device_of


_LOG2E = tl.constexpr(1.4426950408889634)


# ----------------------------------------------------------------------------------------------------------------------
# Blocks
# ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def _load(ptr, stride, rows, first, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK, BLOCK_D) of a matrix with D columns, from its column `first` on; 0 beyond its `rows` rows and its columns."""
    row = tl.arange(0, BLOCK)
    column = first + tl.arange(0, BLOCK_D)
    mask = (row < rows)[:, None]
    if D % BLOCK_D != 0:
        mask = mask & (column < D)[None, :]
    return tl.load(ptr + row[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def _store(ptr, stride, rows, first, block, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.arange(0, BLOCK)
    column = first + tl.arange(0, BLOCK_D)
    mask = (row < rows)[:, None]
    if D % BLOCK_D != 0:
        mask = mask & (column < D)[None, :]
    tl.store(ptr + row[:, None] * stride + column[None, :], block.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _steps(dt_ptr, A, HEADS: tl.constexpr, rows, BLOCK_T: tl.constexpr):
    """dt, the log decay from the block's start to every token, and that to its end. Tokens that do not exist have dt 0.

    A step below 2^-160, in float32 0, counts as that: sums of more would round off what lies between two tokens.
    """
    token = tl.arange(0, BLOCK_T)
    dt = tl.load(dt_ptr + token * HEADS, mask=token < rows, other=0.0)
    log = dt * (A * _LOG2E)
    log = tl.cumsum(tl.where(log < -160.0, -160.0, log), 0)  # tl.maximum would lose NaN
    return dt, log, tl.sum(tl.where(token == BLOCK_T - 1, log, 0.0), 0)


@triton.jit
def _program(times, COLUMNS: tl.constexpr, HEADS: tl.constexpr):
    """This program's block of columns, head or group, block or chunk of time, and row of the batch; neighbours share tokens."""
    program = tl.program_id(0)
    rest = program // (COLUMNS * HEADS)
    return program % COLUMNS, program // COLUMNS % HEADS, rest % times, (rest // times).to(tl.int64)


# ----------------------------------------------------------------------------------------------------------------------
# States
# ----------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["seq_len", "chunks"])
def _ssd_state_kernel(
    value_ptr,
    vector_ptr,
    dt_ptr,
    A_ptr,
    begin_ptr,
    states_ptr,
    log_ptr,
    last_ptr,
    seq_len,
    chunks,
    stride_value_b,
    stride_value_t,
    stride_vector_b,
    stride_vector_t,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCKS: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The scan of a chunk: state = decay * state + value vector^T, of x and B forwards, of d_y and C in reverse.

    With log_ptr it begins with zeros, and writes the state after the chunk to states_ptr and the log decay over the chunk
    to log_ptr. Without, it begins with the chunk's state in begin_ptr, or zeros, and writes the state before every block to
    states_ptr, and that after the last chunk to last_ptr.
    """
    BLOCKS_N: tl.constexpr = tl.cdiv(N, BLOCK_N)
    column, head, chunk, row = _program(chunks, tl.cdiv(P, BLOCK_P) * BLOCKS_N, HEADS)
    first_p = column // BLOCKS_N * BLOCK_P
    first_n = column % BLOCKS_N * BLOCK_N
    blocks = tl.cdiv(seq_len, BLOCK_T)
    count = tl.minimum(BLOCKS, blocks - chunk * BLOCKS)
    A = tl.load(A_ptr + head)
    value_ptr += row * stride_value_b + head * P
    vector_ptr += row * stride_vector_b + head // (HEADS // GROUPS) * N
    dtype = vector_ptr.dtype.element_ty
    place = (row * chunks + chunk) * HEADS + head  # among the chunks' states
    corner = first_p * N
    state = tl.zeros([BLOCK_P, BLOCK_N], dtype=tl.float32)
    if begin_ptr is not None:
        state = _load(begin_ptr + place * (P * N) + corner, N, P - first_p, first_n, N, BLOCK_P, BLOCK_N)
    through = 0.0
    for i in range(count):
        block = chunk * BLOCKS + (count - 1 - i if REVERSE else i)
        start = tl.cast(block, tl.int64) * BLOCK_T
        rows = seq_len - block * BLOCK_T
        if log_ptr is None:
            ptr = states_ptr + ((row * blocks + block) * HEADS + head) * (P * N) + corner
            _store(ptr, N, P - first_p, first_n, state, N, BLOCK_P, BLOCK_N)
        value = _load(value_ptr + start * stride_value_t, stride_value_t, rows, first_p, P, BLOCK_T, BLOCK_P)
        vector = _load(vector_ptr + start * stride_vector_t, stride_vector_t, rows, first_n, N, BLOCK_T, BLOCK_N)
        dt, log, end = _steps(dt_ptr + (row * seq_len + start) * HEADS + head, A, HEADS, rows, BLOCK_T)
        weight = tl.exp2(log) if REVERSE else dt * tl.exp2(end - log)
        value = (value.to(tl.float32) * weight[:, None]).to(dtype)
        state = dot(tl.trans(value), vector, state * tl.exp2(end), PRECISION)
        through += end
    if log_ptr is not None:
        ptr = states_ptr + place * (P * N) + corner
        _store(ptr, N, P - first_p, first_n, state, N, BLOCK_P, BLOCK_N)
        tl.store(log_ptr + place, through, mask=column == 0)
    if last_ptr is not None:  # noqa: SIM102 - known when the kernel is compiled, the other is not
        if chunk == (0 if REVERSE else chunks - 1):
            ptr = last_ptr + (row * HEADS + head) * (P * N) + corner
            _store(ptr, N, P - first_p, first_n, state, N, BLOCK_P, BLOCK_N)


@triton.jit(do_not_specialize=["chunks"])
def _ssd_pass_kernel(
    states_ptr,
    log_ptr,
    begin_ptr,
    chunks,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """From what every chunk adds, (batch, chunks, HEADS, SIZE), to the state before it (behind it, in REVERSE), in place."""
    column, head, _, row = _program(1, tl.cdiv(SIZE, BLOCK), HEADS)
    number = column * BLOCK + tl.arange(0, BLOCK)
    exists = number < SIZE
    state = tl.zeros([BLOCK], dtype=tl.float32)
    if begin_ptr is not None:
        state = tl.load(begin_ptr + (row * HEADS + head) * SIZE + number, mask=exists, other=0.0)
    for i in range(chunks):
        place = (row * chunks + (chunks - 1 - i if REVERSE else i)) * HEADS + head
        added = tl.load(states_ptr + place * SIZE + number, mask=exists, other=0.0)
        tl.store(states_ptr + place * SIZE + number, state, mask=exists)
        state = state * tl.exp2(tl.load(log_ptr + place)) + added


# ----------------------------------------------------------------------------------------------------------------------
# Forward
# ----------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["seq_len"])
def _ssd_fwd_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    begin_ptr,
    y_ptr,
    seq_len,
    stride_xb,
    stride_xt,
    stride_Bb,
    stride_Bt,
    stride_Cb,
    stride_Ct,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The outputs of a block: what its tokens read of the state before it, and of each other."""
    blocks = tl.cdiv(seq_len, BLOCK_T)
    column, head, block, row = _program(blocks, tl.cdiv(P, BLOCK_P), HEADS)
    start = tl.cast(block, tl.int64) * BLOCK_T
    rows = seq_len - block * BLOCK_T
    group = head // (HEADS // GROUPS)
    B_ptr += row * stride_Bb + start * stride_Bt + group * N
    C_ptr += row * stride_Cb + start * stride_Ct + group * N
    first = column * BLOCK_P
    begin_ptr += ((row * blocks + block) * HEADS + head) * (P * N) + first * N
    score = tl.zeros([BLOCK_T, BLOCK_T], dtype=tl.float32)  # of token l, that takes, and s, that gives
    y = tl.zeros([BLOCK_T, BLOCK_P], dtype=tl.float32)
    for n in range(0, N, BLOCK_N):
        B = _load(B_ptr, stride_Bt, rows, n, N, BLOCK_T, BLOCK_N)
        C = _load(C_ptr, stride_Ct, rows, n, N, BLOCK_T, BLOCK_N)
        begin = _load(begin_ptr, N, P - first, n, N, BLOCK_P, BLOCK_N)
        score = dot(C, tl.trans(B), score, PRECISION)
        y = dot(C, tl.trans(begin), y, PRECISION)

    place = (row * seq_len + start) * HEADS + head
    dt, log, _ = _steps(dt_ptr + place, tl.load(A_ptr + head), HEADS, rows, BLOCK_T)
    token = tl.arange(0, BLOCK_T)
    gap = log[:, None] - log[None, :]
    gap = tl.where(token[:, None] >= token[None, :], gap, -float("inf"))  # exp2 of a large future gap would overflow
    weight = score * tl.exp2(gap) * dt[None, :]
    x = _load(x_ptr + row * stride_xb + start * stride_xt + head * P, stride_xt, rows, first, P, BLOCK_T, BLOCK_P)
    y = dot(weight.to(x.dtype), x, y * tl.exp2(log)[:, None], PRECISION)
    _store(y_ptr + place * P, HEADS * P, rows, first, y, P, BLOCK_T, BLOCK_P)


# ----------------------------------------------------------------------------------------------------------------------
# Backward: matrices of pairs have the token that gives, s, in rows, and the one that takes, l, in columns
# ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def _decays(log, BLOCK_T: tl.constexpr):
    """From s to l, (s, l); 0 where l is earlier."""
    token = tl.arange(0, BLOCK_T)
    gap = log[None, :] - log[:, None]
    return tl.exp2(tl.where(token[:, None] <= token[None, :], gap, -float("inf")))


@triton.jit(do_not_specialize=["seq_len"])
def _ssd_bwd_inputs_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    d_y_ptr,
    begin_ptr,
    d_end_ptr,
    d_x_ptr,
    d_dt_ptr,
    d_A_ptr,
    seq_len,
    stride_xb,
    stride_xt,
    stride_Bb,
    stride_Bt,
    stride_Cb,
    stride_Ct,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of x and dt of a block, and what it has for A, (batch, blocks, heads), still to be added up."""
    blocks = tl.cdiv(seq_len, BLOCK_T)
    _, head, block, row = _program(blocks, 1, HEADS)
    start = tl.cast(block, tl.int64) * BLOCK_T
    rows = seq_len - block * BLOCK_T
    group = head // (HEADS // GROUPS)
    x_ptr += row * stride_xb + start * stride_xt + head * P
    B_ptr += row * stride_Bb + start * stride_Bt + group * N
    C_ptr += row * stride_Cb + start * stride_Ct + group * N
    place = (row * seq_len + start) * HEADS + head  # among tokens and heads
    state_place = (row * blocks + block) * HEADS + head
    dtype = x_ptr.dtype.element_ty

    score = tl.zeros([BLOCK_T, BLOCK_T], dtype=tl.float32)
    for n in range(0, N, BLOCK_N):
        B = _load(B_ptr, stride_Bt, rows, n, N, BLOCK_T, BLOCK_N)
        C = _load(C_ptr, stride_Ct, rows, n, N, BLOCK_T, BLOCK_N)
        score = dot(B, tl.trans(C), score, PRECISION)

    A = tl.load(A_ptr + head)
    dt, log, end = _steps(dt_ptr + place, A, HEADS, rows, BLOCK_T)
    weight = score * _decays(log, BLOCK_T)
    token = tl.arange(0, BLOCK_T)
    d_dt = tl.zeros([BLOCK_T], dtype=tl.float32)  # by way of what a token gives
    d_log = tl.zeros([BLOCK_T], dtype=tl.float32)
    given = tl.zeros([BLOCK_T], dtype=tl.float32)
    passed = 0.0
    d_weight = tl.zeros([BLOCK_T, BLOCK_T], dtype=tl.float32)
    for p in range(0, P, BLOCK_P):
        read = tl.zeros([BLOCK_T, BLOCK_P], dtype=tl.float32)  # of the state before the block
        d_x = tl.zeros([BLOCK_T, BLOCK_P], dtype=tl.float32)
        for n in range(0, N, BLOCK_N):
            B = _load(B_ptr, stride_Bt, rows, n, N, BLOCK_T, BLOCK_N)
            C = _load(C_ptr, stride_Ct, rows, n, N, BLOCK_T, BLOCK_N)
            begin = _load(begin_ptr + state_place * (P * N) + p * N, N, P - p, n, N, BLOCK_P, BLOCK_N)
            d_end = _load(d_end_ptr + state_place * (P * N) + p * N, N, P - p, n, N, BLOCK_P, BLOCK_N)
            read = dot(C, tl.trans(begin), read, PRECISION)
            d_x = dot(B, tl.trans(d_end), d_x, PRECISION)
            passed += tl.sum(begin.to(tl.float32) * d_end.to(tl.float32))
        x = _load(x_ptr, stride_xt, rows, p, P, BLOCK_T, BLOCK_P)
        d_y = _load(d_y_ptr + place * P, HEADS * P, rows, p, P, BLOCK_T, BLOCK_P).to(dtype)
        d_log += tl.sum(d_y.to(tl.float32) * read, 1) * tl.exp2(log)
        d_x *= tl.exp2(end - log)[:, None]
        given += tl.sum(x.to(tl.float32) * d_x, 1) * dt
        d_weight = dot(x, tl.trans(d_y), d_weight, PRECISION)
        d_x = dot(weight.to(dtype), d_y, d_x, PRECISION)
        d_dt += tl.sum(x.to(tl.float32) * d_x, 1)
        _store(d_x_ptr + place * P, HEADS * P, rows, p, d_x * dt[:, None], P, BLOCK_T, BLOCK_P)

    d_gap = tl.where(token[:, None] < token[None, :], d_weight * weight * dt[:, None], 0.0)
    d_log += tl.sum(d_gap, 0) - tl.sum(d_gap, 1)
    # a step's log decay is in the gaps that it lies in, in what tokens before it give to the end, and in the whole
    d_step = tl.cumsum(d_log, 0, reverse=True) + tl.cumsum(given, 0) - given + tl.exp2(end) * passed
    tl.store(d_dt_ptr + place + token * HEADS, d_dt + A * d_step, mask=token < rows)
    tl.store(d_A_ptr + state_place, tl.sum(dt * d_step, 0))


@triton.jit(do_not_specialize=["seq_len"])
def _ssd_bwd_vectors_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    d_y_ptr,
    begin_ptr,
    d_end_ptr,
    d_B_ptr,
    d_C_ptr,
    seq_len,
    stride_xb,
    stride_xt,
    stride_Bb,
    stride_Bt,
    stride_Cb,
    stride_Ct,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What BLOCK_H heads of a group have for B and C of a block, (batch, seq_len, groups, parts of a group, state_size)."""
    PER_GROUP: tl.constexpr = HEADS // GROUPS
    PARTS: tl.constexpr = tl.cdiv(PER_GROUP, BLOCK_H)
    BLOCKS_N: tl.constexpr = tl.cdiv(N, BLOCK_N)
    blocks = tl.cdiv(seq_len, BLOCK_T)
    column, group, block, row = _program(blocks, BLOCKS_N * PARTS, GROUPS)
    n = column % BLOCKS_N * BLOCK_N
    part = column // BLOCKS_N
    start = tl.cast(block, tl.int64) * BLOCK_T
    rows = seq_len - block * BLOCK_T
    x_ptr += row * stride_xb + start * stride_xt
    dtype = x_ptr.dtype.element_ty
    d_score = tl.zeros([BLOCK_T, BLOCK_T], dtype=tl.float32)
    d_B = tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.float32)
    d_C = tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.float32)
    first_head = group * PER_GROUP + part * BLOCK_H
    for head in range(first_head, tl.minimum(first_head + BLOCK_H, (group + 1) * PER_GROUP)):
        place = (row * seq_len + start) * HEADS + head
        state_place = (row * blocks + block) * HEADS + head
        dt, log, end = _steps(dt_ptr + place, tl.load(A_ptr + head), HEADS, rows, BLOCK_T)
        d_weight = tl.zeros([BLOCK_T, BLOCK_T], dtype=tl.float32)
        for p in range(0, P, BLOCK_P):
            x = _load(x_ptr + head * P, stride_xt, rows, p, P, BLOCK_T, BLOCK_P)
            d_y = _load(d_y_ptr + place * P, HEADS * P, rows, p, P, BLOCK_T, BLOCK_P)
            begin = _load(begin_ptr + state_place * (P * N) + p * N, N, P - p, n, N, BLOCK_P, BLOCK_N)
            d_end = _load(d_end_ptr + state_place * (P * N) + p * N, N, P - p, n, N, BLOCK_P, BLOCK_N)
            d_weight = dot(x, tl.trans(d_y.to(dtype)), d_weight, PRECISION)
            given = x.to(tl.float32) * (dt * tl.exp2(end - log))[:, None]
            d_B = dot(given.to(dtype), d_end, d_B, PRECISION)
            d_read = d_y * tl.exp2(log)[:, None]
            d_C = dot(d_read.to(dtype), begin, d_C, PRECISION)
        d_score += d_weight * _decays(log, BLOCK_T) * dt[:, None]
    B_ptr += row * stride_Bb + start * stride_Bt + group * N
    C_ptr += row * stride_Cb + start * stride_Ct + group * N
    B = _load(B_ptr, stride_Bt, rows, n, N, BLOCK_T, BLOCK_N)
    C = _load(C_ptr, stride_Ct, rows, n, N, BLOCK_T, BLOCK_N)
    d_B = dot(d_score.to(dtype), C, d_B, PRECISION)
    d_C = dot(tl.trans(d_score.to(dtype)), B, d_C, PRECISION)
    place = (((row * seq_len + start) * GROUPS + group) * PARTS + part) * N
    _store(d_B_ptr + place, GROUPS * PARTS * N, rows, n, d_B, N, BLOCK_T, BLOCK_N)
    _store(d_C_ptr + place, GROUPS * PARTS * N, rows, n, d_C, N, BLOCK_T, BLOCK_N)


# ----------------------------------------------------------------------------------------------------------------------
# Launches
# ----------------------------------------------------------------------------------------------------------------------


# (BLOCK_T, BLOCK_P, BLOCK_N, num_warps) of the kernels, by bytes per number. BLOCK_T is one for "inputs" and "vectors", which
# read the same states; "state" has that of those it works for, so that its first number is not used
_BLOCKS = {
    ("ampere", 2): {
        "fwd": (64, 64, 32, 4),
        "inputs": (64, 16, 32, 8),
        "vectors": (64, 16, 64, 8),
        "state": (64, 64, 32, 8),
    },
    ("ampere", 4): {
        "fwd": (64, 32, 16, 4),
        "inputs": (16, 32, 16, 2),
        "vectors": (16, 32, 32, 4),
        "state": (64, 16, 32, 4),
    },
    ("turing", 2): {
        "fwd": (32, 32, 16, 4),
        "inputs": (32, 16, 16, 4),
        "vectors": (32, 16, 16, 4),
        "state": (32, 32, 32, 4),
    },
    ("turing", 4): {
        "fwd": (32, 16, 16, 4),
        "inputs": (16, 16, 16, 4),
        "vectors": (16, 16, 16, 4),
        "state": (32, 32, 32, 4),
    },
    ("amd", 2): {
        "fwd": (64, 64, 32, 4),
        "inputs": (64, 32, 32, 4),
        "vectors": (64, 32, 32, 4),
        "state": (64, 64, 64, 4),
    },
    ("amd", 4): {
        "fwd": (64, 32, 32, 4),
        "inputs": (32, 32, 32, 4),
        "vectors": (32, 32, 32, 4),
        "state": (64, 32, 64, 4),
    },
}
_CHUNK = 512  # tokens of a chunk
_BLOCK_H = 8  # heads of a group that add up their gradients of B and C in registers
_PASS = {"BLOCK": 256, "num_warps": 4, "enable_fp_fusion": True}


@functools.cache
def settings(kernel: str, head_dim: int, state_size: int, itemsize: int, architecture: str) -> dict:
    """Constants and options of a launch, by what a program has room for: never by a length, for which it would compile anew.

    `kernel`: "fwd", "inputs", "vectors", or "fwd state" and "bwd state", the scans that these need. The reasons are in the
    README; `compile_report.py` shows what fits.
    """
    blocks = _BLOCKS[architecture, itemsize]
    of, _, is_state = kernel.partition(" ")
    block_t = blocks["fwd" if of == "fwd" else "inputs"][0]
    _, block_p, block_n, num_warps = blocks["state" if is_state else of]
    more = {"BLOCK_H": _BLOCK_H} if kernel == "vectors" else {"BLOCKS": _CHUNK // block_t} if is_state else {}
    # loads of the next step while one computes, where registers suffice; "state" then has room for two programs instead
    ahead = architecture == "ampere" and itemsize == 2 and kernel in ("fwd", "inputs")
    return more | {
        "P": head_dim,
        "N": state_size,
        "BLOCK_P": min(block_p, max(16, triton.next_power_of_2(head_dim))),
        "BLOCK_N": min(block_n, max(16, triton.next_power_of_2(state_size))),
        "BLOCK_T": block_t,
        "PRECISION": "tf32x3" if itemsize == 4 and architecture == "ampere" else "ieee",
        "num_warps": num_warps,
        "num_stages": 2 if ahead else 1,
        "enable_fp_fusion": True,
    }


def _dense(tensor):
    """The tensor with its last two axes contiguous, and the strides of the first two: parts of one projection are not copied."""
    if tensor.stride(3) != 1 or tensor.stride(2) != tensor.shape[3]:
        tensor = tensor.contiguous()
    return tensor, *tensor.stride()[:2]


def _contiguous(*tensors):
    return [None if x is None else x.contiguous() for x in tensors]


class _Launches:
    """What the launches for one call have in common."""

    def __init__(self, x, dt, A, B, C):
        self.rows, self.seq_len, self.heads, self.head_dim = x.shape
        self.groups, self.state_size = B.shape[2:]
        self.chunks = max(1, triton.cdiv(self.seq_len, _CHUNK))
        self.chosen = x.element_size(), architecture(x.device)
        (self.dt, self.A), (self.x, *x_strides) = _contiguous(dt, A), _dense(x)
        (self.B, *B_strides), (self.C, *C_strides) = _dense(B), _dense(C)
        self.strides = *x_strides, *B_strides, *C_strides

    def settings(self, kernel: str):
        chosen = settings(kernel, self.head_dim, self.state_size, *self.chosen)
        return {"HEADS": self.heads, "GROUPS": self.groups} | chosen

    def blocks(self, chosen) -> int:
        return triton.cdiv(self.seq_len, chosen["BLOCK_T"])

    def states(self, of: str, begin, last, d_y=None):
        """The states before all blocks, (batch, blocks, heads, head_dim, state_size); with d_y their gradients behind the blocks.

        begin: the first (with d_y: the last) state, or None for zeros; last: None, or where the one at the other end goes.
        """
        chosen = self.settings(f"{of} state") | {"REVERSE": d_y is not None}
        (value, *strides), (vector, *more) = (_dense(x) for x in ((self.x, self.B) if d_y is None else (d_y, self.C)))
        inputs, strides = (value, vector, self.dt, self.A), (*strides, *more)
        tiles = triton.cdiv(self.head_dim, chosen["BLOCK_P"]) * triton.cdiv(self.state_size, chosen["BLOCK_N"])
        grid = (tiles * self.heads * self.chunks * self.rows,)
        shape = self.heads, self.head_dim, self.state_size
        if self.chunks > 1:
            sums = self.A.new_empty(self.rows, self.chunks, *shape)
            logs = self.A.new_empty(self.rows, self.chunks, self.heads)
            _ssd_state_kernel[grid](*inputs, None, sums, logs, None, self.seq_len, self.chunks, *strides, **chosen)
            size = self.head_dim * self.state_size
            passes = (triton.cdiv(size, _PASS["BLOCK"]) * self.heads * self.rows,)
            options = {"HEADS": self.heads, "SIZE": size, "REVERSE": d_y is not None} | _PASS
            _ssd_pass_kernel[passes](sums, logs, begin, self.chunks, **options)
            begin = sums
        states = vector.new_empty(self.rows, self.blocks(chosen), *shape)
        _ssd_state_kernel[grid](*inputs, begin, states, None, last, self.seq_len, self.chunks, *strides, **chosen)
        return states


_NAMESPACE = namespace(__name__)


@torch.library.custom_op(f"{_NAMESPACE}::forward", mutates_args=())
def _forward(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    initial_state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs and the last state, both float32. x, B and C have one dtype, the others are float32."""
    y, last = _empty_outputs(x, B)
    call = _Launches(x, dt, A, B, C)
    chosen = call.settings("fwd")
    grid = (triton.cdiv(call.head_dim, chosen["BLOCK_P"]) * call.heads * call.blocks(chosen) * call.rows,)
    with on_device_of(x):
        begin = call.states("fwd", *_contiguous(initial_state), last)
        _ssd_fwd_kernel[grid](call.x, call.dt, call.A, call.B, call.C, begin, y, call.seq_len, *call.strides, **chosen)
    return y, last


@_forward.register_fake
def _(x, dt, A, B, C, initial_state):
    return _empty_outputs(x, B)


def _empty_outputs(x, B):
    rows, _, heads, head_dim = x.shape
    y = x.new_empty(x.shape, dtype=torch.float32)
    return y, x.new_empty(rows, heads, head_dim, B.shape[3], dtype=torch.float32)


@torch.library.custom_op(f"{_NAMESPACE}::backward", mutates_args=())
def _backward(
    d_y: torch.Tensor,
    d_last: torch.Tensor | None,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    initial_state: torch.Tensor | None,
) -> list[torch.Tensor]:
    """The gradients of the tensors that there are, in the order of the arguments."""
    call = _Launches(x, dt, A, B, C)
    chosen, of_vectors = call.settings("inputs"), call.settings("vectors")
    blocks = call.blocks(chosen)
    parts = triton.cdiv(call.heads // call.groups, of_vectors["BLOCK_H"])
    d_x, d_dt, _, _, _, *d_initial = _empty_gradients(x, dt, A, B, C, initial_state)
    d_A = A.new_empty(call.rows, blocks, call.heads)
    d_B, d_C = (A.new_empty(*B.shape[:3], parts, call.state_size) for _ in range(2))
    initial_state, d_last, d_y = _contiguous(initial_state, d_last, d_y)
    with on_device_of(x):
        begin = call.states("bwd", initial_state, None)
        d_end = call.states("bwd", d_last, d_initial[0] if d_initial else None, d_y)
        inputs = call.x, call.dt, call.A, call.B, call.C, d_y, begin, d_end
        grid = (call.heads * blocks * call.rows,)
        _ssd_bwd_inputs_kernel[grid](*inputs, d_x, d_dt, d_A, call.seq_len, *call.strides, **chosen)
        grid = (triton.cdiv(call.state_size, of_vectors["BLOCK_N"]) * parts * call.groups * blocks * call.rows,)
        _ssd_bwd_vectors_kernel[grid](*inputs, d_B, d_C, call.seq_len, *call.strides, **of_vectors)
    return [d_x, d_dt, d_A.sum((0, 1)), d_B.sum(3).to(B.dtype), d_C.sum(3).to(C.dtype), *d_initial]


@_backward.register_fake
def _(d_y, d_last, *tensors):
    return _empty_gradients(*tensors)


def _empty_gradients(*tensors):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors if x is not None]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, d_y, d_last):
    x, *others = ctx.saved_tensors
    if d_y is None and d_last is None:  # nothing depends on the outputs
        return (None,) * 6
    if d_y is None:
        d_y = torch.zeros_like(x, dtype=torch.float32)
    grads = _backward(d_y, d_last, x, *others)
    return *grads, *([None] * (6 - len(grads)))


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def ssd_scan(x, dt, A, B, C, initial_state=None, chunk_size: int = 64):
    """See `ops_bmojo.ssd_scan`. Blocks are cut to fit a GPU; chunk_size changes nothing.

    With x, B and C in 16 bits, products round decays and what they read of states to these too; all sums, and with them the
    states, are in float32.
    """
    dtype = functools.reduce(torch.promote_types, (B.dtype, C.dtype), x.dtype)
    x, B, C = (
        _dense(tensor.to(dtype))[0] for tensor in (x, B, C)
    )  # out here: what is copied is then saved, and only once
    return _forward(x, dt.float(), A.float(), B, C, None if initial_state is None else initial_state.float())


def launches(itemsize: int, architecture: str):
    """What `compile_report.py` compiles: all kernels for many sizes, and their options at one of them."""
    types = {f"{name}_ptr": "*fp32" for name in "dt A log last y d_y d_dt d_A d_B d_C".split()}
    backwards = {"value_ptr": "*fp32"}
    chunks = {"begin_ptr": None, "states_ptr": "*fp32", "last_ptr": None}
    before = {"begin_ptr": "*fp32", "log_ptr": None}

    def launch(kernel, kind, size, what="", reverse=False, **other):
        shape = {"HEADS": 32, "GROUPS": 1, "REVERSE": reverse}
        name = f"{kernel.__name__} P {size[0]} N {size[1]}{' reverse' * reverse}{what}"
        return Launch(name, kernel, types | other, shape | settings(kind, *size, itemsize, architecture))

    for size in ((16, 16), (16, 128), (32, 64), (64, 64), (64, 128), (80, 96), (128, 16), (128, 128), (64, 256)):
        yield launch(_ssd_fwd_kernel, "fwd", size)
        yield launch(_ssd_bwd_inputs_kernel, "inputs", size)
        yield launch(_ssd_bwd_vectors_kernel, "vectors", size)
        yield launch(_ssd_state_kernel, "fwd state", size, **before)
        yield launch(_ssd_state_kernel, "bwd state", size, reverse=True, **before, **backwards)
    size = 64, 128
    yield launch(_ssd_state_kernel, "fwd state", size, " chunks", **chunks)
    yield launch(_ssd_state_kernel, "bwd state", size, " chunks", reverse=True, **chunks, **backwards)
    yield launch(_ssd_state_kernel, "bwd state", size, " again", **before | {"begin_ptr": None, "last_ptr": None})
    for reverse in (False, True):
        sums = types | {"states_ptr": "*fp32", "begin_ptr": "*fp32"}
        constants = {"HEADS": 32, "SIZE": 64 * 128, "REVERSE": reverse} | _PASS
        yield Launch(f"_ssd_pass_kernel{' reverse' * reverse}", _ssd_pass_kernel, sums, constants)
