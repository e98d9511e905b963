"""One token of each row: the step of both scans; see `ops_bmojo`.

Decoding moves bytes and computes little: every kernel reads states once, in blocks that follow each other in memory,
and asks nothing of the host, so that a CUDA graph can hold it. There are no gradients: where one is recorded the
definitions run.
"""

import torch
import triton
import triton.language as tl

from .shared import Launch, namespace, on_device_of


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
# For the report
# ----------------------------------------------------------------------------------------------------------------------


def launches(itemsize: int, architecture: str):
    """What `compile_report.py` compiles: both scans, with states of several sizes."""
    wide = dict.fromkeys(("dt_ptr", "A_ptr", "state_ptr", "new_ptr", "y_ptr"), "*fp32")
    for groups, state_size in ((1, 64), (1, 128), (8, 256), (64, 128)):
        constants = scan_settings(4096, groups, 64, False, state_size)
        is_default = (groups, state_size) == (1, 64)
        yield Launch(f"_scan_step_kernel ssd {groups} {state_size}", _scan_step_kernel, wide, constants, is_default)
    constants = scan_settings(4096, 1, 4096, True, 16)
    yield Launch("_scan_step_kernel selective 16", _scan_step_kernel, wide, constants, True)
