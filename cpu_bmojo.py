"""The operations of `ops_bmojo` formulated for a CPU: block after block in cache, each with a backward pass of its own.

Every `blocked_` function has the signature and the results of the definition it is named after, which runs instead wherever it
cannot: on other devices, under torch.compile and torch.func. A second derivative goes through the definition too.

What the formulations rest on, measured on one core: under autograd a slice in a loop costs a tensor of zeros of full size;
elementwise passes over tensors beyond the cache cost several times those within; batched small matrix products
run at the speed of large ones. Hence loops over blocks of time outside autograd, which save the states between blocks and
compute the rest again.

Legend of the shapes: as in `ops_bmojo`; r chunks in a block, q positions in a chunk.
"""

import functools
import math
import threading

import torch
import torch.nn.functional as F

from .numerics_bmojo import at_least_float32, no_autocast, widen
from .ops_bmojo import (
    causal_conv,
    memory_attention,
    prediction_error,
    rms_norm,
    rotate,
    selective_scan,
    silu_gate,
    ssd_scan,
)


_CPU = torch.cpu.get_capabilities()
# dtypes in which this processor multiplies a matrix and few rows faster in another way than F.linear's: for rows no more and
# no longer than, and weights of more entries than
ROW_PRODUCTS: dict[torch.dtype, tuple[int, float, int]] = {}
if torch.backends.mkl.is_available() and "AMD" in _CPU.get("cpu_name", "") and _CPU.get("avx512_f", False):
    ROW_PRODUCTS[torch.float32] = 1, 768, 2**17  # MKL reads short rows at a quarter of the memory's speed there
if torch.backends.mkldnn.is_available() and _CPU.get("amx_bf16", False):
    ROW_PRODUCTS[torch.bfloat16] = 2, math.inf, 0  # oneDNN's products of matrices begin slowly
_LOG2E = math.log2(math.e)
_ZEROS = {dtype: torch.zeros((), dtype=dtype, device="cpu") for dtype in (torch.float32, torch.bfloat16)}
_SMALL = 2**12  # elements below which one pass of the definition costs less than a loop
_BLOCK = 2**18  # elements of the largest temporary of a block: 1 MiB of float32, half of a usual L2 cache


