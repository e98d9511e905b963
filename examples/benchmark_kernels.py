"""The Triton kernels against PyTorch and other people's kernels: checked first, then timed.

Command, on a GPU:

    python examples/benchmark_kernels.py --output kernels.json

Every op of `kernels/` runs beside its definition, and `memory_attention` beside torch's attention with the same mask
dense, `flex_attention` with the same mask in blocks, and two passes whose outputs are merged by their log sums, as the
authors' layer attends (which has no eidetic memory); where they are installed, flash-attn, mamba-ssm and fla run too.
What differs from the definition in float64 by much more than rounding is reported and not timed. Times are medians of
`triton.testing.do_bench` (of CUDA graphs for one token, which is shorter than its launch; what fits there stays in the
L2 cache), shares those of the bandwidth of a copy and of the speed of a large matrix product, both measured here. Bytes
and operations are what the op needs, each tensor read or written once, whichever way is timed. A backward pass starts
from the gradient of the first output.

--shapes takes names of `SHAPES`, or what is different from "long": `--shapes batch seq_len=32768,window=1024`. Without
a GPU the same code runs at toy sizes in Triton's interpreter, so that it is known to work; those times mean nothing.
Exits with 1 where a kernel of ours is wrong or raises.
"""

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention


ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which nothing above does
CHECKED = 2048  # tokens of the comparison in float64, which would not fit a smaller card at full length
OURS, DEFINITION = "ours", "definition"


def module(name: str):
    """A module of this checkout, as part of a package."""
    package = "bmojo_checkout"
    if package not in sys.modules:
        spec = ModuleSpec(package, None, is_package=True)
        spec.submodule_search_locations = [str(ROOT)]
        sys.modules[package] = module_from_spec(spec)
    return import_module(f"{package}.{name}")


