"""Mamba's scan: see `ops_bmojo.selective_scan`.

A program has BLOCK_D channels of one row, with all their states in registers, and goes through one block of T tokens.
The blocks of a sequence run side by side, in three launches: what each adds to a state of zeros; the chain of the
blocks, which gives the state at the start of each; and the outputs. A decay over a block is exp(A * sum of dt), so that
chaining takes one number per channel and block beside the states.

States exist at the starts of blocks. The backward pass walks a block forward once more, for the state before every EVERY
tokens and for what the block adds to the gradient of the state before it; chains those gradients; and walks the block
backward in steps, for which it makes the states of one step anew in registers. It is deterministic: what is summed over
channels, time or rows is written in parts, which are then added up in a fixed order.
"""

import functools

import torch
import triton
import triton.language as tl

from .shared import Launch, namespace, on_device_of


LOG2E = 1.4426950408889634
_LOG2E = tl.constexpr(LOG2E)


# ----------------------------------------------------------------------------------------------------------------------
# Parts
# ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def _program(chunks, CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr):
    """This program's channels, block of tokens and row of the batch."""
    blocks: tl.constexpr = (CHANNELS + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    block = program % blocks
    return (
        block,
        block * BLOCK_D + tl.arange(0, BLOCK_D),
        program // blocks % chunks,
        (program // blocks // chunks).to(tl.int64),
    )


@triton.jit
def _of_token(ptr, token, exists, number, SIZE: tl.constexpr):
    """The numbers of one token in float32; 0 for a token that does not exist, which as dt leaves the state as it is."""
    return tl.load(ptr + token * SIZE + number, mask=number < tl.where(exists, SIZE, 0), other=0.0).to(tl.float32)


@triton.jit
def _to_token(ptr, numbers, token, exists, number, SIZE: tl.constexpr):
    tl.store(ptr + token * SIZE + number, numbers.to(ptr.dtype.element_ty), mask=number < tl.where(exists, SIZE, 0))


@triton.jit
def _matrix(channel, state, CHANNELS: tl.constexpr, N: tl.constexpr):
    """Places and mask of a (CHANNELS, N) matrix."""
    return channel[:, None] * N + state[None, :], (channel < CHANNELS)[:, None] & (state < N)[None, :]


@triton.jit
def _step(state, x, dt, B, log2_decay):
    """The state after a token, and its decay. Channels and states beyond their number stay 0."""
    decay = tl.exp2(dt[:, None] * log2_decay)
    return decay * state + (dt * x)[:, None] * B[None, :], decay


# ----------------------------------------------------------------------------------------------------------------------
# Forward
# ----------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["seq_len", "chunks"])
def _selective_local_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    added_ptr,
    total_ptr,
    seq_len,
    chunks,
    CHANNELS: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    T: tl.constexpr,
    STEP: tl.constexpr,
):
    """What every block of tokens adds to the state, (rows, chunks, channels, n), and its sum of dt, (rows, chunks, channels)."""
    _, channel, chunk, row = _program(chunks, CHANNELS, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    place, inside = _matrix(channel, n, CHANNELS, N)
    log2_decay = tl.load(A_ptr + place, mask=inside, other=0.0).to(tl.float32) * _LOG2E
    first = row * seq_len + chunk * T
    x_ptr += first * CHANNELS
    dt_ptr += first * CHANNELS
    B_ptr += first * N
    length = tl.minimum(T, seq_len - chunk * T)
    state = tl.zeros([BLOCK_D, BLOCK_N], dtype=tl.float32)
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for start in range(0, length, STEP):
        for i in tl.static_range(STEP):
            exists = start + i < length
            x = _of_token(x_ptr, start + i, exists, channel, CHANNELS)
            dt = _of_token(dt_ptr, start + i, exists, channel, CHANNELS)
            B = _of_token(B_ptr, start + i, exists, n, N)
            state = _step(state, x, dt, B, log2_decay)[0]
            total += dt
    block = row * chunks + chunk
    tl.store(added_ptr + block * (CHANNELS * N) + place, state, mask=inside)
    tl.store(total_ptr + block * CHANNELS + channel, total, mask=channel < CHANNELS)


@triton.jit(do_not_specialize=["chunks"])
def _selective_chain_kernel(
    added_ptr,
    total_ptr,
    A_ptr,
    edge_ptr,
    start_ptr,
    last_ptr,
    chunks,
    CHANNELS: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Chains the blocks: the state that each begins with, `edge` the first, and the one behind all. REVERSE: of gradients, from the end."""
    blocks: tl.constexpr = (CHANNELS * N + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    number = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = number < CHANNELS * N
    log2_decay = tl.load(A_ptr + number, mask=inside, other=0.0).to(tl.float32) * _LOG2E
    if edge_ptr is not None:
        state = tl.load(edge_ptr + row * (CHANNELS * N) + number, mask=inside, other=0.0).to(tl.float32)
    else:
        state = tl.zeros([BLOCK], dtype=tl.float32)
    for i in range(0, chunks):
        block = row * chunks + (chunks - 1 - i if REVERSE else i)
        added = tl.load(added_ptr + block * (CHANNELS * N) + number, mask=inside, other=0.0)
        total = tl.load(total_ptr + block * CHANNELS + number // N, mask=inside, other=0.0)
        tl.store(start_ptr + block * (CHANNELS * N) + number, state, mask=inside)
        state = tl.exp2(total * log2_decay) * state + added
    tl.store(last_ptr + row * (CHANNELS * N) + number, state, mask=inside)


@triton.jit(do_not_specialize=["seq_len", "chunks"])
def _selective_fwd_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    start_ptr,
    y_ptr,
    seq_len,
    chunks,
    CHANNELS: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    T: tl.constexpr,
    STEP: tl.constexpr,
):
    """The outputs of every block of tokens, from the state that it begins with."""
    _, channel, chunk, row = _program(chunks, CHANNELS, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    place, inside = _matrix(channel, n, CHANNELS, N)
    log2_decay = tl.load(A_ptr + place, mask=inside, other=0.0).to(tl.float32) * _LOG2E
    first = row * seq_len + chunk * T
    x_ptr += first * CHANNELS
    dt_ptr += first * CHANNELS
    B_ptr += first * N
    C_ptr += first * N
    y_ptr += first * CHANNELS
    length = tl.minimum(T, seq_len - chunk * T)
    state = tl.load(start_ptr + (row * chunks + chunk) * (CHANNELS * N) + place, mask=inside, other=0.0)
    for start in range(0, length, STEP):
        for i in tl.static_range(STEP):
            exists = start + i < length
            x = _of_token(x_ptr, start + i, exists, channel, CHANNELS)
            dt = _of_token(dt_ptr, start + i, exists, channel, CHANNELS)
            B = _of_token(B_ptr, start + i, exists, n, N)
            C = _of_token(C_ptr, start + i, exists, n, N)
            state = _step(state, x, dt, B, log2_decay)[0]
            y = tl.sum(state * C[None, :], 1)
            _to_token(y_ptr, y, start + i, exists, channel, CHANNELS)


# ----------------------------------------------------------------------------------------------------------------------
# Backward
# ----------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["seq_len", "chunks", "marks"])
def _selective_bwd_local_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    start_ptr,
    d_y_ptr,
    mark_ptr,
    d_added_ptr,
    total_ptr,
    seq_len,
    chunks,
    marks,
    CHANNELS: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    T: tl.constexpr,
    STEP: tl.constexpr,
    EVERY: tl.constexpr,
):
    """The state before every EVERY tokens, and what every block adds to the gradient of the state before it."""
    _, channel, chunk, row = _program(chunks, CHANNELS, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    place, inside = _matrix(channel, n, CHANNELS, N)
    log2_decay = tl.load(A_ptr + place, mask=inside, other=0.0).to(tl.float32) * _LOG2E
    first = row * seq_len + chunk * T
    x_ptr += first * CHANNELS
    dt_ptr += first * CHANNELS
    B_ptr += first * N
    C_ptr += first * N
    d_y_ptr += first * CHANNELS
    mark_ptr += (row * marks + chunk * (T // EVERY)) * (CHANNELS * N)
    length = tl.minimum(T, seq_len - chunk * T)
    block = row * chunks + chunk
    state = tl.load(start_ptr + block * (CHANNELS * N) + place, mask=inside, other=0.0)
    through = tl.full([BLOCK_D, BLOCK_N], 1.0, dtype=tl.float32)  # the decay from the block's start
    d_added = tl.zeros([BLOCK_D, BLOCK_N], dtype=tl.float32)
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for start in range(0, length, STEP):
        if start % EVERY == 0:
            tl.store(mark_ptr + start // EVERY * (CHANNELS * N) + place, state, mask=inside)
        for i in tl.static_range(STEP):
            exists = start + i < length
            x = _of_token(x_ptr, start + i, exists, channel, CHANNELS)
            dt = _of_token(dt_ptr, start + i, exists, channel, CHANNELS)
            B = _of_token(B_ptr, start + i, exists, n, N)
            C = _of_token(C_ptr, start + i, exists, n, N)
            d_y = _of_token(d_y_ptr, start + i, exists, channel, CHANNELS)
            state, decay = _step(state, x, dt, B, log2_decay)
            through *= decay
            d_added += through * (d_y[:, None] * C[None, :])
            total += dt
    tl.store(d_added_ptr + block * (CHANNELS * N) + place, d_added, mask=inside)
    tl.store(total_ptr + block * CHANNELS + channel, total, mask=channel < CHANNELS)


@triton.jit(do_not_specialize=["seq_len", "chunks", "marks"])
def _selective_bwd_kernel(
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    mark_ptr,
    d_y_ptr,
    d_end_ptr,
    d_x_ptr,
    d_dt_ptr,
    d_A_ptr,
    d_B_ptr,
    d_C_ptr,
    seq_len,
    chunks,
    marks,
    CHANNELS: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    T: tl.constexpr,
    STEP: tl.constexpr,
    EVERY: tl.constexpr,
):
    """Gradients of x and dt; of A for every block of tokens, (rows, chunks, channels, n); of B and C for every block of channels."""
    part, channel, chunk, row = _program(chunks, CHANNELS, BLOCK_D)
    parts: tl.constexpr = (CHANNELS + BLOCK_D - 1) // BLOCK_D
    n = tl.arange(0, BLOCK_N)
    place, inside = _matrix(channel, n, CHANNELS, N)
    log2_decay = tl.load(A_ptr + place, mask=inside, other=0.0).to(tl.float32) * _LOG2E
    first = row * seq_len + chunk * T
    x_ptr += first * CHANNELS
    dt_ptr += first * CHANNELS
    B_ptr += first * N
    C_ptr += first * N
    d_y_ptr += first * CHANNELS
    d_x_ptr += first * CHANNELS
    d_dt_ptr += first * CHANNELS
    offset = ((row * parts + part) * seq_len + chunk * T) * N
    d_B_ptr += offset
    d_C_ptr += offset
    mark_ptr += (row * marks + chunk * (T // EVERY)) * (CHANNELS * N)
    block = row * chunks + chunk
    length = tl.minimum(T, seq_len - chunk * T)
    d_state = tl.load(d_end_ptr + block * (CHANNELS * N) + place, mask=inside, other=0.0)
    d_A = tl.zeros([BLOCK_D, BLOCK_N], dtype=tl.float32)
    count = tl.cdiv(length, STEP)
    for passed in range(0, count):
        start = (count - 1 - passed) * STEP
        state = tl.load(mark_ptr + start // EVERY * (CHANNELS * N) + place, mask=inside, other=0.0)
        for token in range(start // EVERY * EVERY, start):
            x = _of_token(x_ptr, token, token < length, channel, CHANNELS)
            dt = _of_token(dt_ptr, token, token < length, channel, CHANNELS)
            B = _of_token(B_ptr, token, token < length, n, N)
            state = _step(state, x, dt, B, log2_decay)[0]
        states = ()
        for i in tl.static_range(STEP):
            exists = start + i < length
            x = _of_token(x_ptr, start + i, exists, channel, CHANNELS)
            dt = _of_token(dt_ptr, start + i, exists, channel, CHANNELS)
            B = _of_token(B_ptr, start + i, exists, n, N)
            d_y = _of_token(d_y_ptr, start + i, exists, channel, CHANNELS)
            states = states + (state,)  # noqa: RUF005 - what Triton can compile
            state = _step(state, x, dt, B, log2_decay)[0]
            _to_token(d_C_ptr, tl.sum(state * d_y[:, None], 0), start + i, exists, n, N)
        for back in tl.static_range(STEP):
            token = start + STEP - 1 - back
            exists = token < length
            x = _of_token(x_ptr, token, exists, channel, CHANNELS)
            dt = _of_token(dt_ptr, token, exists, channel, CHANNELS)
            B = _of_token(B_ptr, token, exists, n, N)
            C = _of_token(C_ptr, token, exists, n, N)
            d_y = _of_token(d_y_ptr, token, exists, channel, CHANNELS)
            d_state += d_y[:, None] * C[None, :]
            d_B = tl.sum(d_state * (dt * x)[:, None], 0)
            d_added = tl.sum(d_state * B[None, :], 1)  # of dt * x
            d_state *= tl.exp2(dt[:, None] * log2_decay)
            d_exponent = d_state * states[STEP - 1 - back]  # of dt * A
            d_A += d_exponent * dt[:, None]
            d_dt = x * d_added + tl.sum(d_exponent * log2_decay, 1) / _LOG2E
            _to_token(d_x_ptr, dt * d_added, token, exists, channel, CHANNELS)
            _to_token(d_dt_ptr, d_dt, token, exists, channel, CHANNELS)
            _to_token(d_B_ptr, d_B, token, exists, n, N)
    tl.store(d_A_ptr + block * (CHANNELS * N) + place, d_A, mask=inside)


# ----------------------------------------------------------------------------------------------------------------------
# Launches
# ----------------------------------------------------------------------------------------------------------------------


_T = 64  # tokens of a block
_EVERY = 8  # tokens from one state that the backward pass writes to the next
_CHAIN = {"BLOCK": 128, "num_warps": 4, "enable_fp_fusion": True}
# (BLOCK_D, STEP, num_warps) of the kernels "forward", "states", "backward", by the largest BLOCK_N
_BLOCKS = {
    8: ((64, 4, 1), (64, 2, 1), (64, 4, 1)),
    16: ((32, 4, 1), (32, 2, 1), (32, 4, 1)),
    32: ((32, 4, 2), (32, 2, 2), (32, 4, 2)),
    64: ((32, 4, 4), (32, 2, 4), (32, 4, 4)),
}
_KERNELS = ("forward", "states", "backward")


@functools.cache
def settings(kernel: str, channels: int, state_size: int) -> dict:
    """Constants and options of a launch, by what a program has room for: never by a length, for which it would compile anew.

    The reasons are in the README; `compile_report.py` shows what fits.
    """
    block_n = triton.next_power_of_2(state_size)
    if block_n > 64:
        raise ValueError(
            f"state_size is {state_size}; the kernel of Mamba's scan has room for 64. BMOJO_KERNELS=torch does without."
        )
    block_d, step, num_warps = _BLOCKS[max(8, block_n)][_KERNELS.index(kernel)]
    return {
        "CHANNELS": channels,
        "N": state_size,
        "BLOCK_D": block_d,
        "BLOCK_N": block_n,
        "T": _T,
        "STEP": step,
        "EVERY": _EVERY,
        "num_warps": num_warps,
        "enable_fp_fusion": True,
    }


_NAMESPACE = namespace(__name__)


@torch.library.custom_op(f"{_NAMESPACE}::forward", mutates_args=())
def _forward(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    initial_state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output, the last state, and the state at the start of every block, (rows, chunks, channels, state_size); all float32."""
    x, dt, A, B, C = (tensor.contiguous() for tensor in (x, dt, A, B, C))
    rows, seq_len, channels = x.shape
    y, last, starts = _empty_outputs(x, A)
    chunks = starts.shape[1]
    added, totals = torch.empty_like(starts), starts.new_empty(starts.shape[:3])
    chosen = settings("forward", channels, A.shape[1])
    grid = (triton.cdiv(channels, chosen["BLOCK_D"]) * chunks * rows,)
    with on_device_of(x):
        if seq_len:
            _selective_local_kernel[grid](x, dt, A, B, added, totals, seq_len=seq_len, chunks=chunks, **chosen)
        edge = None if initial_state is None else initial_state.contiguous()
        _chain(added, totals, A, edge, starts, last, reverse=False)
        if seq_len:
            _selective_fwd_kernel[grid](x, dt, A, B, C, starts, y, seq_len=seq_len, chunks=chunks, **chosen)
    return y, last, starts


def _chain(added, totals, A, edge, starts, last, reverse: bool):
    rows, chunks, channels, state_size = added.shape
    _selective_chain_kernel[triton.cdiv(channels * state_size, _CHAIN["BLOCK"]) * rows,](
        added, totals, A, edge, starts, last, chunks=chunks, CHANNELS=channels, N=state_size, REVERSE=reverse, **_CHAIN
    )


@_forward.register_fake
def _(x, dt, A, B, C, initial_state):
    return _empty_outputs(x, A)


def _empty_outputs(x, A):
    rows, seq_len, channels = x.shape
    shapes = (rows, seq_len, channels), (rows, *A.shape), (rows, -(-seq_len // _T), *A.shape)
    return tuple(x.new_empty(shape, dtype=torch.float32) for shape in shapes)


@torch.library.custom_op(f"{_NAMESPACE}::backward", mutates_args=())
def _backward(
    d_y: torch.Tensor | None,
    d_last: torch.Tensor | None,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    starts: torch.Tensor,
) -> list[torch.Tensor]:
    """The gradients of x, dt, A, B, C, and of the initial state in float32."""
    x, dt, A, B, C = (tensor.contiguous() for tensor in (x, dt, A, B, C))
    rows, seq_len, channels = x.shape
    chunks, state_size = starts.shape[1], A.shape[1]
    chosen, for_states = (settings(kind, channels, state_size) for kind in ("backward", "states"))
    places, parts = chunks * (_T // _EVERY), triton.cdiv(channels, chosen["BLOCK_D"])
    d_y = x.new_zeros(x.shape, dtype=torch.float32) if d_y is None else d_y.contiguous()
    d_x, d_dt, _, _, _, d_initial = _empty_gradients(x, dt, A, B, C)
    marks = starts.new_empty(rows, places, channels, state_size)
    d_added, d_ends, d_A = (torch.empty_like(starts) for _ in range(3))
    totals = starts.new_empty(starts.shape[:3])
    d_B, d_C = (starts.new_empty(rows, parts, seq_len, state_size) for _ in range(2))
    sizes = {"seq_len": seq_len, "chunks": chunks, "marks": places}
    grid, grid_of_states = ((triton.cdiv(channels, kind["BLOCK_D"]) * chunks * rows,) for kind in (chosen, for_states))
    with on_device_of(x):
        if seq_len:
            _selective_bwd_local_kernel[grid_of_states](
                x, dt, A, B, C, starts, d_y, marks, d_added, totals, **sizes, **for_states
            )
        edge = None if d_last is None else d_last.contiguous()
        _chain(d_added, totals, A, edge, d_ends, d_initial, reverse=True)
        if seq_len:
            _selective_bwd_kernel[grid](
                x, dt, A, B, C, marks, d_y, d_ends, d_x, d_dt, d_A, d_B, d_C, **sizes, **chosen
            )
    summed = (d_A.sum((0, 1)).to(A.dtype), d_B.sum(1).to(B.dtype), d_C.sum(1).to(C.dtype))
    return [d_x, d_dt, *summed, d_initial]


@_backward.register_fake
def _(d_y, d_last, x, dt, A, B, C, starts):
    return _empty_gradients(x, dt, A, B, C)


def _empty_gradients(x, dt, A, B, C):
    empty = [tensor.new_empty(tensor.shape) for tensor in (x, dt, A, B, C)]
    return [*empty, x.new_empty(x.shape[0], *A.shape, dtype=torch.float32)]


def _setup_context(ctx, inputs, output):
    *tensors, initial_state = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.initial_dtype = None if initial_state is None else initial_state.dtype
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, d_y, d_last, _):
    if d_y is None and d_last is None:  # nothing depends on the outputs
        return (None,) * 6
    *grads, d_initial = _backward(d_y, d_last, *ctx.saved_tensors)
    return *grads, None if ctx.initial_dtype is None else d_initial.to(ctx.initial_dtype)


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def selective_scan(x, dt, A, B, C, initial_state=None, chunk_size: int = 64):
    """See `ops_bmojo.selective_scan`. chunk_size changes nothing."""
    return _forward(x, dt, A, B, C, initial_state)[:2]


def launches(itemsize: int, architecture: str):
    """What `compile_report.py` compiles: all kernels for state sizes of all settings, and the chain."""
    names = "added total start edge last mark d_y d_added d_end d_A d_B d_C A".split()
    types = dict.fromkeys([f"{name}_ptr" for name in names], "*fp32")
    forward = [("forward", _selective_local_kernel), ("forward", _selective_fwd_kernel)]
    backward = [("states", _selective_bwd_local_kernel), ("backward", _selective_bwd_kernel)]
    for state_size in (8, 12, 16, 32, 64):
        for kind, kernel in backward if state_size == 12 else forward + backward:
            chosen = settings(kind, 1536, state_size)
            yield Launch(f"{kernel.__name__} {state_size}", kernel, types, chosen)
    if itemsize == 4:  # it has nothing in the dtype of the inputs
        chosen = {"CHANNELS": 1536, "N": 16} | _CHAIN
        for name, reverse, absent in (("", False, {}), (" from zeros", True, {"edge_ptr": None})):
            name = f"{_selective_chain_kernel.__name__}{name}"
            yield Launch(name, _selective_chain_kernel, types | absent, chosen | {"REVERSE": reverse})
