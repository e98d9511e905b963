"""The short causal convolution over time: see `ops_bmojo.causal_conv`.

Tokens stay in the rows and channels in the columns, as the scans want them; torch's conv1d would have both turned over.
A program has BLOCK_T tokens of BLOCK_C channels and reads them once for every tap, but for the first time from the
cache. The backward pass is deterministic: every program writes its sums over tokens, which torch adds up.
"""

import torch
import triton
import triton.language as tl

from .shared import Launch, namespace, on_device_of


_BLOCKS = {"BLOCK_T": 32, "BLOCK_C": 64, "num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _program(blocks, CHANNELS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's channels, first token and row of the batch, and the number of its block of tokens."""
    columns: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    block = program // columns
    channel = program % columns * BLOCK_C + tl.arange(0, BLOCK_C)
    return channel, block % blocks * BLOCK_T, (block // blocks).to(tl.int64), block.to(tl.int64)


@triton.jit
def _weights(weight_ptr, channel, tap, CHANNELS: tl.constexpr, TAPS: tl.constexpr):
    return tl.load(weight_ptr + channel * TAPS + tap, mask=channel < CHANNELS, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["seq_len"])
def _conv_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    seq_len,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channel, first, row, _ = _program(tl.cdiv(seq_len, BLOCK_T), CHANNELS, BLOCK_T, BLOCK_C)
    token = tl.arange(0, BLOCK_T)
    real = (first + token < seq_len)[:, None] & (channel < CHANNELS)[None, :]
    place = token[:, None] * CHANNELS + channel[None, :]
    x_ptr += (row * (seq_len + TAPS - 1) + first) * CHANNELS
    total = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float32)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(TAPS):
        weight = _weights(weight_ptr, channel, tap, CHANNELS, TAPS)
        total += tl.load(x_ptr + tap * CHANNELS + place, mask=real, other=0.0).to(tl.float32) * weight[None, :]
    tl.store(y_ptr + (row * seq_len + first) * CHANNELS + place, total.to(y_ptr.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["seq_len"])
def _conv_bwd_kernel(
    x_ptr,
    weight_ptr,
    d_y_ptr,
    d_x_ptr,
    part_ptr,
    seq_len,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradients of BLOCK_T inputs; and what as many outputs give to every weight, and, behind the last tap, to the bias."""
    length = seq_len + TAPS - 1
    channel, first, row, block = _program(tl.cdiv(length, BLOCK_T), CHANNELS, BLOCK_T, BLOCK_C)
    token = tl.arange(0, BLOCK_T)
    within = channel < CHANNELS
    place = token[:, None] * CHANNELS + channel[None, :]
    x_ptr += (row * length + first) * CHANNELS
    d_x_ptr += (row * length + first) * CHANNELS
    d_y_ptr += (row * seq_len + first) * CHANNELS
    part_ptr += block * (TAPS + 1) * CHANNELS
    real = (first + token < seq_len)[:, None] & within[None, :]
    given = tl.load(d_y_ptr + place, mask=real, other=0.0).to(tl.float32)
    d_x = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float32)
    for tap in tl.static_range(TAPS):
        weight = _weights(weight_ptr, channel, tap, CHANNELS, TAPS)
        output = first + token - tap  # the one that this tap led to
        reached = ((output >= 0) & (output < seq_len))[:, None] & within[None, :]
        d_x += tl.load(d_y_ptr - tap * CHANNELS + place, mask=reached, other=0.0).to(tl.float32) * weight[None, :]
        x = tl.load(x_ptr + tap * CHANNELS + place, mask=real, other=0.0).to(tl.float32)
        tl.store(part_ptr + tap * CHANNELS + channel, tl.sum(given * x, 0), mask=within)
    tl.store(part_ptr + TAPS * CHANNELS + channel, tl.sum(given, 0), mask=within)
    exists = (first + token < length)[:, None] & within[None, :]
    tl.store(d_x_ptr + place, d_x.to(d_x_ptr.dtype.element_ty), mask=exists)


def _grid(rows: int, tokens: int, channels: int):
    return (triton.cdiv(channels, _BLOCKS["BLOCK_C"]) * triton.cdiv(tokens, _BLOCKS["BLOCK_T"]) * rows,)


_NAMESPACE = namespace(__name__)


@torch.library.custom_op(f"{_NAMESPACE}::forward", mutates_args=())
def _forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    x, weight = x.contiguous(), weight.contiguous()
    y = _empty_output(x, weight)
    rows, seq_len, channels = y.shape
    with on_device_of(x):
        _conv_fwd_kernel[_grid(rows, seq_len, channels)](
            *(x, weight, None if bias is None else bias.contiguous(), y),
            seq_len=seq_len,
            CHANNELS=channels,
            TAPS=weight.shape[1],
            **_BLOCKS,
        )
    return y


@_forward.register_fake
def _(x, weight, bias):
    return _empty_output(x, weight)


def _empty_output(x, weight):
    return x.new_empty(x.shape[0], x.shape[1] - weight.shape[1] + 1, x.shape[2])


@torch.library.custom_op(f"{_NAMESPACE}::backward", mutates_args=())
def _backward(
    d_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x, and of the weight and the bias in float32."""
    d_y, x, weight = d_y.contiguous(), x.contiguous(), weight.contiguous()
    (rows, length, channels), taps = x.shape, weight.shape[1]
    d_x = torch.empty_like(x)
    blocks = triton.cdiv(length, _BLOCKS["BLOCK_T"])
    parts = x.new_empty(rows * blocks, taps + 1, channels, dtype=torch.float32)
    with on_device_of(x):
        _conv_bwd_kernel[_grid(rows, length, channels)](
            *(x, weight, d_y, d_x, parts), seq_len=d_y.shape[1], CHANNELS=channels, TAPS=taps, **_BLOCKS
        )
    total = parts.sum(0)
    return d_x, total[:taps].T.contiguous(), total[taps].clone()


@_backward.register_fake
def _(d_y, x, weight):
    wide = {"dtype": torch.float32}
    return (
        torch.empty_like(x.contiguous()),
        weight.new_empty(weight.shape, **wide),
        weight.new_empty(len(weight), **wide),
    )


def _setup_context(ctx, inputs, output):
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _differentiate(ctx, d_y):
    x, weight = ctx.saved_tensors
    d_x, d_weight, d_bias = _backward(d_y, x, weight)
    return d_x, d_weight.to(weight.dtype), None if ctx.bias_dtype is None else d_bias.to(ctx.bias_dtype)


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def causal_conv(x, weight, bias=None):
    """See `ops_bmojo.causal_conv`. Sums in float32, whatever the dtypes."""
    return _forward(x, weight, bias)


def launches(itemsize: int, architecture: str):
    """What `compile_report.py` compiles: both passes for the usual number of taps and another, with bias and without."""
    for channels, taps in ((2304, 4), (100, 3)):
        settings = {"CHANNELS": channels, "TAPS": taps} | _BLOCKS
        name = f"{channels} channels, {taps} taps"
        yield Launch(f"{_conv_fwd_kernel.__name__} {name}", _conv_fwd_kernel, {}, settings)
        yield Launch(f"{_conv_bwd_kernel.__name__} {name}", _conv_bwd_kernel, {"part_ptr": "*fp32"}, settings)
    yield Launch(f"{_conv_fwd_kernel.__name__} without bias", _conv_fwd_kernel, {"bias_ptr": None}, settings)