# ----------------------------------------------------------------------------------------------------------------------
# What is measured
# ----------------------------------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """Sizes of all ops, as the configuration names them.

    Mamba's scan has `channels` and `channel_state`; ops on one token have `streams` rows.
    """

    rows: int = 1
    seq_len: int = 8192
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 64
    window: int = 512
    memory: int = 128
    chunk: int = 64
    ssm_heads: int = 64
    ssm_head_dim: int = 64
    groups: int = 1
    state_size: int = 128
    channels: int = 4096
    channel_state: int = 16
    hidden: int = 2048
    kernel: int = 8
    streams: int = 128


SHAPES = {
    "long": Shape(),
    "batch": Shape(rows=8, seq_len=2048),
    "wide": Shape(head_dim=128, hidden=4096, ssm_heads=128, channels=8192),
    "toy": Shape(
        rows=2,
        seq_len=37,
        heads=4,
        kv_heads=2,
        head_dim=16,
        window=7,
        memory=3,
        chunk=5,
        ssm_heads=4,
        ssm_head_dim=8,
        state_size=8,
        channels=12,
        hidden=24,
        kernel=3,
        streams=3,
    ),
}


class Way(NamedTuple):
    """One way to compute a case.

    Attributes:
        name: in the table.
        prepare: from the case, its shape, tensors and options to a function of the tensors; its own time does not count.
        package: what must be installed for it.
        on_cpu: it runs without a GPU.
        gradient: "yes"; "gpu", where there is a GPU; or "no".
    """

    name: str
    prepare: Callable
    package: str | None = None
    on_cpu: bool = False
    gradient: str = "yes"


class Case(NamedTuple):
    """An op with its arguments.

    Attributes:
        op, file: its name in `ops_bmojo`, and its file in `kernels/`.
        draw: the arguments that are tensors, from shape and `draw(*size, wide=False)`.
        options: the others, from shape.
        operations: multiplications and additions of matrix products in the forward pass, from shape; 0 without any.
        backward: how many times as many the backward pass takes; 0 without one.
        peers: other ways.
        title: what distinguishes it from cases of the same op.
        graph: timed as a CUDA graph.
        call: how op, options and tensors come together.
        moved: bytes of the forward pass, from shape and tensors, where it is not all of the tensors.
    """

    op: str
    file: str
    draw: Callable
    options: Callable
    operations: Callable
    backward: float = 0
    peers: tuple[Way, ...] = ()
    title: str = ""
    graph: bool = False
    call: Callable = lambda op, options, *tensors: op(*tensors, **options)
    moved: Callable | None = None


def draw_attention(shape: Shape, draw, memory: bool = True):
    """Arguments of `memory_attention` without its queries for the memory, which are the others here: see `one_query`."""
    query = draw(shape.rows, shape.seq_len, shape.heads, shape.head_dim)
    keys = [draw(shape.rows, shape.seq_len, shape.kv_heads, shape.head_dim) for _ in range(6 if memory else 4)]
    return [query, *keys, choose(shape, query.device)] if memory else [query, *keys]


def choose(shape: Shape, device) -> torch.Tensor:
    """The memories (rows, chunks, memory) of random innovations; tokens enter as they do in the model."""
    scores = torch.rand(shape.rows, shape.seq_len, device=device)
    nothing = torch.arange(-shape.memory, 0, device=device).expand(shape.rows, -1)
    found = module("ops_bmojo").running_selection(
        scores,
        torch.full(nothing.shape, -torch.inf, device=device),
        nothing,
        1 - shape.window - shape.chunk,
        shape.chunk,
        -(-shape.seq_len // shape.chunk),
    )
    return found[:, 1:].clamp(min=-1).contiguous()


def one_query(op, options, query, window_key, window_value, fading_key, fading_value, *memory):
    """The op with one query for all spans, as if nothing were rotated: other attention knows no second one."""
    spans = (window_key, window_value, fading_key, fading_value)
    return op(query, *spans, *((query, *memory) if memory else ()), **options)


def attention_options(shape: Shape) -> dict:
    return {"window": shape.window, "chunk_size": shape.chunk, "scale": shape.head_dim**-0.5}


def attention_operations(shape: Shape, memory: bool = True) -> int:
    keys = 2 * shape.window + (shape.memory if memory else 0)
    return 4 * shape.rows * shape.seq_len * shape.heads * shape.head_dim * keys


def draw_ssd(shape: Shape, draw, *tokens: int):
    """Arguments of `ssd_scan` for (rows, seq_len) tokens."""
    A = -1 - draw(shape.ssm_heads, wide=True).abs()
    B, C = (draw(*tokens, shape.groups, shape.state_size) for _ in range(2))
    x = draw(*tokens, shape.ssm_heads, shape.ssm_head_dim)
    return [x, time_step(draw(*tokens, shape.ssm_heads)), A, B, C]


def draw_selective(shape: Shape, draw, *tokens: int):
    """Arguments of `selective_scan` for (rows, seq_len) tokens."""
    A = -1 - draw(shape.channels, shape.channel_state, wide=True).abs()
    B, C = (draw(*tokens, shape.channel_state) for _ in range(2))
    x = draw(*tokens, shape.channels)
    return [x, time_step(draw(*tokens, shape.channels)), A, B, C]


def time_step(raw: torch.Tensor) -> torch.Tensor:
    """In float32, but of values that its dtype holds: some peers want it in that of the inputs."""
    return (F.softplus(raw.float() - 3)).to(raw.dtype).float()


def draw_ssd_step(shape: Shape, draw):
    state = draw(shape.streams, shape.ssm_heads, shape.ssm_head_dim, shape.state_size, wide=True)
    return [*draw_ssd(shape, draw, shape.streams), state]


def draw_selective_step(shape: Shape, draw):
    state = draw(shape.streams, shape.channels, shape.channel_state, wide=True)
    return [*draw_selective(shape, draw, shape.streams), state]


def ssd_operations(shape: Shape) -> int:
    """Of the chunked form: C B^T per group; that times x, what enters the state, and what is read of it, per head."""
    per_head = shape.chunk * shape.ssm_head_dim + 2 * shape.ssm_head_dim * shape.state_size
    per_token = shape.groups * shape.chunk * shape.state_size + shape.ssm_heads * per_head
    return 2 * shape.rows * shape.seq_len * per_token


def draw_conv(shape: Shape, draw, taps: int = 4):
    """Arguments of `causal_conv` over what Mamba2 convolves: x, B and C."""
    channels = shape.ssm_heads * shape.ssm_head_dim + 2 * shape.groups * shape.state_size
    return [draw(shape.rows, taps - 1 + shape.seq_len, channels), draw(channels, taps), draw(channels)]


def draw_error(shape: Shape, draw):
    y, history = (draw(shape.rows, count, shape.hidden) for count in (shape.seq_len, shape.kernel))
    positions = torch.arange(shape.seq_len, device=y.device)[None]
    return [y, history, positions, draw(shape.kernel, wide=True).abs()]


def draw_selection(shape: Shape, draw):
    scores = draw(shape.rows, shape.seq_len, wide=True)
    kept = torch.arange(-shape.memory, 0, device=scores.device).expand(shape.rows, -1)
    return [scores, torch.full(kept.shape, -torch.inf, device=scores.device), kept]


def selection_options(shape: Shape) -> dict:
    chunks = -(-shape.seq_len // shape.chunk)
    return {"first": 1 - shape.window - shape.chunk, "chunk_size": shape.chunk, "chunks": chunks}


def draw_cache(shape: Shape, draw):
    """A full cache: a query sees w of the w + c slots of the window, as many of the fading ones, and the memory."""
    window, ring = shape.window, shape.window + shape.chunk
    slot = torch.arange(2 * ring + shape.memory)
    seen = (slot % ring < window) | (slot >= 2 * ring)
    query = draw(shape.streams, 1, shape.heads, shape.head_dim) * shape.head_dim**-0.5
    key, value = (draw(shape.streams, shape.kv_heads, len(slot), shape.head_dim) for _ in range(2))
    mask = torch.zeros(1, 1, len(slot)).masked_fill(~seen, -torch.inf)
    return [query, key, value, mask.to(query.device)]


def bytes_of_cache(shape: Shape, tensors) -> int:
    """Query, output, and the keys and values that are seen."""
    query, key, value, mask = tensors
    share = (2 * shape.window + shape.memory) / key.shape[2]
    return 2 * count_bytes([query]) + round(share * count_bytes([key, value])) + count_bytes([mask])


def draw_boundary(shape: Shape, draw):
    """A full cache at the beginning of a chunk."""
    rows, ring = shape.streams, shape.window + shape.chunk
    slots = 2 * ring + shape.memory
    key, value = (draw(rows, shape.kv_heads, slots, shape.head_dim) for _ in range(2))
    scores = [draw(rows, size, wide=True).abs() for size in (ring, shape.memory)]
    positions = torch.arange(shape.memory, device=key.device).expand(rows, -1)
    past = torch.full((rows,), shape.chunk * shape.window, device=key.device)
    tables = [draw(rows, shape.chunk, shape.head_dim, wide=True) for _ in range(2)]
    return [key, value, *scores, positions, past, torch.ones_like(past, dtype=torch.bool)[:, None], *tables]


def bytes_of_boundary(shape: Shape, tensors) -> int:
    """As many keys and values as the memory has places, read and written, and all that is small."""
    places = 2 * shape.streams * shape.kv_heads * shape.memory * shape.head_dim * tensors[0].element_size()
    return 2 * places + count_bytes(tensors[2:]) + count_bytes(tensors[3:5])


def nothing(shape: Shape) -> dict:
    return {}


def none(shape: Shape) -> int:
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# Other people's kernels
# ----------------------------------------------------------------------------------------------------------------------


def near(age, newest: int, window: int):
    return (age >= newest) & (age < newest + window)


def with_dense_mask(case, shape: Shape, tensors, options):
    """`scaled_dot_product_attention` over the keys of all spans, one behind the other."""
    query, memory = tensors[0], tensors[7] if len(tensors) > 7 else None
    token = torch.arange(shape.seq_len, device=query.device)
    age = token[:, None] - token
    visible = [near(age, start, shape.window).expand(shape.rows, -1, -1) for start in (0, shape.window)]
    if memory is not None:
        seen = (
            visible[0].new_zeros(*memory.shape[:2], shape.seq_len + 1).scatter_(2, memory % (shape.seq_len + 1), True)
        )
        visible.append(seen[:, token // shape.chunk, :-1])  # an empty place, -1, falls behind the last entry
    mask = torch.cat(visible, -1)[:, None]
    mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(~mask, -torch.inf)

    def attend(query, window_key, window_value, fading_key, fading_value, *eidetic):
        keys, values = (window_key, fading_key, *eidetic[:1]), (window_value, fading_value, *eidetic[1:2])
        spans = (torch.cat(parts, 1).transpose(1, 2) for parts in (keys, values))
        key, value = (x.repeat_interleave(shape.heads // shape.kv_heads, 1) for x in spans)
        return F.scaled_dot_product_attention(
            query.transpose(1, 2), key, value, mask, scale=options["scale"]
        ).transpose(1, 2)

    return attend


def compile_flex() -> Callable:
    """`flex_attention`, compiled where there is a GPU; a compiler that starts anew never meets its limit of recompilations."""
    torch.compiler.reset()
    return torch.compile(flex_attention, dynamic=False) if DEVICE == "cuda" else flex_attention


def with_block_mask(case, shape: Shape, tensors, options):
    """`flex_attention` over window, fading tokens and the memories of all chunks, gathered one behind the other."""
    length, memory = shape.seq_len, tensors[7] if len(tensors) > 7 else None
    places = 0 if memory is None else memory[0].numel()
    filled = (
        torch.ones(shape.rows, 1, dtype=torch.bool, device=tensors[0].device)
        if memory is None
        else memory.flatten(1) >= 0
    )

    def visible(row, head, token, slot):
        span = near(token - slot, 0, shape.window) & (slot < length)
        span = span | (
            near(token - slot + length, shape.window, shape.window) & (slot >= length) & (slot < 2 * length)
        )
        if memory is None:
            return span
        place = slot - 2 * length
        own = (place >= 0) & (place // shape.memory == token // shape.chunk)
        return span | (own & filled[row, place.clamp(min=0)])

    mask = create_block_mask(visible, shape.rows, None, length, 2 * length + places, device=tensors[0].device.type)

    flex = compile_flex()

    def attend(query, window_key, window_value, fading_key, fading_value, *eidetic):
        keys, values = [window_key, fading_key], [window_value, fading_value]
        if eidetic:
            index = eidetic[2].flatten(1).clamp(min=0)[..., None, None].expand(-1, -1, *window_key.shape[2:])
            keys, values = [*keys, eidetic[0].gather(1, index)], [*values, eidetic[1].gather(1, index)]
        key, value = torch.cat(keys, 1).transpose(1, 2), torch.cat(values, 1).transpose(1, 2)
        query = query.transpose(1, 2)
        return flex(query, key, value, block_mask=mask, scale=options["scale"], enable_gqa=True).transpose(1, 2)

    return attend


def in_two_passes(make_pass: Callable, case, shape: Shape, tensors, options):
    """Attention to the window, the same over the fading tokens one window behind, and the two merged."""
    window = shape.window
    attend = make_pass(shape, options["scale"])

    def both(query, window_key, window_value, fading_key, fading_value):
        near, near_sum = attend(query, window_key, window_value)
        far, far_sum = attend(query[:, window:], fading_key[:, :-window], fading_value[:, :-window])
        share = (far_sum - near_sum[:, window:]).sigmoid()[..., None].to(far.dtype)
        return torch.cat([near[:, :window], torch.lerp(near[:, window:], far, share)], 1)

    return both


def flex_pass(shape: Shape, scale: float):
    """Attention to a window and its log sums, (rows, tokens, heads)."""

    def visible(row, head, token, slot):
        return near(token - slot, 0, shape.window)

    masks = {
        n: create_block_mask(visible, None, None, n, n, device=DEVICE)
        for n in (shape.seq_len, shape.seq_len - shape.window)
    }

    flex = compile_flex()

    def attend(*tensors):
        query, key, value = (x.transpose(1, 2) for x in tensors)
        mask, sums = masks[query.shape[2]], AuxRequest(lse=True)
        out, sums = flex(query, key, value, block_mask=mask, scale=scale, enable_gqa=True, return_aux=sums)
        return out.transpose(1, 2), sums.lse.transpose(1, 2)

    return attend


def flash_pass(shape: Shape, scale: float):
    from flash_attn import flash_attn_func

    def attend(query, key, value):
        window = (shape.window - 1, 0)
        out, sums, _ = flash_attn_func(
            query, key, value, softmax_scale=scale, causal=True, window_size=window, return_attn_probs=True
        )
        return out, sums.transpose(1, 2)

    return attend


def mamba_ssd(case, shape: Shape, tensors, options):
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return partial(mamba_chunk_scan_combined, chunk_size=256, return_final_states=True)  # its default size


def fla_ssd(case, shape: Shape, tensors, options):
    """As linear attention with a decay: queries C, keys B, values dt x."""
    from fla.ops.simple_gla import chunk_simple_gla

    def scan(x, dt, A, B, C):
        B, C = (part.repeat_interleave(shape.ssm_heads // shape.groups, 2) for part in (B, C))
        values = (x * dt[..., None]).to(x.dtype)
        y, state = chunk_simple_gla(C, B, values, g=dt * A, scale=1.0, output_final_state=True)
        return y, state.transpose(-1, -2)

    return scan


def mamba_selective(case, shape: Shape, tensors, options):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def scan(x, dt, A, B, C):
        x, dt, B, C = (part.to(x.dtype).transpose(1, 2).contiguous() for part in (x, dt, B, C))
        y, state = selective_scan_fn(x, dt, A, B, C, return_last_state=True)
        return y.transpose(1, 2), state

    return scan


def torch_step(case, shape: Shape, tensors, options):
    """`scaled_dot_product_attention` with the heads of a group as queries of one head."""

    def attend(query, key, value, mask):
        group = query.view(len(query), shape.kv_heads, -1, shape.head_dim)
        mask = mask.to(query.dtype)[:, None]
        return F.scaled_dot_product_attention(group, key, value, mask, scale=1.0).view(query.shape)

    return attend


def mamba_step(case, shape: Shape, tensors, options):
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    def step(x, dt, A, B, C, state):
        if A.dim() == 1:
            dt, A = dt[..., None].expand_as(x), A[:, None, None].expand(*state.shape[1:])
        return selective_state_update(state, x, dt, A, B, C), state

    return step


DENSE = Way("torch, dense mask", with_dense_mask, on_cpu=True)
FLEX = Way("flex_attention", with_block_mask, on_cpu=True, gradient="gpu")
TWO = Way("two passes, flex", partial(in_two_passes, flex_pass), on_cpu=True, gradient="gpu")
FLASH = Way(
    "two passes, flash", partial(in_two_passes, flash_pass), "flash_attn", gradient="no"
)  # none of its log sums

CASES = (
    Case(
        "memory_attention",
        "attention",
        draw_attention,
        attention_options,
        attention_operations,
        backward=2.5,
        peers=(DENSE, FLEX),
        call=one_query,
    ),
    Case(
        "memory_attention",
        "attention",
        partial(draw_attention, memory=False),
        attention_options,
        partial(attention_operations, memory=False),
        backward=2.5,
        peers=(DENSE, FLEX, TWO, FLASH),
        title="no memory",
        call=one_query,
    ),
    Case(
        "ssd_scan",
        "ssd",
        lambda shape, draw: draw_ssd(shape, draw, shape.rows, shape.seq_len),
        nothing,
        ssd_operations,
        backward=2,
        peers=(Way("mamba-ssm", mamba_ssd, "mamba_ssm"), Way("fla", fla_ssd, "fla")),
    ),
    Case(
        "selective_scan",
        "selective",
        lambda shape, draw: draw_selective(shape, draw, shape.rows, shape.seq_len),
        nothing,
        none,
        backward=2,
        peers=(Way("mamba-ssm", mamba_selective, "mamba_ssm"),),
    ),
    Case("causal_conv", "conv", draw_conv, nothing, none, backward=2),
    Case("prediction_error", "innovation", draw_error, nothing, none),
    Case("running_selection", "innovation", draw_selection, selection_options, none),
    *(
        Case(
            op,
            "step",
            draw,
            lambda shape: {"in_place": True},
            none,
            peers=(Way("mamba-ssm", mamba_step, "mamba_ssm", gradient="no"),),
            graph=True,
        )
        for op, draw in (("ssd_step", draw_ssd_step), ("selective_step", draw_selective_step))
    ),
    Case(
        "cache_attention",
        "step",
        draw_cache,
        lambda shape: {"memory": 3 * shape.window + shape.chunk},
        lambda shape: 4 * shape.streams * shape.heads * shape.head_dim * (2 * shape.window + shape.memory),
        peers=(Way("torch, dense mask", torch_step, on_cpu=True),),
        graph=True,
        call=lambda op, options, query, *others: op(query, *others, query, **options),
        moved=bytes_of_cache,
    ),
    Case(
        "update_memory",
        "step",
        draw_boundary,
        lambda shape: {"in_place": True},
        none,
        graph=True,
        moved=bytes_of_boundary,
    ),
)


# ----------------------------------------------------------------------------------------------------------------------
# How it is measured
# ----------------------------------------------------------------------------------------------------------------------


def ways(case: Case) -> Iterator[Way]:
    """Ours, the definition, and the peers."""

    def through(op):
        return lambda case, shape, tensors, options: partial(case.call, op, options)

    ours = module("kernels_bmojo").load(case.op, case.file)
    yield Way(OURS, ours and through(ours), on_cpu=True)
    yield Way(DEFINITION, through(getattr(module("ops_bmojo"), case.op)), on_cpu=True)
    yield from case.peers


def obstacle(way: Way) -> str | None:
    """Why it can't run here."""
    if way.prepare is None:
        return "no kernel ships"
    if not way.on_cpu and DEVICE == "cpu":
        return "needs a GPU"
    if way.package and find_spec(way.package) is None:
        return f"{way.package} is not installed"
    return None