def is_plain(x) -> bool:
    """Whether nothing looks through x: no compiler, no functional transform, no subclass of tensors."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (torch.Tensor, torch.nn.Parameter)
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
    )


class _Blocked(torch.autograd.Function):
    """Runs a class below with `forward`, `backward` and `definition`, all static, under autograd."""

    @staticmethod
    def forward(ctx, op, options, *tensors):
        with no_autocast(tensors[0]):
            outputs, saved = op.forward(*tensors, **options)
        ctx.op, ctx.options, ctx.count = op, options, len(tensors)
        ctx.save_for_backward(*tensors, *saved)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        kept = ctx.saved_tensors  # once: checkpointing computes them again at every reading
        tensors, saved = kept[: ctx.count], kept[ctx.count :]
        needed = ctx.needs_input_grad[2:]
        if all(grad is None for grad in grads):  # nothing depends on the outputs
            return (None,) * (2 + ctx.count)
        with no_autocast(tensors[0]):
            # create_graph=True: this gradient will itself be differentiated; batched: is_grads_batched, a kind of vmap
            if torch.is_grad_enabled() or any(map(_is_batched, grads)):
                found = _through_definition(ctx.op, ctx.options, tensors, grads, needed)
            else:
                found = ctx.op.backward(tensors, saved, grads, **ctx.options)
        found = (
            grad.to(tensor.dtype) if wanted else None
            for grad, tensor, wanted in zip(found, tensors, needed, strict=True)
        )
        return None, None, *found


def _is_batched(grad) -> bool:
    functorch = torch._C._functorch
    return grad is not None and (functorch.is_batchedtensor(grad) or functorch.is_legacy_batchedtensor(grad))


def _through_definition(op, options, tensors, grads, needed):
    """Gradients that can be differentiated. Of views: where one input is made from another, its way counts outside only."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        tensors = [
            tensor.view_as(tensor) if wanted else tensor for tensor, wanted in zip(tensors, needed, strict=True)
        ]
        outputs = op.definition(*tensors, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    outputs, grads = zip(
        *((output, grad) for output, grad in zip(outputs, grads, strict=True) if grad is not None), strict=True
    )
    inputs = [tensor for tensor, wanted in zip(tensors, needed, strict=True) if wanted]
    found = iter(torch.autograd.grad(outputs, inputs, grads, create_graph=create_graph, materialize_grads=True))
    return [next(found) if wanted else None for wanted in needed]


def _run(op, *tensors, **options):
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return _Blocked.apply(op, options, *tensors)
    with torch.no_grad(), no_autocast(tensors[0]):
        return op.forward(*tensors, **options)[0]


def _cut(tensor, start: int, length: int, dtype):
    """tensor[:, start : start + length] in that dtype, zeros behind its end."""
    part = tensor[:, start : start + length].to(dtype)
    missing = length - part.shape[1]
    return F.pad(part, (0, 0) * (part.dim() - 2) + (0, missing)) if missing else part


def _decay(log):
    """2 to the power of `log`, which is overwritten; 1 where it is above 0, that is, of the future."""
    lowest = -512 if log.dtype == torch.float64 else -64  # of no weight, and no product of it is denormal
    return log.clamp_(lowest, 0).exp2_()


# ----------------------------------------------------------------------------------------------------------------------
# Fading memory: the two scans
# ----------------------------------------------------------------------------------------------------------------------


def blocked_ssd_scan(x, dt, A, B, C, initial_state=None, chunk_size: int = 64):
    """See `ops_bmojo.ssd_scan`."""
    return _run(_SSDScan, x, dt, A, B, C, initial_state, chunk_size=chunk_size)


class _SSDScan:
    """The block decomposition of SSD, with what heads of a group share computed once for all of them.

    States lie as (b, g, n, h p), h the heads of a group: what goes in and out of the state is then one product per chunk.
    """

    definition = staticmethod(ssd_scan)

    @staticmethod
    def forward(x, dt, A, B, C, initial_state, chunk_size):
        block = _SSDBlock(x, dt, A, B, C, chunk_size)
        y = torch.empty_like(x, dtype=block.dtype, memory_format=torch.contiguous_format)
        state = block.first_state(initial_state)
        starts = state.new_empty(x.shape[0], -(-x.shape[1] // block.chunk), *state.shape[1:])
        for start in range(0, x.shape[1], block.length):
            block.load(start)
            held = starts[:, start // block.chunk :][:, : block.chunks]
            added = block.B.transpose(-1, -2) @ (block.weighted * block.to_end).flatten(-2)  # (b, r, g, n, h p)
            for chunk, (gain, through) in enumerate(zip(added.unbind(1), block.through.unbind(1), strict=True)):
                held[:, chunk] = state
                state = torch.addcmul(gain, through, state)
            scores, _ = block.decayed_scores()
            inside = scores @ block.heads_first(block.weighted)
            out = (block.C @ held).view_as(block.weighted) * block.since_start
            out += inside.movedim(3, 4)
            block.store(y, start, out.movedim(2, 3).flatten(3, 4))
        return (y, block.last_state(state)), (starts,)

    @staticmethod
    def backward(tensors, saved, grads, chunk_size):
        x, dt, A, B, C, initial_state = tensors
        (starts,), (dy, d_last) = saved, grads
        block = _SSDBlock(x, dt, A, B, C, chunk_size)
        dx, d_dt, dB, dC = (
            torch.empty_like(tensor, dtype=block.dtype, memory_format=torch.contiguous_format)
            for tensor in (x, dt, B, C)
        )
        dA = torch.zeros_like(block.A)
        d_state = block.first_state(d_last)
        dy = torch.zeros_like(x) if dy is None else dy
        for start in reversed(range(0, x.shape[1], block.length)):
            block.load(start)
            held = starts[:, start // block.chunk :][:, : block.chunks]
            d_out = block.by_group(_cut(dy, start, block.chunks * block.chunk, block.dtype))  # as block.weighted

            # inside the chunks
            scores, decay = block.decayed_scores()
            d_out_heads = block.heads_first(d_out)
            d_scores = (
                d_out_heads @ block.heads_first(block.weighted).transpose(-1, -2)
            ) * decay  # (b, r, g, h, q, q)
            d_weighted = scores.transpose(-1, -2) @ d_out_heads  # (b, r, g, h, q, p)
            d_product = d_scores.sum(3).tril()  # (b, r, g, q, q)
            d_scores = d_scores * block.product[:, :, :, None]
            d_log = d_scores.sum(-1) - d_scores.sum(-2)  # (b, r, g, h, q)

            # out of the states at the chunks' starts
            d_out = d_out * block.since_start
            d_log += (d_out * (block.C @ held).view_as(d_out)).sum(-1).transpose(-1, -2)
            d_out = d_out.flatten(-2)
            d_C = d_out @ held.transpose(-1, -2) + d_product @ block.B
            d_held = block.C.transpose(-1, -2) @ d_out

            # into the states at the chunks' ends
            d_ends = torch.empty_like(held)
            for chunk in reversed(range(block.chunks)):
                d_ends[:, chunk] = d_state
                d_state = torch.addcmul(d_held[:, chunk], block.through[:, chunk], d_state)
            d_through = (held * d_ends).sum(-2).unflatten(-1, (-1, x.shape[3])).sum(-1) * block.chunk_decay
            d_added = (block.B @ d_ends).view_as(block.weighted) * block.to_end
            d_to_end = (d_added * block.weighted).sum(-1).transpose(-1, -2)  # (b, r, g, h, q)
            d_log -= d_to_end
            d_log[..., -1] += d_to_end.sum(-1) + d_through
            d_B = (block.weighted * block.to_end).flatten(-2) @ d_ends.transpose(-1, -2)
            d_B += d_product.transpose(-1, -2) @ block.C

            # from the cumulative logs and the weighted inputs to what they are made of
            d_added += d_weighted.movedim(3, 4)
            d_decay = d_log.flip(-1).cumsum(-1).flip(-1)
            d_step = (d_added * block.x).sum(-1).transpose(-1, -2) + d_decay * block.A
            dA += (d_decay * block.dt).sum((0, 1, 4), keepdim=True)[0, 0]
            block.store(dx, start, (d_added * block.dt_of_channels).movedim(2, 3).flatten(3, 4))
            block.store(d_dt, start, d_step.movedim(4, 2).flatten(3, 4))
            block.store(dB, start, d_B.movedim(2, 3))
            block.store(dC, start, d_C.movedim(2, 3))
        d_initial = None if initial_state is None else block.last_state(d_state)
        return dx, d_dt, dA.flatten(), dB, dC, d_initial


class _SSDBlock:
    """A few chunks of the inputs of `ssd_scan` and what forward and backward both need of them.

    Attributes, after `load`:
        x, weighted: inputs, and inputs times dt, (b, r, g, q, h, p).
        dt, log_decay: the latter the logarithm to base 2 of the decay since the chunk's start, (b, r, g, h, q).
        B, C: (b, r, g, q, n); product: the lower triangle of C B^T, (b, r, g, q, q).
        chunk_decay: decay over a whole chunk, (b, r, g, h); `through`: the same for every channel, (b, r, g, 1, h p).
        since_start, to_end, dt_of_channels: decay from the chunk's start to a token, from it to the chunk's end, and dt,
            (b, r, g, q, h, 1).
    """

    def __init__(self, x, dt, A, B, C, chunk_size):
        batch, seq_len, heads, self.channels = x.shape
        self.tokens, self.heads, self.groups, self.state_size = x, heads, *B.shape[2:]
        self.dtype = at_least_float32(x, dt, A, B)
        self.A = A.to(self.dtype).view(self.groups, -1, 1)
        self.chunk = min(chunk_size, max(1, seq_len))
        count = -(-seq_len // self.chunk)
        per_block = max(1, _BLOCK // 2 // max(1, batch * heads * self.chunk**2))
        self.length = min(per_block, count) * self.chunk

        # all but the tokens is small: worked out once for all blocks
        dt, B, C = (_cut(tensor, 0, count * self.chunk, self.dtype).unflatten(1, (count, -1)) for tensor in (dt, B, C))
        dt = dt.unflatten(-1, (self.groups, -1)).movedim(2, 4).contiguous()  # (b, r, g, h, q)
        B, C = B.movedim(3, 2), C.movedim(3, 2)
        log_decay = (dt * (self.A * _LOG2E)).cumsum(-1)
        chunk_decay = _decay(log_decay[..., -1].clone())
        self.small = {
            "dt": dt,
            "B": B,
            "C": C,
            "product": (C @ B.transpose(-1, -2)).tril_(),
            "log_decay": log_decay,
            "chunk_decay": chunk_decay,
            "through": chunk_decay.repeat_interleave(self.channels, -1)[..., None, :],
            "dt_of_channels": dt.transpose(-1, -2)[..., None],
            "since_start": _decay(log_decay.clone()).transpose(-1, -2)[..., None],
            "to_end": _decay(log_decay[..., -1:] - log_decay).transpose(-1, -2)[..., None],
        }

    def load(self, start: int) -> None:
        first = start // self.chunk
        last = min(first + self.length // self.chunk, self.small["dt"].shape[1])
        self.chunks = last - first
        for name, tensor in self.small.items():
            setattr(self, name, tensor[:, first:last])
        self.x = self.by_group(_cut(self.tokens, start, self.chunks * self.chunk, self.dtype))
        self.weighted = self.x * self.dt_of_channels

    def decayed_scores(self):
        """What token s gives to token l inside a chunk, and the decay in it (1 where s > l), (b, r, g, h, q, q).

        The clamp at 0 bounds the decay from the future, which the lower triangle of C B^T then drops.
        """
        decay = _decay(self.log_decay[..., :, None] - self.log_decay[..., None, :])
        return decay * self.product[:, :, :, None], decay

    def by_group(self, tokens):
        """(b, r q, g h, p) to (b, r, g, q, h, p)."""
        return tokens.unflatten(1, (-1, self.chunk)).unflatten(3, (self.groups, -1)).movedim(3, 2)

    def heads_first(self, tokens):
        """(b, r, g, q, h, p) to (b, r, g, h, q, p), contiguous as batched products want it."""
        return tokens.movedim(4, 3).contiguous()

    def store(self, whole, start: int, part) -> None:
        """Write (b, r, q, ...) to the place of the block in (b, seq_len, ...)."""
        place = whole[:, start : start + self.length]
        place.copy_(part.flatten(1, 2)[:, : place.shape[1]])

    def first_state(self, state):
        """From (b, h, p, n), or None for zeros, to (b, g, n, h p)."""
        if state is None:
            shape = len(self.tokens), self.groups, self.state_size, self.heads // self.groups * self.channels
            return self.tokens.new_zeros(shape, dtype=self.dtype)
        return state.to(self.dtype).unflatten(1, (self.groups, -1)).flatten(2, 3).transpose(-1, -2)

    def last_state(self, state):
        """The way back, to (b, h, p, n)."""
        return state.transpose(-1, -2).unflatten(2, (-1, self.channels)).flatten(1, 2).contiguous()


def blocked_selective_scan(x, dt, A, B, C, initial_state=None, chunk_size: int = 64):
    """See `ops_bmojo.selective_scan`. Blocks are cut to fit the cache; chunk_size changes nothing."""
    return _run(_SelectiveScan, x, dt, A, B, C, initial_state, chunk_size=chunk_size)


class _SelectiveScan:
    """All states of a block of tokens at once, time first, and one fused multiply-add per token to chain them."""

    definition = staticmethod(selective_scan)

    @staticmethod
    def forward(x, dt, A, B, C, initial_state, chunk_size):
        block = _SelectiveBlock(x, dt, A, B, C)
        y = torch.empty_like(x, dtype=block.dtype, memory_format=torch.contiguous_format)
        state = block.first_state(initial_state)
        starts = state.new_empty(-(-x.shape[1] // block.length), *state.shape)
        for number, start in enumerate(range(0, x.shape[1], block.length)):
            starts[number] = state
            states, _ = block.run(start, state)
            state = states[-1]
            y[:, start : start + block.length] = (block.C.transpose(-1, -2) @ states).squeeze(-2).transpose(0, 1)
        return (y, state.transpose(1, 2).contiguous()), (starts,)

    @staticmethod
    def backward(tensors, saved, grads, chunk_size):
        x, dt, A, B, C, initial_state = tensors
        (starts,), (dy, d_last) = saved, grads
        block = _SelectiveBlock(x, dt, A, B, C)
        dx, d_dt, dB, dC = (
            torch.empty_like(tensor, dtype=block.dtype, memory_format=torch.contiguous_format)
            for tensor in (x, dt, B, C)
        )
        dA = torch.zeros_like(block.A)  # (n, channels)
        d_state = block.first_state(d_last)
        dy = torch.zeros_like(x) if dy is None else dy
        for number, start in reversed(list(enumerate(range(0, x.shape[1], block.length)))):
            states, decay = block.run(start, starts[number])
            place = slice(start, start + block.length)
            d_out = dy[:, place].to(block.dtype).transpose(0, 1)[:, :, None]  # (t, b, 1, channels)
            d_states = block.C * d_out  # (t, b, n, channels)
            steps, decays = d_states.unbind(0), decay.unbind(0)
            steps[-1].add_(d_state)
            for earlier, later, through in zip(steps[-2::-1], steps[:0:-1], decays[:0:-1], strict=True):
                earlier.addcmul_(through, later)
            d_state = decays[0] * steps[0]

            dC[:, place] = (states * d_out).sum(-1).transpose(0, 1)
            dB[:, place] = (d_states * block.weighted).sum(-1).transpose(0, 1)
            d_weighted = (d_states * block.B).sum(2)  # (t, b, channels)
            d_log = d_states.mul_(decay)
            d_log[0].mul_(starts[number])
            d_log[1:].mul_(states[:-1])
            dx[:, place] = (d_weighted * block.dt[:, :, 0]).transpose(0, 1)
            d_dt[:, place] = torch.addcmul((d_log * block.A).sum(2), d_weighted, block.x).transpose(0, 1)
            dA += d_log.mul_(block.dt).sum((0, 1))
        d_initial = None if initial_state is None else d_state.transpose(1, 2)
        return dx, d_dt, dA.T, dB, dC, d_initial


class _SelectiveBlock:
    """A block of the inputs of `selective_scan`, time first.

    Attributes, after `run`: x (t, b, channels); dt and weighted, that is dt x, (t, b, 1, channels); B, C (t, b, n, 1).
    `A` is (n, channels) from the beginning.
    """

    def __init__(self, x, dt, A, B, C):
        self.inputs = x, dt, B, C
        self.dtype = at_least_float32(x, dt, A, B)
        self.A = A.to(self.dtype).T.contiguous()
        self.length = max(8, min(x.shape[1], _BLOCK // max(1, x.shape[0] * A.numel())))

    def run(self, start: int, state):
        """The states after every token of the block, and the decay before it, (t, b, n, channels)."""
        x, dt, B, C = (tensor[:, start : start + self.length].to(self.dtype).transpose(0, 1) for tensor in self.inputs)
        self.x, self.dt, self.weighted = x, dt[:, :, None], (dt * x)[:, :, None]
        self.B, self.C = B[..., None], C[..., None]
        decay = _decay(self.dt * (self.A * _LOG2E))
        states = self.weighted * self.B
        previous = state
        for step, through in zip(states.unbind(0), decay.unbind(0), strict=True):
            previous = step.addcmul_(through, previous)
        return states, decay

    def first_state(self, state):
        """From (b, channels, n), or None for zeros, to (b, n, channels)."""
        if state is None:
            return self.A.new_zeros(self.inputs[0].shape[0], *self.A.shape)
        return state.to(self.dtype).transpose(1, 2)


# ----------------------------------------------------------------------------------------------------------------------
# Short causal convolution
# ----------------------------------------------------------------------------------------------------------------------


def blocked_causal_conv(x, weight, bias=None):
    """See `ops_bmojo.causal_conv`."""
    return _run(_CausalConv, x, weight, bias)[0]


class _CausalConv:
    """A sum of shifted products, block after block."""

    definition = staticmethod(causal_conv)

    @staticmethod
    def forward(x, weight, bias):
        taps, seq_len = weight.shape[1], x.shape[1] - weight.shape[1] + 1
        y = x.new_empty(x.shape[0], seq_len, x.shape[2])
        for block in _conv_blocks(x, seq_len):
            out = x[:, block] * weight[:, 0] if bias is None else torch.addcmul(bias, x[:, block], weight[:, 0])
            for tap in range(1, taps):
                into = {"out": y[:, block]} if tap == taps - 1 else {}  # a pass less than to copy
                out = torch.addcmul(out, x[:, block.start + tap : block.stop + tap], weight[:, tap], **into)
            if taps == 1:
                y[:, block] = out
        return (y,), ()

    @staticmethod
    def backward(tensors, saved, grads):
        x, weight, bias = tensors
        dy, taps, seq_len = grads[0], weight.shape[1], grads[0].shape[1]
        dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
        d_weight = torch.zeros(weight.shape[::-1], dtype=at_least_float32(x), device=x.device)
        for block in _conv_blocks(x, seq_len):
            given = dy[:, block]
            for tap in range(taps):
                place = slice(block.start + tap, block.stop + tap)
                dx[:, place].addcmul_(given, weight[:, tap])
                d_weight[tap] += (given * x[:, place]).sum((0, 1), dtype=d_weight.dtype)
        return dx, d_weight.T, None if bias is None else dy.sum((0, 1), dtype=d_weight.dtype)


def _conv_blocks(x, seq_len):
    length = max(1, _BLOCK // 2 // max(1, x.shape[0] * x.shape[2]))
    for start in range(0, seq_len, length):
        yield slice(start, min(start + length, seq_len))


# ----------------------------------------------------------------------------------------------------------------------
# One row: forms for the vectors of a single token, which callers choose by themselves, for asking would cost as much
# ----------------------------------------------------------------------------------------------------------------------


def linear_of_row(x, weight, bias=None):
    """`F.linear` of x (..., in_features) with one row or two, by the product of ROW_PRODUCTS for its dtype."""
    if x.dtype not in ROW_PRODUCTS or not _is_usual(x, weight) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    count, size = weight.shape
    if x.dtype is torch.bfloat16:
        if weight.numel() <= 2**16:  # MKL's product, and twice the bytes, are faster than oneDNN's
            return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).bfloat16()
        if x.numel() > size:
            return F.linear(x, weight, bias)
        y = torch.mv(weight, x.reshape(size))
    else:
        row, rows = x.reshape(size), 2 * _BLOCK // size
        parts = [weight] if count <= rows else weight.split(rows)
        sums = [torch.mul(part, row, out=_scratch.products(*part.shape)).sum(-1) for part in parts]
        y = sums[0] if len(sums) == 1 else torch.cat(sums)
    y = y.view(*x.shape[:-1], count)
    return y if bias is None else y.add_(bias)


def rms_norm_of_row(x, weight, eps: float):
    """`ops_bmojo.rms_norm` of x (..., size) with one row only, in two operations: its length goes through Python."""
    if not _is_usual(x, weight):
        return rms_norm(x, weight, eps)
    mean = torch.linalg.vector_norm(x, dtype=torch.float32).item() ** 2 / x.shape[-1] + eps
    return torch.addcmul(_ZEROS[x.dtype], x, weight, value=mean**-0.5 if mean != 0 else math.inf)


def _is_usual(x, weight) -> bool:
    """Whether both are plain tensors on a CPU, in float32 or bfloat16, and no gradient is recorded."""
    usual = x.is_cpu and x.dtype is weight.dtype and x.dtype in _ZEROS
    usual = usual and type(weight) in (torch.nn.Parameter, torch.Tensor)
    return usual and not torch.is_grad_enabled() and is_plain(x)


class _Scratch(threading.local):
    """Memory that a thread writes over and over: fresh pages would cost more than what is computed in them."""

    def __init__(self):
        with torch.inference_mode(False):
            memory = torch.empty(2 * _BLOCK, dtype=torch.float32, device="cpu")
        self.products = functools.cache(lambda rows, size: memory[: rows * size].view(rows, size))


_scratch = _Scratch()


# ----------------------------------------------------------------------------------------------------------------------
# Norm and gate
# ----------------------------------------------------------------------------------------------------------------------


def blocked_rms_norm(x, weight, eps: float, n_groups: int = 1):
    """See `ops_bmojo.rms_norm`."""
    if x.numel() < _SMALL:
        return rms_norm(x, weight, eps, n_groups)
    return _run(_RMSNorm, x, weight, eps=eps, n_groups=n_groups)[0]


def blocked_silu_gate(gate, x):
    """See `ops_bmojo.silu_gate`."""
    if x.numel() < _SMALL:
        return silu_gate(gate, x)
    return _run(_SiluGate, gate, x)[0]


class _RMSNorm:
    """Saves the input and one number per row and group."""

    definition = staticmethod(rms_norm)

    @staticmethod
    def forward(x, weight, eps, n_groups):
        dtype = at_least_float32(x)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        scale = torch.empty(x.shape[:-1].numel(), n_groups, 1, dtype=dtype, device=x.device)
        (given, into), weight = _in_groups(n_groups, x, out), weight.view(n_groups, -1)
        for rows in _row_blocks(given):
            wide = given[rows].to(dtype)
            length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
            scale[rows] = (length * length / wide.shape[-1] + eps).rsqrt_()
            torch.mul(wide * scale[rows], weight, out=into[rows])
        return (out,), (scale,)

    @staticmethod
    def backward(tensors, saved, grads, eps, n_groups):
        (x, weight), (scale,) = tensors, saved
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        (given, found, into), weight = _in_groups(n_groups, grads[0], x, dx), weight.view(n_groups, -1)
        d_weight = torch.zeros_like(weight, dtype=scale.dtype)
        for rows in _row_blocks(given):
            normed = found[rows].to(scale.dtype) * scale[rows]
            d_out = given[rows].to(scale.dtype)
            d_weight += (d_out * normed).sum(0)
            d_normed = d_out * weight
            along = (d_normed * normed).mean(-1, keepdim=True)
            torch.mul(torch.addcmul(d_normed, normed, along, value=-1), scale[rows], out=into[rows])
        return dx, d_weight.flatten()


class _SiluGate:
    """Saves its inputs only."""

    definition = staticmethod(silu_gate)

    @staticmethod
    def forward(gate, x):
        out = torch.empty_like(x, dtype=torch.result_type(gate, x), memory_format=torch.contiguous_format)
        gate, x, into = _in_groups(1, gate, x, out)
        for rows in _row_blocks(x):
            torch.mul(F.silu(gate[rows]), x[rows], out=into[rows])
        return (out,), ()

    @staticmethod
    def backward(tensors, saved, grads):
        found = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]
        gate, x, d_out, d_gate, d_x = _in_groups(1, *tensors, grads[0], *found)
        for rows in _row_blocks(x):
            torch.mul(F.silu(gate[rows]), d_out[rows], out=d_x[rows])
            torch.ops.aten.silu_backward(d_out[rows] * x[rows], gate[rows], grad_input=d_gate[rows])
        return found


def _in_groups(n_groups, *tensors):
    """(..., size) to (rows, n_groups, size / n_groups)."""
    return [tensor.reshape(-1, n_groups, tensor.shape[-1] // n_groups) for tensor in tensors]


def _row_blocks(x):
    length = max(1, _BLOCK // 2 // max(1, x[0].numel()))
    for start in range(0, len(x), length):
        yield slice(start, start + length)


# ----------------------------------------------------------------------------------------------------------------------
# Rotary positions
# ----------------------------------------------------------------------------------------------------------------------


def blocked_rotate(x, cos, sin):
    """See `ops_bmojo.rotate`. Tables with gradients, or of other shapes than a call's, are left to the definition."""
    usual = x.dim() == 4 and cos.dim() == 3 and x.numel() >= _SMALL and sin.shape[-1] == x.shape[-1]
    if not usual or (torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)):
        return rotate(x, cos, sin)
    return _Rotation.apply(x, cos, sin)


class _Rotation(torch.autograd.Function):
    """A rotation, whose gradient is the opposite rotation, and can be differentiated as often as wanted."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        length = max(1, _BLOCK // 4 // max(1, x[:, 0].numel()))
        for start in range(0, x.shape[1], length):
            block = slice(start, start + length)
            tables = (table[:, block] if table.shape[1] > 1 else table for table in (cos, sin))
            near, far = (table[:, :, None] for table in tables)
            wide = widen(x[:, block])
            torch.addcmul(wide * near, wide.roll(x.shape[-1] // 2, -1), far, out=out[:, block])
        return out

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        if _is_batched(grad):
            return rotate(grad, cos, -sin), None, None
        return _Rotation.apply(grad, cos, -sin), None, None


# ----------------------------------------------------------------------------------------------------------------------
# Innovation
# ----------------------------------------------------------------------------------------------------------------------


def blocked_prediction_error(y, history, positions, weights):
    """See `ops_bmojo.prediction_error`. Gradients, which only a learned predictor has, are left to the definition."""
    kernel, seq_len = weights.shape[0], y.shape[1]
    if torch.is_grad_enabled() and weights.requires_grad:
        return prediction_error(y, history, positions, weights)
    dtype = at_least_float32(y)
    weights = weights.to(dtype)
    equal = weights.dim() == 1 and kernel & (kernel - 1) == 0 and bool((weights == weights[0]).all())
    norm = weights.sum() if weights.dim() == 1 else 1
    errors = torch.empty(y.shape[:2], dtype=dtype, device=y.device)
    length = max(1, _BLOCK // 4 // max(1, y.shape[0] * y.shape[2]))
    start = min(seq_len, max(0, kernel - int(positions[:, 0].min()))) if seq_len else 0
    if start:  # the first tokens have a shorter past
        errors[:, :start] = _first_errors(y[:, :start], history, positions[:, :start], weights)
    while start < seq_len:
        block = slice(start, min(start + length, seq_len))
        past = (
            [history.to(y.dtype)[:, start:], y[:, : block.stop]]
            if start < kernel
            else [y[:, start - kernel : block.stop]]
        )
        past = torch.cat(past, 1).to(dtype)
        if equal:  # sums of 2, 4, 8, ... neighbours
            total, width = past[:, :-1], 1
            while width < kernel:
                total, width = total[:, width:] + total[:, :-width], 2 * width
            mean = total / kernel
        else:
            mean = past[:, kernel - 1 : -1] * weights[0]
            for k in range(2, kernel + 1):
                mean.addcmul_(past[:, kernel - k : past.shape[1] - k], weights[k - 1])
            mean /= norm
        errors[:, block] = torch.sub(past[:, kernel:], mean).square_().sum(-1)
        start = block.stop
    return errors


def _first_errors(y, history, positions, weights):
    """`ops_bmojo.prediction_error` of few tokens, in few operations where the weights are fixed."""
    if weights.dim() > 1:
        return prediction_error(y, history, positions, weights)
    kernel = len(weights)
    ages = torch.arange(kernel, 0, -1, device=y.device)
    first = positions[:, :1, None]  # (batch or 1, 1, 1)
    past = torch.cat([history.to(weights.dtype).masked_fill(ages[:, None] > first, 0), y.to(weights.dtype)], 1)
    shares = weights.flip(0) * (ages <= positions[..., None])  # (batch or 1, seq_len, kernel)
    shares = shares / shares.sum(-1, keepdim=True).masked_fill(positions[..., None] == 0, 1)
    mean = shares[..., None, :] @ past[:, :-1].unfold(1, kernel, 1).transpose(-1, -2)
    return (past[:, kernel:] - mean.squeeze(-2)).square_().sum(-1)


# ----------------------------------------------------------------------------------------------------------------------
# Attention over the memories
# ----------------------------------------------------------------------------------------------------------------------


def blocked_memory_attention(
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
    """See `ops_bmojo.memory_attention`."""
    tensors = (query, window_key, window_value, fading_key, fading_value, eidetic_query, eidetic_key, eidetic_value)
    return _run(
        _MemoryAttention, *tensors, memory, past, fading_query, window=window, chunk_size=chunk_size, scale=scale
    )[0]


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_UNSEEN = -1e30  # added to a score; of -inf alone torch's kernel would give 0 as the logarithm of the sum
_QUERIES = 128  # in a block, which share their keys: more waste keys that few of them see, fewer waste calls
_RUN = 1024  # where every query has all its keys behind it, so many go into one call, half a block sharing its keys


class _MemoryAttention:
    """Torch's flash attention on every block of queries and every span, merged by the logarithms of their sums.

    Of the forward pass, the backward pass of flash attention needs but the output and the logarithm of the sum: given
    those of the merged softmax it yields the exact gradients of every span.
    """

    definition = staticmethod(memory_attention)

    @staticmethod
    def forward(*tensors, window, chunk_size, scale):
        query, value = tensors[0], tensors[2]
        spans = _Spans(tensors, window, chunk_size)
        out = query.new_empty(*query.shape[:2], spans.kv_heads, spans.group, query.shape[3], dtype=value.dtype)
        log_sums = out.new_empty(out.shape[:-1], dtype=at_least_float32(query))
        for block, runs in spans.blocks():
            parts, sums = [], []
            for span in spans.of(block, runs):
                part, log_sum = _flash(*span.inputs, 0.0, False, attn_mask=span.mask, scale=scale)
                parts.append(span.unfold(part))
                sums.append(span.unfold(log_sum))
            if len(parts) > 1:
                together = torch.stack(sums).logsumexp(0)
                shares = [(own - together).exp()[..., None] for own in sums]
                parts[0] = sum(part * share for part, share in zip(parts, shares, strict=True))
                sums[0] = together
            out[:, block] = parts[0]
            log_sums[:, block] = sums[0]
        return (out.flatten(2, 3),), (out, log_sums)

    @staticmethod
    def backward(tensors, saved, grads, window, chunk_size, scale):
        (out, log_sums), dtype = saved, saved[1].dtype
        d_out = grads[0].reshape(out.shape)
        spans = _Spans(tensors, window, chunk_size, dtype)
        found = [
            None
            if x is None or not x.is_floating_point()
            else torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format)
            for x in tensors
        ]
        for block, runs in spans.blocks():
            for span in spans.of(block, runs):
                o, d_o, log_sum = (span.fold(x[:, block].to(dtype)) for x in (out, d_out, log_sums))
                d_query, d_key, d_value = _flash_backward(
                    d_o.contiguous(), *span.inputs, o, log_sum, 0.0, False, attn_mask=span.mask, scale=scale
                )
                found[span.place[0]][:, block].view_as(out[:, block]).add_(span.unfold(d_query))
                span.add(found[span.place[1]], d_key)
                span.add(found[span.place[2]], d_value)
        return found


class _Span:
    """The keys of one span that a block of queries sees, as the arguments of flash attention.

    Attributes:
        place: of query, key and value among the arguments of the operation.
        inputs: query (rows parts, kv, group queries, d), key and value (rows parts, kv, keys, d).
        mask: what is added to the scores; None where all keys are seen.
        target: which keys these are: a slice, which the parts overlap in, or indices into all rows' keys.
    """

    def __init__(self, place, query, key, value, mask, target, parts=1, part_length=None):
        self.rows, self.length, self.kv_heads, self.group = query.shape[:4]
        self.parts, self.place, self.mask, self.target = parts, place, mask, target
        self.missing = 0 if parts == 1 else parts * part_length - self.length
        self.inputs = self.fold(query), key.transpose(1, 2), value.transpose(1, 2)

    def fold(self, x):
        """(rows, queries, kv, group, ...) to (rows parts, kv, group queries, ...), with empty queries to fill the last part."""
        if self.missing:
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, self.missing))
        return x.unflatten(1, (self.parts, -1)).movedim(2, 4).flatten(0, 1).flatten(2, 3)

    def unfold(self, x):
        """The way back."""
        x = x.unflatten(2, (self.group, -1)).unflatten(0, (self.rows, self.parts))
        return x.movedim(4, 2).flatten(1, 2)[:, : self.length]

    def add(self, whole, part):
        """Add gradients (rows parts, kv, keys, d) to those of all keys (rows, ..., kv, d)."""
        part = part.transpose(1, 2)
        if not isinstance(self.target, slice):
            whole.view(-1, *whole.shape[2:]).index_add_(0, self.target, part.flatten(0, 1))
            return
        part, step = part.unflatten(0, (self.rows, self.parts)), self.length // self.parts
        for start in range(0, part.shape[2], step):  # neighbours share keys: piece by piece none do
            piece = part[:, :, start : start + step]
            place = whole[:, self.target.start + start : self.target.stop].unfold(1, piece.shape[2], step)
            place[:, : self.parts].add_(piece.movedim(2, 4))  # (rows, parts, kv, d, keys)


@functools.lru_cache(maxsize=8)  # the same few for every layer and step
def _age_mask(queries, keys, offset, newest, oldest, group, dtype):
    """(group queries, keys): 0 where the age offset + query - key is in [newest, oldest)."""
    age = offset + torch.arange(queries, device="cpu")[:, None] - torch.arange(keys, device="cpu")
    mask = torch.zeros(queries, keys, dtype=dtype, device="cpu").masked_fill_(
        (age < newest) | (age >= oldest), _UNSEEN
    )
    return mask.repeat(group, 1)


class _Spans:
    """Cuts the queries of `memory_attention` into blocks and finds the keys of each."""

    def __init__(self, tensors, window, chunk_size, dtype=None):
        # the kernel takes the last axis to be contiguous, without a look at its stride
        tensors = [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tensors]
        query, self.window_key, self.window_value, self.fading_key, self.fading_value, *others = tensors
        eidetic_query, self.eidetic_key, self.eidetic_value, self.memory, self.past, fading_query = others
        self.dtype, self.window, self.chunk = dtype or self.window_value.dtype, window, chunk_size
        self.seq_len, self.kv_heads = query.shape[1], self.window_key.shape[2]
        self.group = query.shape[2] // self.kv_heads
        self.query, self.eidetic_query, self.fading_query = (
            None if x is None else x.unflatten(2, (self.kv_heads, -1)) for x in (query, eidetic_query, fading_query)
        )
        if self.memory is not None:
            filled = self.memory >= 0
            self.any_filled, self.all_filled = filled.any(2).any(0).tolist(), filled.all(2).all(0).tolist()

    def blocks(self):
        """Pairs of a slice of queries and in how many runs of equal length it falls that share their keys."""
        reach = (self.window if self.fading_key is None else 2 * self.window) - 1
        held = [key.shape[1] - self.seq_len for key in (self.window_key, self.fading_key) if key is not None]
        full = reach - min(
            held if self.past is None else [*held, int(self.past.min())]
        )  # first query with all its keys
        if self.chunk > _QUERIES:
            small, share = _QUERIES, next(n for n in range(_QUERIES, 0, -1) if self.chunk % n == 0)
        else:
            small, share = self.chunk * (_QUERIES // self.chunk), self.chunk * max(1, _QUERIES // 2 // self.chunk)
        unit = max(share, self.chunk)
        start = 0
        while start < self.seq_len:
            whole = min(max(_RUN, unit), self.seq_len - start) // unit * unit
            if start >= full and start % self.chunk == 0 and whole and share >= _QUERIES // 4:
                stop, runs = start + whole, whole // share
            else:  # within a chunk, or whole chunks
                end = start + self.chunk - start % self.chunk if self.chunk > _QUERIES else self.seq_len
                stop, runs = min(start + small, end, self.seq_len), 1
            yield slice(start, stop), runs
            start = stop

    def of(self, block, runs):
        """The spans that some query of the block sees."""
        query = self.query[:, block].to(self.dtype)
        spans = [self.near((0, 1, 2), query, self.window_key, self.window_value, block, runs, 0)]
        if self.fading_key is not None:
            place = (0, 3, 4)
            if self.fading_query is not None:
                place, query = (10, 3, 4), self.fading_query[:, block].to(self.dtype)
            spans.append(self.near(place, query, self.fading_key, self.fading_value, block, runs, self.window))
        if self.memory is not None:
            spans.append(self.eidetic(block))
        return [span for span in spans if span is not None]

    def near(self, place, query, key, value, block, runs, newest):
        """Keys that are newest to newest + window - 1 tokens older than a query of the block."""
        before, oldest = key.shape[1] - self.seq_len, newest + self.window
        keys = slice(max(0, block.start + before - oldest + 1), block.stop + before - newest)
        if keys.stop <= keys.start:
            return None
        queries = (block.stop - block.start) // runs
        width = keys.stop - keys.start - (runs - 1) * queries
        offset = block.start + before - keys.start
        mask = _age_mask(queries, width, offset, newest, oldest, self.group, at_least_float32(query))
        if self.past is not None and int(self.past.min()) < before - keys.start:
            slots = torch.arange(keys.start, keys.stop, device=key.device)
            missing = (slots < before - self.past[:, None])[:, None, None]
            mask = mask.expand(len(missing), 1, *mask.shape).masked_fill(missing, _UNSEEN)
        key, value = (x[:, keys].to(self.dtype) for x in (key, value))
        if runs > 1:  # views that overlap
            key, value = (x.unfold(1, width, queries).movedim(-1, 2).flatten(0, 1) for x in (key, value))
        return _Span(place, query, key, value, mask, keys, runs, queries)

    def eidetic(self, block):
        """The memories of the block's chunks, gathered."""
        first, last = block.start // self.chunk, (block.stop - 1) // self.chunk + 1
        if not any(self.any_filled[first:last]):
            return None
        memory = self.memory[:, first:last]
        rows, parts, size = memory.shape
        entries = self.eidetic_key.shape[1]
        index = (memory.clamp(min=0) + entries * torch.arange(rows, device=memory.device)[:, None, None]).flatten()
        key, value = (
            x.flatten(0, 1).index_select(0, index).unflatten(0, (rows * parts, size)).to(self.dtype)
            for x in (self.eidetic_key, self.eidetic_value)
        )
        mask = None
        if not all(self.all_filled[first:last]):
            empty = (memory < 0).view(rows * parts, size)
            mask = torch.zeros(empty.shape, dtype=at_least_float32(key), device=key.device)
            mask = mask.masked_fill_(empty, _UNSEEN)[:, None, None]
            value.masked_fill_(empty[..., None, None], 0)  # a weight of 0 would let a NaN through
        return _Span(
            (5, 6, 7), self.eidetic_query[:, block].to(self.dtype), key, value, mask, index, parts, self.chunk
        )