def draw(case: Case, shape: Shape, dtype: torch.dtype) -> list[torch.Tensor]:
    """The tensors of a case, the same every time."""
    torch.manual_seed(0)

    def normal(*size, wide: bool = False):
        return torch.randn(size, device=DEVICE).to(torch.float32 if wide else dtype)

    return case.draw(shape, normal)


def as_leaves(tensors, dtype: torch.dtype | None, gradient: bool) -> list[torch.Tensor]:
    """Copies of their own, floats in that dtype and with a gradient to come."""
    copies = [x.to(dtype) if dtype and x.is_floating_point() else x for x in tensors]
    return [x.detach().clone().requires_grad_(gradient and x.is_floating_point()) for x in copies]


def outputs(function: Callable, leaves) -> tuple[torch.Tensor, ...]:
    found = function(*leaves)
    return found if isinstance(found, tuple) else (found,)


def backward_of(function: Callable, leaves) -> Callable:
    """The backward pass of a function alone, to run any number of times."""
    out = outputs(function, leaves)[0]
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    asked = [leaf for leaf in leaves if leaf.requires_grad]
    return lambda: torch.autograd.grad(out, asked, gradient, retain_graph=True)


def compute(
    function: Callable, tensors, backward: bool, dtype: torch.dtype | None = None
) -> dict[str, list[torch.Tensor]]:
    """What every pass yields."""
    with torch.no_grad():
        found = {"forward": [x.clone() for x in outputs(function, as_leaves(tensors, dtype, False))]}
    if backward:
        found["backward"] = list(backward_of(function, as_leaves(tensors, dtype, True))())
    return found


def rel_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """||got - want|| / ||want||; infinity for another shape or what is not finite."""
    if got.shape != want.shape:
        return float("inf")
    error = ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-12)).item()
    return error if error == error else float("inf")


class Check:
    """The comparison of a case with its definition in float64."""

    def __init__(self, case: Case, shape: Shape, dtype: torch.dtype):
        self.case = case
        self.shape = shape._replace(seq_len=min(shape.seq_len, max(CHECKED, 3 * shape.window)))
        self.options, self.tensors = case.options(self.shape), draw(case, self.shape, dtype)
        definition = partial(case.call, getattr(module("ops_bmojo"), case.op), self.options)
        self.exact = compute(definition, self.tensors, case.backward > 0, torch.float64)
        plain = compute(definition, self.tensors, case.backward > 0)
        floor = 2 * torch.finfo(dtype).eps + 1e-6  # some peers round outputs that others leave in float32
        self.allowed = {
            name: [4 * rel_error(got, want) + floor for got, want in zip(plain[name], self.exact[name], strict=True)]
            for name in plain
        }

    def errors(self, way: Way, backward: bool) -> dict[str, tuple[float, bool]]:
        """For every pass the largest error, and whether all are those of rounding."""
        function = way.prepare(self.case, self.shape, self.tensors, self.options)
        verdict = {}
        for name, got in compute(function, self.tensors, backward).items():
            found = [rel_error(*pair) for pair in zip(got, self.exact[name], strict=True)]
            fits = all(error <= most for error, most in zip(found, self.allowed[name], strict=True))
            verdict[name] = max(found), fits
        return verdict


def median_ms(function: Callable, graph: bool = False) -> float:
    """Milliseconds of a call."""
    if DEVICE == "cpu":
        start = time.perf_counter()
        function()
        return 1000 * (time.perf_counter() - start)
    from triton.testing import do_bench, do_bench_cudagraph

    return (do_bench_cudagraph if graph else do_bench)(function, return_mode="median")


def peaks(dtype: torch.dtype) -> dict[str, float]:
    """Bytes per second of a copy, and operations per second of a large matrix product."""
    size = 2**29 if DEVICE == "cuda" else 2**20
    source = torch.ones(size, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    n = 8192 if DEVICE == "cuda" else 128
    a, b = (torch.randn(n, n, dtype=dtype, device=DEVICE) for _ in range(2))
    return {
        "bytes": 2 * size / median_ms(lambda: target.copy_(source)) * 1000,
        "operations": 2 * n**3 / median_ms(lambda: a @ b) * 1000,
    }


def count_bytes(tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def time_passes(case: Case, way: Way, shape: Shape, dtype: torch.dtype, names) -> dict[str, tuple[float, int, float]]:
    """Of every pass milliseconds, and the bytes and operations that the op needs."""
    options, tensors = case.options(shape), draw(case, shape, dtype)
    function, operations, found = way.prepare(case, shape, tensors, options), case.operations(shape), {}
    leaves = as_leaves(tensors, None, False)
    with torch.no_grad():
        out = outputs(function, leaves)
        moved = case.moved(shape, tensors) if case.moved else count_bytes(tensors) + count_bytes(out)
        found["forward"] = median_ms(lambda: function(*leaves), case.graph), moved, operations
    if "backward" in names:
        leaves = as_leaves(tensors, None, True)
        of_out, of_grads = count_bytes(out[:1]), count_bytes([x for x in leaves if x.requires_grad])
        moved = count_bytes(tensors) + 2 * of_out + of_grads  # d_out beside the output, a gradient of every input
        found["backward"] = median_ms(backward_of(function, leaves)), moved, case.backward * operations
    return found


def measure(case: Case, shape: Shape, dtype: torch.dtype, peak: dict[str, float]) -> Iterator[dict]:
    """A record for every way and pass."""
    check = Check(case, shape, dtype)
    for way in ways(case):
        passes = ["forward", "backward"] if case.backward else ["forward"]
        common = {"op": case.op, "title": case.title, "way": way.name}
        records = [common | {"pass": name, "state": "timed"} for name in passes]
        has_gradient = way.gradient == "yes" or (way.gradient == "gpu" and DEVICE == "cuda")
        if why := obstacle(way):
            yield from (record | {"state": why} for record in records)
            continue
        if case.backward and not has_gradient:
            records[1]["state"] = "no gradient" + (" without a GPU" if way.gradient == "gpu" else "")
        try:
            errors = check.errors(way, case.backward > 0 and has_gradient)
            wrong = not all(fits for _, fits in errors.values())
            times = {} if wrong else time_passes(case, way, shape, dtype, errors)
        except Exception as error:  # a peer of another version, or too little memory: its row says so, others go on
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            yield from (record | {"state": "raised", "message": said} for record in records)
            continue
        for record in records:
            if record["pass"] not in errors:
                yield record
                continue
            record["error"], fits = errors[record["pass"]]
            if wrong:
                record["state"] = "untimed" if fits else "WRONG"
            else:
                ms, moved, operations = times[record["pass"]]
                shares = moved / ms * 1000 / peak["bytes"], operations / ms * 1000 / peak["operations"]
                record |= {"ms": ms, "bytes": moved, "operations": operations}
                record |= dict(zip(("of_bandwidth", "of_matrix_peak"), shares, strict=True))
            yield record


# ----------------------------------------------------------------------------------------------------------------------
# The program
# ----------------------------------------------------------------------------------------------------------------------

HEADER = f"{'op':30}{'pass':9}{'way':19}{'error':>9}{'ms':>10}{'bandwidth':>11}{'matrix':>8}{'x ours':>8}"


def line_of(record: dict, ours: float | None) -> str:
    """A row of the table; `ours` are the milliseconds of our kernel."""
    op = f"{record['op']}, {record['title']}" if record["title"] else record["op"]
    line = f"{op:30}{record['pass']:9}{record['way']:19}"
    if "error" in record:
        line += f"{record['error']:9.1e}"
    if record["state"] != "timed":
        return f"{line}  {record.get('message', record['state'])}"
    matrix = f"{record['of_matrix_peak']:8.1%}" if record["operations"] else f"{'-':>8}"
    ratio = f"{record['ms'] / ours:8.2f}" if ours else f"{'-':>8}"
    return f"{line}{record['ms']:10.3f}{record['of_bandwidth']:11.1%}{matrix}{ratio}"


def shape_of(text: str) -> Shape:
    """A shape by its name, or by what is different from "long"."""
    if text in SHAPES:
        return SHAPES[text]
    try:
        shape = Shape()._replace(**{name: int(size) for name, size in (part.split("=") for part in text.split(","))})
    except ValueError as error:
        names = ", ".join(SHAPES)
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither one of {names} nor sizes like seq_len=4096,window=256"
        ) from error
    if shape.seq_len <= shape.window:
        raise argparse.ArgumentTypeError(f"seq_len is {shape.seq_len}; it must be above the window, {shape.window}")
    return shape


def describe() -> dict[str, str]:
    import triton

    name = (
        torch.cuda.get_device_name()
        if DEVICE == "cuda"
        else f"no GPU, times mean nothing: Triton's interpreter on {platform.machine()}"
    )
    command = shlex.join(["python", "examples/benchmark_kernels.py", *sys.argv[1:]])
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": str(date.today()),
        "command": command,
    }


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ["long", "batch", "wide"] if DEVICE == "cuda" else ["toy"]
    parser.add_argument("--shapes", nargs="+", default=default, metavar="SHAPE", help=f"default: {' '.join(default)}")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--ops", nargs="+", choices=sorted({case.op for case in CASES}), help="default: all")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    options = parser.parse_args(arguments)
    if find_spec("triton") is None:
        parser.error("the kernels need triton: pip install triton (Linux)")
    try:
        shapes = {name: shape_of(name) for name in options.shapes}
    except argparse.ArgumentTypeError as error:
        parser.error(f"--shapes: {error}")
    dtype = getattr(torch, options.dtype)
    about, peak, records = describe(), peaks(dtype), []
    print(*(f"{name}: {value}" for name, value in about.items()), sep="\n")
    print(f"copy: {peak['bytes'] / 1e9:.0f} GB/s; product in {options.dtype}: {peak['operations'] / 1e12:.3g} TFLOP/s")
    for name, shape in shapes.items():
        print(f"\n{name}: {', '.join(f'{key} {size}' for key, size in shape._asdict().items())}\n{HEADER}")
        for case in [case for case in CASES if options.ops is None or case.op in options.ops]:
            ours = {}
            for record in measure(case, shape, dtype, peak):
                records.append({"shape": name, **record})
                if record["way"] == OURS:
                    ours[record["pass"]] = record.get("ms")
                print(line_of(record, ours.get(record["pass"])), flush=True)
    if options.output:
        shapes = {name: shape._asdict() for name, shape in shapes.items()}
        found = {**about, "dtype": options.dtype, "peaks": peak, "shapes": shapes, "records": records}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    failed = [record for record in records if record["way"] == OURS and record["state"] in ("WRONG", "raised")]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
