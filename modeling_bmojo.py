"""B'MOJO in transformers: layers that answer each token from a window, a fading and an eidetic memory (arXiv 2407.06324)."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.generation import GenerationMixin
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple, logging

from .cache_bmojo import BMojoCache, cache_bytes, convolved_widths, memory_slots
from .configuration_bmojo import AUTO_MAP, DELTA_TYPES, LEARNED_CHOICES, BMojoConfig
from .delta_ops_bmojo import delta_step, kalman_step
from .kernels_bmojo import (
    attach,
    causal_conv,
    copy_kernels,
    delta_scan,
    kalman_scan,
    memory_attention,
    prediction_error,
    rms_norm,
    rotate,
    selective_scan,
    silu_gate,
    ssd_scan,
)
from .layout_bmojo import PackedLayout, Rows, read_layout, read_mask
from .numerics_bmojo import at_least_float32, widen
from .ops_bmojo import (
    hash_scores,
    predict,
    rotary_table,
    running_selection,
    select,
    selective_step,
    ssd_step,
)


logger = logging.get_logger(__name__)


# ----------------------------------------------------------------------------------------------------------------------
# Outputs and what all layers of a call share
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class BMojoModelOutput(BaseModelOutputWithPast):
    """Output of `BMojoModel`.

    Args:
        innovations: with `output_eidetic`, per layer the innovation of every token of the call, (batch, seq_len) in
            float32 or wider, 0 for padding; None for layers without eidetic memory.
        eidetic_positions: with `output_eidetic`, per layer the memory that every chunk of the call saw, (rows, chunks,
            eidetic_size) int64: positions in ascending order, counting the real tokens of a row (or of a packed
            document) from 0; -1 for empty places, which come first. The first chunk is the one of the first new token.
        predictor_loss: while training the learnable predictor, the sum over layers of its mean squared error.
    """

    innovations: tuple[torch.Tensor | None, ...] | None = None
    eidetic_positions: tuple[torch.Tensor | None, ...] | None = None
    predictor_loss: torch.Tensor | None = None


@dataclass
class BMojoCausalLMOutput(CausalLMOutputWithPast):
    """Output of `BMojoForCausalLM`: transformers' fields, and those of `BMojoModelOutput`."""

    innovations: tuple[torch.Tensor | None, ...] | None = None
    eidetic_positions: tuple[torch.Tensor | None, ...] | None = None


@dataclass
class Step:
    """What every layer needs to answer one token of each row from the cache.

    Attributes:
        index: by layer type the slots that the token is written to, one of every ring, (rows, 1, rings, 1) int64.
        mask: by layer type what is added to the scores of all slots, (rows or rows * kv heads, 1, slots): 0 or -inf.
        cos, sin: for queries, queries of the eidetic memory, of fading keys (as far as there are) and keys, side by side as
            heads, (rows, 1, heads, head_dim); times the scale of the scores for queries.
        predictor: weights of the outputs in `history` for the prediction of this one, (rows, 1, innovation_kernel).
        boundary: rows that begin a chunk, (rows, 1) bool; None where none does.
    """

    index: dict[str, torch.Tensor]
    mask: dict[str, torch.Tensor]
    cos: torch.Tensor
    sin: torch.Tensor
    predictor: torch.Tensor
    boundary: torch.Tensor | None

    def row(self, number: int, rows: int) -> "Step":
        """The step of one of the rows, for `rows` rows that are all as far."""
        own = slice(number, number + 1)
        index = {name: part[own].expand(rows, -1, -1, -1) for name, part in self.index.items()}
        mask = {name: part[own] for name, part in self.mask.items()}
        return Step(index, mask, self.cos[own], self.sin[own], self.predictor[own].expand(rows, -1, -1), None)


@dataclass
class Call:
    """What the layers need to know about one forward call on rows whose real tokens stand at the front.

    Attributes:
        past: tokens that came before, (rows,) int64; None where no cache is given, that is: none.
        lengths: real tokens of the call, (rows,) int64; None: all of them are.
        positions: position of every token in its row, (rows or 1, seq_len) int64.
        table: from positions (...) to cos and sin (..., head_dim); `inverse=True` for the opposite rotation. Where only a
            part of a head is rotated, sin is as wide as that part, and cos 1 beyond it.
        cos, sin: the table at `positions`.
        scaling: the factor that is on them (attention scaling of YaRN; 1 else).
        in_place: states may be overwritten: no gradient is recorded and nothing will be rolled back.
        any_mode: whether torch lets this call write what was made in inference mode.
        fixed_columns: the keys of full attention have all their room already (`max_cache_len`).
        phase: how far into its chunk a row is before the call, (rows, 1) int64; None without past.
        lead: the largest phase, or chunk - 1 where asking would stop a GPU or a compiler.
        step: of a single token with a cache.
    """

    past: torch.Tensor | None
    lengths: torch.Tensor | None
    positions: torch.Tensor
    table: Callable
    cos: torch.Tensor
    sin: torch.Tensor
    scaling: float
    in_place: bool
    any_mode: bool
    fixed_columns: bool
    phase: torch.Tensor | None
    lead: int
    step: Step | None

    @property
    def seq_len(self) -> int:
        return self.positions.shape[1]

    @property
    def past_column(self) -> torch.Tensor | int:
        """`past` as a column, (rows, 1), or 0."""
        return 0 if self.past is None else self.past[:, None]

    def real(self) -> torch.Tensor | None:
        """(rows, seq_len) bool, False behind a row's last token; None where all are real."""
        if self.lengths is None:
            return None
        return torch.arange(self.seq_len, device=self.lengths.device) < self.lengths[:, None]

    def to(self, device, **kwargs) -> "Call":
        """The call on another device: what accelerate's hooks ask of an argument when layers are spread over devices."""

        def move(value):
            if isinstance(value, dict):
                return {name: move(part) for name, part in value.items()}
            if isinstance(value, Step):
                return Step(**move(vars(value)))
            return value.to(device, **kwargs) if isinstance(value, torch.Tensor) else value

        return Call(**move(vars(self)))

    def end(self) -> torch.Tensor:
        """Position behind the last real token, (rows or 1, 1)."""
        new = self.seq_len if self.lengths is None else self.lengths[:, None]
        return self.past_column + new + torch.zeros_like(self.positions[:, :1])

    def align(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, seq_len, ...) to (rows, lead + seq_len, ...), every row beginning with its first chunk."""
        if not self.lead:
            return x
        slots = torch.arange(self.lead + self.seq_len, device=x.device) - self.phase
        return take_rows(x, slots.clamp(min=0, max=self.seq_len - 1))

    def unalign(self, x: torch.Tensor) -> torch.Tensor:
        """The way back."""
        return take_rows(x, self.phase + torch.arange(self.seq_len, device=x.device)) if self.lead else x

    def may_overwrite(self, state: torch.Tensor) -> bool:
        """Whether a tensor of the cache may be written in place: no open graph needs it as it is."""
        return self.in_place and not state.requires_grad and (self.any_mode or not state.is_inference())

    def put(self, state: torch.Tensor, dim: int, index: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """The state with `new` scattered at `index` along `dim`, for rows that have a token."""
        new = new if new.dtype is state.dtype else new.to(state.dtype)
        if self.lengths is not None:
            wanted = (self.lengths > 0).view(-1, *[1] * (state.dim() - 1))
            new = torch.where(wanted, new, state.gather(dim, index))
        return state.scatter_(dim, index, new) if self.may_overwrite(state) else state.scatter(dim, index, new)


@dataclass
class PackedCall:
    """A call on packed documents: a `Call` for every group of documents of similar length.

    Attributes:
        groups: the documents as `Rows`, their `Call`, and which of the flattened rows' places are real tokens.
        where: places of those tokens in the flattened input, group after group.
        order: for the rows of all groups, one after the other, how to put them in the order of the documents.
    """

    groups: list[tuple[Rows, Call, torch.Tensor]]
    where: torch.Tensor
    order: torch.Tensor

    @classmethod
    def of(cls, layout: PackedLayout, make_call: Callable[[Rows], Call]) -> "PackedCall":
        groups = [(rows, make_call(rows), rows.real.flatten().nonzero().squeeze(-1)) for rows in layout.groups]
        where = torch.cat([rows.index.flatten()[taken] for rows, _, taken in groups])
        return cls(groups, where, torch.cat(layout.members).argsort())

    def to(self, device, **kwargs) -> "PackedCall":
        """As `Call.to`."""
        groups = []
        for rows, call, taken in self.groups:
            moved = Rows(rows.index.to(device, **kwargs), rows.real.to(device, **kwargs))
            groups.append((moved, call.to(device, **kwargs), taken.to(device, **kwargs)))
        return PackedCall(groups, self.where.to(device, **kwargs), self.order.to(device, **kwargs))

    def mix(self, mixer: nn.Module, u: torch.Tensor):
        """The mixer's output on every document, in the places of the input, (batch, seq_len, hidden_size); and its memory."""
        found = [mixer(rows.to_rows(u), call) for rows, call, _ in self.groups]
        memories = [memory for _, _, memory in found]
        together = {}
        if "innovation" in memories[0]:
            together["innovation"] = self._back([memory["innovation"] for memory in memories], u.shape[:2])
        if "positions" in memories[0]:
            chunks = max(memory["positions"].shape[1] for memory in memories)
            padded = [F.pad(m["positions"], (0, 0, 0, chunks - m["positions"].shape[1]), value=-1) for m in memories]
            together["positions"] = torch.cat(padded)[self.order]
        if "loss" in memories[0]:
            shares = [len(taken) / len(self.where) for _, _, taken in self.groups]
            together["loss"] = sum(share * memory["loss"] for share, memory in zip(shares, memories, strict=True))
        return self._back([output[0] for output in found], u.shape[:2]), together

    def _back(self, parts: list[torch.Tensor], shape) -> torch.Tensor:
        """Rows of every group (rows, columns, ...) to (batch, seq_len, ...), zero for padding."""
        taken = [
            part.flatten(0, 1).index_select(0, taken) for part, (_, _, taken) in zip(parts, self.groups, strict=True)
        ]
        tokens = torch.cat(taken)
        empty = tokens.new_zeros(shape.numel(), *tokens.shape[1:])
        return empty.index_copy(0, self.where, tokens).view(*shape, *tokens.shape[1:])


def take_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x[row, index[row]]: (rows, n, ...) and (rows, m) to (rows, m, ...)."""
    rows = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (rows + index).flatten()).view(*index.shape, *x.shape[2:])


def timeline(new, ring, call: Call, start, length: int):
    """Lay out past and new tokens by position: slot i holds the token at position start + i.

    Args:
        new: tokens of the call, (rows, seq_len, ...).
        ring: the last tokens before them, position p in slot p % size, (rows, size, ...).
        start: position of slot 0, (rows, 1) int64.
        length: number of slots.

    Returns:
        (rows, length, ...). What is not held (before position 0, overwritten in the ring, or behind the call) is
        another token, or what the ring began with.
    """
    slots = start + torch.arange(length, device=new.device)
    size = ring.shape[1]
    index = torch.where(
        slots >= call.past_column, size + (slots - call.past_column).clamp(max=new.shape[1] - 1), slots % size
    )
    return take_rows(torch.cat([ring.to(new.dtype), new], 1), index)


def write_ring(ring, new, call: Call):
    """The ring after the call: position p in slot p % size, for every row's last real tokens."""
    size = ring.shape[1]
    slots = torch.arange(size, device=ring.device)
    last = call.end() - 1
    position = last - (last - slots) % size  # the newest position that belongs in each slot
    index = (position - call.past_column).clamp(min=0, max=new.shape[1] - 1).expand(ring.shape[0], size)
    is_new = ((position >= call.past_column) & (position >= 0)).expand(ring.shape[0], size)
    return torch.where(is_new.view(*is_new.shape, *[1] * (ring.dim() - 2)), take_rows(new, index).to(ring.dtype), ring)


def ring_positions(ring, last):
    """Position held by each slot of a ring whose newest token is at `last` (rows or 1, 1); negative where empty."""
    slots = torch.arange(ring.shape[1], device=ring.device)
    return last - (last - slots) % ring.shape[1]


def last_rows(previous, new, lengths):
    """The last tokens of (previous, new) in a buffer as long as `previous`, given the real lengths of `new`."""
    size = previous.shape[1]
    if lengths is None:
        both = torch.cat([previous.to(new.dtype), new[:, max(0, new.shape[1] - size) :]], 1)
        return both[:, both.shape[1] - size :]
    both = torch.cat([previous.to(new.dtype), new], 1)
    return take_rows(both, lengths[:, None] + torch.arange(size, device=new.device))


def predictor_weights(config, dtype, device) -> torch.Tensor:
    """Weights of the fixed predictors, (innovation_kernel,), the newest output's first."""
    ages = torch.arange(config.innovation_kernel, dtype=dtype, device=device)
    if config.innovation_predictor == "exponential" and config.innovation_kernel > 1:
        return (1 - 2 / (config.innovation_kernel + 1)) ** (1 + ages)
    return torch.ones_like(ages)


def score_scale(config) -> float:
    """The factor on the scores of attention."""
    return config.head_dim**-0.5 if config.softmax_scale is None else config.softmax_scale


def step_plan(config) -> SimpleNamespace:
    """What `make_step` reads of the configuration, whose own attributes are slow to read."""
    names = (
        "sliding_window eidetic_size eidetic_chunk_size eidetic_position fading_span innovation_kernel "
        "innovation_predictor num_attention_heads num_key_value_heads head_dim fading_query"
    )
    plan = SimpleNamespace(**{name: getattr(config, name) for name in names.split()})
    plan.softmax_scale = score_scale(config)
    kinds = sorted(set(config.layers_block_type) & {"sliding_attention", "bmojo"})
    plan.slots = {layer_type: memory_slots(config, layer_type) for layer_type in kinds}
    return plan


def make_step(config, past, like: torch.Tensor, table: Callable, scaling: float) -> Step:
    """Work out a `Step`, but for its boundary, for rows that have seen `past` (rows,) tokens.

    config is a `step_plan`, `like` gives dtype and device, table and scaling are those of `Call`.
    """
    dtype, device = at_least_float32(like), past.device
    position, rows = past[:, None], len(past)
    index, mask = {}, {}
    for layer_type, slots in config.slots.items():
        written, visible = [], []
        for span, newest in (("window", 0), ("fading", config.sliding_window)):
            if span in slots:
                size = slots[span].stop - slots[span].start
                age = (position - torch.arange(size, device=device)) % size
                visible.append((age >= newest) & (age < newest + config.sliding_window) & (age <= position))
                written.append(slots[span].start + position % size)
        if "eidetic" in slots:  # filled from the back with the tokens that have left the window at the chunk's start
            begun = position - position % config.eidetic_chunk_size - config.sliding_window + 1
            visible.append(torch.arange(config.eidetic_size, 0, -1, device=device) <= begun)
        index[layer_type] = torch.cat(written, 1)[:, None, :, None]
        unseen = torch.zeros(1, dtype=dtype, device=device).masked_fill(~torch.cat(visible, 1), -torch.inf)
        mask[layer_type] = unseen[:, None]

    queries, keys = config.num_attention_heads, config.num_key_value_heads * (2 if config.fading_span else 1)
    at = [position.expand(rows, queries), position.expand(rows, keys)]
    if config.eidetic_size:
        at.insert(1, torch.full_like(at[0], 2 * config.sliding_window))
    if config.fading_query:
        at.insert(-1, at[0])
    cos, sin = table(torch.cat(at, 1)[:, None])
    rotated = sin.shape[-1]
    factor = torch.ones(cos.shape[2], 1 if scaling == 1 else cos.shape[-1], dtype=dtype, device=device)
    factor[: cos.shape[2] - keys] = config.softmax_scale
    if config.eidetic_size and config.eidetic_position == "constant":
        factor[queries : 2 * queries, :rotated] *= scaling  # as `eidetic_key`
    cos, sin = cos * factor, sin * factor[:, :rotated]

    ages = torch.arange(config.innovation_kernel, 0, -1, device=device)  # the oldest comes first
    weights = predictor_weights(config, dtype, device).flip(0) * (ages <= position)
    total = weights.sum(-1, keepdim=True)
    return Step(index, mask, cos, sin, (weights / torch.where(total > 0, total, 1))[:, None], None)


# ----------------------------------------------------------------------------------------------------------------------
# Norms, MLP, and the fading memory
# ----------------------------------------------------------------------------------------------------------------------


class BMojoRMSNorm(nn.Module):
    """RMSNorm over the last axis, or over groups of it, with or without weight; statistics in float32 or wider."""

    def __init__(self, size: int, eps: float, n_groups: int = 1, learned: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size)) if learned else None
        self.eps, self.n_groups = eps, n_groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        form = rms_norm if x.shape[1] > 1 else rms_norm.definition  # choosing would cost a single token as much
        weight = self.weight
        return form(x, x.new_ones(x.shape[-1]) if weight is None else weight, self.eps, self.n_groups)


class BMojoLayerNorm(nn.LayerNorm):
    """LayerNorm over the last axis, computed in float32 or wider."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = F.layer_norm(widen(x), self.normalized_shape, widen(self.weight), widen(self.bias), self.eps)
        return normed.to(x.dtype)


def block_norm(config) -> nn.Module:
    """The norm before a mixer, before an MLP, and at the end of the model."""
    return (BMojoRMSNorm if config.rms_norm else BMojoLayerNorm)(config.hidden_size, eps=config.rms_norm_eps)


class BMojoMLP(nn.Module):
    block = (
        512  # tokens that a CPU takes at once where no gradient is recorded: what lies between stays near the cache
    )

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn, self.is_silu = ACT2FN[config.hidden_act], config.hidden_act in ("silu", "swish")
        self.multipliers = config.mlp_multipliers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cpu" and x.shape[1] > self.block and not torch.is_grad_enabled():
            return torch.cat([self._forward(part) for part in x.split(self.block, 1)], 1)
        return self._forward(x)

    def _forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.multipliers is not None:
            gate = gate * self.multipliers[0]
        out = self.down_proj(silu_gate(gate, up) if self.is_silu and x.shape[1] > 1 else self.act_fn(gate) * up)
        return out if self.multipliers is None else out * self.multipliers[1]


class BMojoDynamics(nn.Module):
    """A_log, D and dt_bias of an SSM, in a module with a forward: PEFT's `modules_to_save`, FSDP2 units and hooks reach it."""

    def __init__(self, config, kind: str):
        super().__init__()
        if kind == "mamba2":
            channels, decays = config.mamba_num_heads, (config.mamba_num_heads,)
            skips = channels * (config.mamba_head_dim if config.D_has_hdim else 1)
        else:
            channels = skips = sum(convolved_widths(config, kind))
            decays = (channels, config.state_size)
        self.kind, self.config, self.limit = kind, config, config.time_step_limit
        self.A_log = nn.Parameter(torch.zeros(decays))
        self.D = nn.Parameter(torch.ones(skips))
        self.dt_bias = nn.Parameter(torch.zeros(channels))

    def forward(self, dt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """From the raw dt (..., channels) to the time step, A and D, all in float32 or wider."""
        dt, A_log, D, bias = widen(dt), widen(self.A_log), widen(self.D), widen(self.dt_bias)
        dt = F.softplus(dt + bias)
        if self.limit is not None:
            dt = dt.clamp(*self.limit)
        return dt, -A_log.exp(), D

    def initialise(self):
        """The papers' distributions: dt log-uniform in [time_step_min, time_step_max], A as in Mamba or Mamba2."""
        config, shape = self.config, self.dt_bias.shape
        initialise_time_step(self.dt_bias, config)
        if self.kind == "mamba2":
            init.copy_(self.A_log, (torch.rand(shape) * 15 + 1).log())
        else:
            init.copy_(self.A_log, torch.arange(1, config.state_size + 1).log().expand_as(self.A_log))
        init.ones_(self.D)


class BMojoDecay(nn.Module):
    """A_log and dt_bias of an SSM whose time step acts on the decay alone; a module for the reasons of `BMojoDynamics`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.A_log = nn.Parameter(torch.zeros(config.num_attention_heads))
        self.dt_bias = nn.Parameter(torch.zeros(config.num_attention_heads))

    def forward(self, dt: torch.Tensor) -> torch.Tensor:
        """From the raw dt (..., heads) to the logarithm of the decay, in float32 or wider."""
        return -widen(self.A_log).exp() * F.softplus(widen(dt) + widen(self.dt_bias))

    def initialise(self):
        """As in Mamba2."""
        initialise_time_step(self.dt_bias, self.config)
        init.copy_(self.A_log, (torch.rand(self.A_log.shape) * 15 + 1).log())


def initialise_time_step(dt_bias: nn.Parameter, config) -> None:
    """A time step that is log-uniform in [time_step_min, time_step_max]."""
    low, high = torch.tensor(config.time_step_min).log(), torch.tensor(config.time_step_max).log()
    dt = (torch.rand(dt_bias.shape) * (high - low) + low).exp().clamp(min=config.time_step_floor)
    init.copy_(dt_bias, dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus


class BMojoConv1d(nn.Conv1d):
    """The short causal convolution: a depthwise `nn.Conv1d` to whoever looks at it, computed over time-major data."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(rows, channels, conv_kernel - 1 + seq_len) to (rows, channels, seq_len)."""
        if x.shape[2] == self.kernel_size[0]:  # one token
            x, weight = x.transpose(0, 1), self.weight.transpose(1, 2)  # a product for every channel
            if self.bias is None:
                return torch.bmm(x, weight).transpose(0, 1)
            return torch.baddbmm(self.bias[:, None, None], x, weight).transpose(0, 1)
        return causal_conv(x.transpose(1, 2), self.weight[:, 0], self.bias).transpose(1, 2)


class BMojoSSM(nn.Module):
    """What the SSMs share: input projection, short causal convolution, and the handling of state and padding."""

    def __init__(self, config, projected: int, convolved: int, inner: int, kind: str):
        super().__init__()
        self.config = config
        self.act_fn = F.silu if config.mamba_hidden_act in ("silu", "swish") else ACT2FN[config.mamba_hidden_act]
        self.taps, self.chunk_size = config.conv_kernel, config.chunk_size
        self.in_proj = nn.Linear(config.hidden_size, projected, bias=config.use_bias)
        if convolved:
            self.conv1d = BMojoConv1d(
                convolved, convolved, config.conv_kernel, groups=convolved, bias=config.use_conv_bias, padding=0
            )
        self.dynamics = BMojoDecay(config) if kind in DELTA_TYPES else BMojoDynamics(config, kind)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=config.projectors_bias)

    def convolve(self, x, call: Call, state):
        """act_fn(conv(x)) and the last inputs of every row, (rows, conv_kernel - 1, channels)."""
        size = self.taps - 1
        history = x.new_zeros(x.shape[0], size, x.shape[2]) if state is None else state["conv"]
        inputs = torch.cat([history.to(x.dtype), x], 1)
        if call.lengths is None:
            last = inputs[:, inputs.shape[1] - size :]
            last = last.clone() if call.step is None else last  # not to keep all inputs
        else:
            last = take_rows(inputs, call.lengths[:, None] + torch.arange(size, device=x.device))
        return self.act_fn(self.conv1d(inputs.transpose(1, 2)).transpose(1, 2)), last

    def input_norm(self, size: int) -> BMojoRMSNorm:
        """A norm inside the mixer, as `mixer_norm` wants it."""
        return BMojoRMSNorm(size, self.config.mixer_rms_eps, learned=self.config.mixer_norm == "learned")

    def time_step(self, dt, call: Call):
        """dt, A and D; dt is 0 behind a row's last token, which then leaves the state as it is."""
        dt, A, D = self.dynamics(dt)
        real = call.real()
        return (dt if real is None else dt.masked_fill(~real[..., None], 0)), A, D


class BMojoMamba2(BMojoSSM):
    """Mamba2's mixer (arXiv 2405.21060): a complete layer from (rows, seq_len, hidden_size) to the same.

    Rows of in_proj: gate and value of the MLP branch (`mamba_d_mlp` each), z, x, B, C, dt; out_proj reads the branch, then the SSM.
    """

    def __init__(self, config):
        heads, head_dim, state_size = config.mamba_num_heads, config.mamba_head_dim, config.state_size
        self.inner, self.branch = heads * head_dim, config.mamba_d_mlp
        self.widths = convolved_widths(config, "mamba2")
        self.sizes = [self.inner, sum(self.widths), heads]
        super().__init__(config, 2 * self.branch + sum(self.sizes), self.sizes[1], self.branch + self.inner, "mamba2")
        vectors = (head_dim, state_size, state_size)  # of x, B and C
        self.vectors = [(width // size, size) for width, size in zip(self.widths, vectors, strict=True)]
        self.repeats = heads // (config.mamba_num_key_value_heads or heads)
        self.D_shape = heads, head_dim if config.D_has_hdim else 1
        self.norm = None
        if config.mamba_rms_norm:
            eps = config.rms_norm_eps if config.mamba_norm_eps is None else config.mamba_norm_eps
            self.norm = BMojoRMSNorm(self.inner, eps, config.n_groups)
        self.norm_first = config.mamba_rms_norm and config.mamba_norm_before_gate
        self.multipliers = config.ssm_multipliers
        self.turned, self.normed = config.mamba_use_pos_emb, config.mixer_norm is not None
        if self.normed:
            self.B_norm, self.C_norm = self.input_norm(state_size), self.input_norm(state_size)

    def forward(self, u, call: Call, state=None):
        """Returns y as u, the tensors "conv" and "ssm" of the new state, and nothing to show."""
        projected, mlp = self.in_proj(u), None
        if self.branch:
            gate, value, projected = projected.split_with_sizes([self.branch, self.branch, sum(self.sizes)], -1)
            mlp = silu_gate(gate, value)
        if self.multipliers is not None:
            parts = projected.split_with_sizes([self.inner, *self.widths, self.sizes[2]], -1)
            projected = torch.cat([part * by for part, by in zip(parts, self.multipliers, strict=True)], -1)
        z, xbc, dt = projected.split_with_sizes(self.sizes, -1)
        if self.normed or self.turned:
            xbc = self.norm_and_turn(xbc, call)
        xbc, conv = self.convolve(xbc, call, state)
        x, B, C = xbc.split_with_sizes(self.widths, -1)
        dt, A, D = self.time_step(dt, call)
        shape = u.shape[:2] if call.step is None else u.shape[:1]
        x_heads, B_heads, C_heads = self.vectors
        x, B, C = x.reshape(*shape, *x_heads), B.reshape(*shape, *B_heads), C.reshape(*shape, *C_heads)
        if self.repeats > 1:
            x, B = x.repeat_interleave(self.repeats, -2), B.repeat_interleave(self.repeats, -2)
        if call.step is None:
            y, ssm = ssd_scan(x, dt, A, B, C, None if state is None else state["ssm"], self.chunk_size)
        else:
            y, ssm = ssd_step(x, dt[:, 0], A, B, C, state["ssm"], call.may_overwrite(state["ssm"]))
        y = torch.addcmul(y, D.view(self.D_shape), x.to(y.dtype)).reshape(z.shape).to(u.dtype)
        y = self.gated(z, y, silu_gate if call.step is None else silu_gate.definition)
        return self.out_proj(y if mlp is None else torch.cat([mlp, y], -1)), {"conv": conv, "ssm": ssm}, {}

    def norm_and_turn(self, xbc, call: Call):
        """x, B and C with B and C normalised per head and rotated, as far as the configuration wants it."""
        x, B, C = xbc.split_with_sizes(self.widths, -1)
        B, C = B.unflatten(-1, self.vectors[1]), C.unflatten(-1, self.vectors[2])
        if self.normed:
            B, C = self.B_norm(B), self.C_norm(C)
        if self.turned:
            B, C = rotate(B, call.cos, call.sin), rotate(C, call.cos, call.sin)
        return torch.cat([x, B.flatten(-2), C.flatten(-2)], -1)

    def gated(self, z, y, gate: Callable):
        """The SSM's output y with its gate and, where there is one, its norm."""
        if self.norm_first:
            return gate(z, self.norm(y))
        y = gate(z, y)
        return y if self.norm is None else self.norm(y)


class BMojoTimeStepProjection(nn.Linear):
    """Mamba's projection from the low-rank time step, a Linear that is initialised in its own way."""


class BMojoMamba(BMojoSSM):
    """Mamba's mixer (arXiv 2312.00752): a complete layer from (rows, seq_len, hidden_size) to the same."""

    def __init__(self, config):
        (inner,) = convolved_widths(config, "mamba")
        super().__init__(config, 2 * inner, inner, inner, "mamba")
        self.sizes = [config.time_step_rank, config.state_size, config.state_size]
        self.x_proj = nn.Linear(inner, config.time_step_rank + 2 * config.state_size, bias=False)
        self.dt_proj = BMojoTimeStepProjection(config.time_step_rank, inner, bias=False)
        self.normed = config.mixer_norm is not None
        if self.normed:
            self.dt_norm, self.B_norm, self.C_norm = (self.input_norm(size) for size in self.sizes)

    def forward(self, u, call: Call, state=None):
        """Returns y as u, the tensors "conv" and "ssm" of the new state, and nothing to show."""
        x, z = self.in_proj(u).chunk(2, -1)
        x, conv = self.convolve(x, call, state)
        dt, B, C = self.x_proj(x).split_with_sizes(self.sizes, -1)
        if self.normed:
            dt, B, C = self.dt_norm(dt), self.B_norm(B), self.C_norm(C)
        dt, A, D = self.time_step(self.dt_proj(dt), call)
        if call.step is None:
            y, ssm = selective_scan(x, dt, A, B, C, None if state is None else state["ssm"], self.chunk_size)
        else:
            now = (part.squeeze(1) for part in (x, dt))
            B, C = B.squeeze(1), C.squeeze(1)
            y, ssm = selective_step(*now, A, B, C, state["ssm"], call.may_overwrite(state["ssm"]))
            y = y[:, None]
        y = torch.addcmul(y, D, x.to(y.dtype)).to(u.dtype)
        return self.out_proj(silu_gate(z, y) if call.step is None else F.silu(z) * y), {"conv": conv, "ssm": ssm}, {}


class BMojoDelta(BMojoSSM):
    """What Gated DeltaNet and Gated KalmaNet share: queries, keys and values by head, decay, output norm and gate.

    Rows of `in_proj`: queries, keys, values, the gate, the decay's input, and what a subclass adds. Channels of `conv1d`:
    queries, keys, values.
    """

    def __init__(self, config, kind: str, *more: int):
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.sizes = [part * head_dim for part in (heads, kv_heads, kv_heads)]
        gate = heads * head_dim if config.use_gate else 0
        self.parts = [sum(self.sizes), gate, heads, *more]
        convolved = sum(convolved_widths(config, kind))
        super().__init__(config, sum(self.parts), convolved, heads * head_dim, kind)
        self.convolved, self.gated = convolved, config.use_gate
        eps = config.rms_norm_eps if config.mamba_norm_eps is None else config.mamba_norm_eps
        self.norm = BMojoRMSNorm(head_dim, eps)
        if config.kv_proj_rank is not None and heads > kv_heads:
            self.expand_k, self.expand_v = BMojoHeadExpansion(config), BMojoHeadExpansion(config)
        else:
            self.expand_k = self.expand_v = partial(repeat_heads, heads=heads)

    def project(self, u, call: Call, state):
        """Queries, keys and values (rows, seq_len, heads, head_dim), what the convolution keeps, and the other projections."""
        qkv, *others = self.in_proj(u).split_with_sizes(self.parts, -1)
        kept = {}
        if not self.convolved:
            qkv = self.act_fn(qkv)
        elif self.convolved == qkv.shape[-1]:
            qkv, kept["conv"] = self.convolve(qkv, call, state)
        else:
            qk, kept["conv"] = self.convolve(qkv[..., : self.convolved], call, state)
            qkv = torch.cat([qk, qkv[..., self.convolved :]], -1)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in qkv.split_with_sizes(self.sizes, -1))
        return widen(q), widen(self.expand_k(k)), widen(self.expand_v(v)), kept, others

    def hide(self, x, call: Call):
        """Zeros behind a row's last token, x (rows, seq_len, ...)."""
        real = call.real()
        return x if real is None else x.masked_fill(~real.view(*real.shape, *[1] * (x.dim() - 2)), 0)

    def finish(self, y, gate, u):
        """From what was read of the state, (rows, seq_len, heads, head_dim), to the output, as u."""
        y = self.norm(y.to(u.dtype)).flatten(-2)
        return self.out_proj(silu_gate(gate, y) if self.gated else y)


class BMojoDeltaNet(BMojoDelta):
    """Gated DeltaNet's mixer (arXiv 2412.06464): a complete layer from (rows, seq_len, hidden_size) to the same."""

    def __init__(self, config):
        super().__init__(config, "gated_deltanet", config.num_attention_heads)
        self.strongest = 2.0 if config.allow_neg_eigval else 1.0

    def forward(self, u, call: Call, state=None):
        """Returns y as u, the tensors "conv" and "ssm" of the new state, and nothing to show."""
        q, k, v, kept, (gate, dt, beta) = self.project(u, call, state)
        q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
        tokens = [q * self.head_dim**-0.5, k, v]
        tokens += [self.hide(x, call) for x in (self.dynamics(dt), self.strongest * widen(beta).sigmoid())]
        if call.step is None:
            y, kept["ssm"] = delta_scan(*tokens, None if state is None else state["ssm"], self.chunk_size)
        else:
            y, kept["ssm"] = delta_step(
                *(x.squeeze(1) for x in tokens), state["ssm"], call.may_overwrite(state["ssm"])
            )
            y = y[:, None]
        return self.finish(y, gate, u), kept, {}


class BMojoKalmaNet(BMojoDelta):
    """Gated KalmaNet's mixer (the authors' hybrid-model-factory): a complete layer from (rows, seq_len, hidden_size) to the same."""

    def __init__(self, config):
        super().__init__(config, "gated_kalmanet")
        self.solver = {name: getattr(config, name) for name in ("ridge_strength", "num_iter", "bp_lambda")}
        self.forgets = config.use_forgetting_gate, config.use_forgetting_gate and config.use_forgetting_gate_kk
        self.scale = config.head_dim**-0.5 if config.gla_rescale else 1.0
        self.b_proj = self.alpha_proj = None
        if config.use_beta_gate:
            self.b_proj = nn.Linear(config.hidden_size, self.heads)
        if config.use_alpha_connection:
            self.alpha_proj = nn.Linear(config.hidden_size, self.heads)

    def forward(self, u, call: Call, state=None):
        """Returns y as u, the tensors "conv", "ssm" and "kk_ssm" of the new state, and nothing to show."""
        q, k, v, kept, (gate, dt) = self.project(u, call, state)
        q, k = (x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + 1e-6) for x in (q, k))
        if self.b_proj is not None:
            beta = widen(self.b_proj(u)).sigmoid()[..., None] + 1e-6
            k, v = k * beta, v * beta
        decay = self.hide(self.dynamics(dt), call) if self.forgets[0] else torch.zeros_like(q[..., 0])
        decay_kk = decay if self.forgets[1] else torch.zeros_like(decay)
        alpha = torch.ones_like(decay) if self.alpha_proj is None else widen(self.alpha_proj(u)).sigmoid()
        tokens = [q, self.hide(k, call), v, decay, decay_kk, alpha]
        if call.step is None:
            before = (None, None) if state is None else (state["ssm"], state["kk_ssm"])
            y, kept["ssm"], kept["kk_ssm"] = kalman_scan(*tokens, *before, self.chunk_size, **self.solver)
        else:
            before = state["ssm"], state["kk_ssm"]
            in_place = all(map(call.may_overwrite, before))
            y, kept["ssm"], kept["kk_ssm"] = kalman_step(
                *(x.squeeze(1) for x in tokens), *before, in_place, **self.solver
            )
            y = y[:, None]
        return self.finish(y * self.scale, gate, u), kept, {}


class BMojoHeadExpansion(nn.Module):
    """From key-value heads to all heads: each repeated, or a learned mixture of them, plus a low-rank function of all."""

    def __init__(self, config):
        super().__init__()
        self.heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.down_proj = nn.Linear(kv_heads * config.head_dim, config.kv_proj_rank, bias=False)
        self.up_proj = nn.Linear(config.kv_proj_rank, self.heads * config.head_dim, bias=False)
        self.mixture = nn.Parameter(torch.zeros(self.heads, kv_heads)) if config.kv_learnable_residual else None

    def forward(self, x):
        """(rows, seq_len, kv_heads, head_dim) to (rows, seq_len, heads, head_dim)."""
        added = self.up_proj(F.silu(self.down_proj(x.flatten(-2)))).unflatten(-1, (self.heads, -1))
        return added + (repeat_heads(x, self.heads) if self.mixture is None else self.mixture @ x)

    def initialise(self):
        """Where mixtures are learned, they begin as repetitions."""
        if self.mixture is not None:
            heads, kv_heads = self.mixture.shape
            init.copy_(self.mixture, torch.eye(kv_heads).repeat_interleave(heads // kv_heads, 0))


def repeat_heads(x, heads: int):
    """(rows, seq_len, kv_heads, head_dim) to (rows, seq_len, heads, head_dim), each repeated in a row."""
    return x.repeat_interleave(heads // x.shape[-2], -2) if heads > x.shape[-2] else x


SSM_CLASSES = {
    "mamba": BMojoMamba,
    "mamba2": BMojoMamba2,
    "gated_deltanet": BMojoDeltaNet,
    "gated_kalmanet": BMojoKalmaNet,
}


# ----------------------------------------------------------------------------------------------------------------------
# Attention over the memories
# ----------------------------------------------------------------------------------------------------------------------


class BMojoAttention(nn.Module):
    """Projections that all attention layers share, and causal attention over everything: `full_attention`."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(
            config.hidden_size, config.num_attention_heads * config.head_dim, bias=config.attention_bias
        )
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(
            config.num_attention_heads * config.head_dim, config.hidden_size, bias=config.attention_out_bias
        )
        self.q_norm = BMojoRMSNorm(config.head_dim, config.rms_norm_eps) if config.use_qk_norm else nn.Identity()
        self.k_norm = BMojoRMSNorm(config.head_dim, config.rms_norm_eps) if config.use_qk_norm else nn.Identity()
        self.head_dim, self.scale, self.key_multiplier = config.head_dim, score_scale(config), config.key_multiplier
        self.interleaved = config.rotary_dim if config.rope_interleave else 0
        self.conv1d = None
        if config.attention_conv_kernel:
            channels, taps = self.q_proj.out_features + 2 * kv_size, config.attention_conv_kernel
            self.conv1d = BMojoConv1d(channels, channels, taps, groups=channels, bias=True, padding=0)

    def heads(self, x):
        return x.unflatten(-1, (-1, self.head_dim))

    def query_heads(self, x, norm=None):
        """Projected queries (..., heads * head_dim) to (..., heads, head_dim), as they are before the rotation."""
        query = (norm or self.q_norm)(self.heads(x))
        return self.halves(query) if self.interleaved else query

    def key_heads(self, x, norm=None):
        """Projected keys (..., kv heads * head_dim) to (..., kv heads, head_dim), as they are before the rotation."""
        key = (norm or self.k_norm)(self.heads(x))
        if self.key_multiplier != 1:
            key = key * self.key_multiplier
        return self.halves(key) if self.interleaved else key

    def halves(self, x):
        """Entries 2i and 2i + 1, which turn together, moved to i and i + half: scores do not see the order of entries."""
        front, rest = x.split_with_sizes([self.interleaved, self.head_dim - self.interleaved], -1)
        return torch.cat([front[..., ::2], front[..., 1::2], rest], -1)

    def project(self, u, call: Call, state):
        """Queries and keys, rotated, and values, each (rows, seq_len, heads, head_dim); and what of the state this keeps."""
        query, key, value, kept = self.q_proj(u), self.k_proj(u), self.v_proj(u), {}
        if self.conv1d is not None:
            sizes, joint = [query.shape[-1], key.shape[-1], value.shape[-1]], torch.cat([query, key, value], -1)
            if state is None:
                history = joint.new_zeros(len(joint), self.conv1d.kernel_size[0] - 1, joint.shape[2])
            else:
                history = state["qkv_conv"]
            kept["qkv_conv"] = last_rows(history, joint, call.lengths)
            joint = self.conv1d(torch.cat([history.to(joint.dtype), joint], 1).transpose(1, 2)).transpose(1, 2)
            query, key, value = joint.split_with_sizes(sizes, -1)
        query, key = self.query_heads(query), self.key_heads(key)
        return rotate(query, call.cos, call.sin), rotate(key, call.cos, call.sin), self.heads(value), kept

    def forward(self, u, call: Call, state=None):
        """From (rows, seq_len, hidden_size) to the same, the new state (None without cache) and nothing to show."""
        query, key, value, kept = self.project(u, call, state)
        if state is not None:
            key, value = self._append(state["full_key"], key, call), self._append(state["full_value"], value, call)
            state = {"full_key": key, "full_value": value, **kept}
        columns = torch.arange(key.shape[1], device=u.device)
        if state is not None:  # columns that hold no token of the row
            key, value = (x.masked_fill((columns >= call.end())[..., None, None], 0) for x in (key, value))
        groups = query.shape[2] // key.shape[2]
        query, key, value = (x.transpose(1, 2) for x in (query, key.to(u.dtype), value.to(u.dtype)))
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        if state is None:
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale)
        else:
            parts = []
            for start in range(0, call.seq_len, 1024):  # bounds the mask: linear in the length
                visible = columns <= call.positions[:, None, start : start + 1024, None]
                part = query[:, :, start : start + 1024]
                parts.append(F.scaled_dot_product_attention(part, key, value, attn_mask=visible, scale=self.scale))
            mixed = torch.cat(parts, 2)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2)), state, {}

    def _append(self, buffer, new, call: Call):
        """Write the call's tokens at their positions, in a buffer that grows by the call's columns unless it is fixed."""
        seq_len = new.shape[1]
        if not call.fixed_columns:
            buffer = torch.cat([buffer.to(new.dtype), torch.zeros_like(new)], 1)
        index = call.positions.expand(new.shape[0], seq_len)
        if (
            call.lengths is not None
        ):  # behind a row's last token: put back what is there, at a place nothing else takes
            index = torch.where(
                call.real(), index, torch.arange(seq_len, device=new.device) - seq_len + buffer.shape[1]
            )
            new = torch.where(call.real()[..., None, None], new, take_rows(buffer, index))
        index = index.view(*index.shape, 1, 1).expand_as(new)
        return buffer.scatter(1, index, new)


class BMojoWindowAttention(BMojoAttention):
    """Attention over the last w tokens: `sliding_attention`, and the frame in which `bmojo` adds its other memories.

    Calls of any length go through `memory_attention`, linear in the length; a single token with a cache attends to the
    cache as it lies.
    """

    layer_type = "sliding_attention"

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.window = config.sliding_window
        self.slots = memory_slots(config, self.layer_type)

    def in_cache(self, state, name: str, span: str):
        """The slots of one memory in the state's "key" or "value", (rows, slots, kv heads, head_dim)."""
        return state[name][:, :, self.slots[span]].transpose(1, 2)

    def with_past(self, tokens, span: str, call: Call, state, base, reach: int, length: int):
        """Keys and values for the `reach` positions before base and the `length` from there; without past the call's own."""
        if call.past is None:
            return tokens
        rings = (self.in_cache(state, name, span) for name in ("key", "value"))
        return tuple(
            timeline(new, ring, call, base - reach, reach + length) for new, ring in zip(tokens, rings, strict=True)
        )

    def into_cache(self, state, spans: dict, call: Call, *eidetic):
        """Keys and values of the state after the call.

        Args:
            state: before the call.
            spans: for each ring the keys and values of the call, (rows, seq_len, kv heads, head_dim).
            call: the call.
            eidetic: keys and values of the eidetic memory after it, (rows, eidetic_size, kv heads, head_dim).
        """
        new = {}
        for place, name in enumerate(("key", "value")):
            parts = [
                write_ring(self.in_cache(state, name, span), tokens[place], call) for span, tokens in spans.items()
            ]
            parts += [memory.to(state[name].dtype) for memory in eidetic[place : place + 1]]
            new[name] = torch.cat([part.transpose(1, 2) for part in parts], 2)
        return new

    def put(self, state, call: Call, key, value):
        """Write one token of each ring, (rows, rings, kv heads, head_dim), into the state's keys and values."""
        index = call.step.index[self.layer_type].expand(-1, key.shape[2], -1, key.shape[3])
        tokens = {"key": key, "value": value}
        return {name: call.put(state[name], 2, index, token.transpose(1, 2)) for name, token in tokens.items()}

    def attend_to_cache(self, state, call: Call, query, eidetic_query=None, fading_query=None):
        """The mix of values for one query of each row, (rows, 1, heads, head_dim); queries are scaled already."""
        rows, _, heads, head_dim = query.shape
        key, value, mask = state["key"], state["value"], call.step.mask[self.layer_type]
        if key.dtype is not query.dtype:
            key, value = key.to(query.dtype), value.to(query.dtype)
        key, value, shape = key.flatten(0, 1), value.flatten(0, 1), (-1, heads // key.shape[1], head_dim)
        if eidetic_query is None and fading_query is None:
            scores = torch.bmm(query.reshape(shape), key.transpose(1, 2))
        else:  # a product of few queries with many keys for each: cheaper than one of all queries
            parts, near = [], key
            if eidetic_query is not None:
                memory = self.slots["eidetic"]
                eidetic_key = key[:, memory]
                if self.ranked:
                    eidetic_key = self.in_cache(state, "key", "eidetic").to(query.dtype)
                    eidetic_key = self.eidetic_key(eidetic_key, call).transpose(1, 2).flatten(0, 1)
                near = key[:, : memory.start]
                parts = [torch.bmm(eidetic_query.reshape(shape), eidetic_key.transpose(1, 2))]
            if fading_query is not None:
                fading = self.slots["fading"]
                near = key[:, : fading.start]
                parts.insert(0, torch.bmm(fading_query.reshape(shape), key[:, fading].transpose(1, 2)))
            scores = torch.cat([torch.bmm(query.reshape(shape), near.transpose(1, 2)), *parts], -1)
        weights = (scores + mask).softmax(-1)
        weights = weights if weights.dtype is value.dtype else weights.to(value.dtype)
        return torch.bmm(weights, value).view(rows, 1, heads, head_dim)

    def forward(self, u, call: Call, state=None):
        """From (rows, seq_len, hidden_size) to the same, the new state (None without cache) and nothing to show."""
        query, key, value, kept = self.project(u, call, state)
        if call.step is not None:
            state = self.put(state, call, key, value) | kept
            mixed = self.attend_to_cache(state, call, query * self.scale)
        else:
            past = 0 if call.past is None else call.past[:, None]
            window = self.with_past((key, value), "window", call, state, past, self.window - 1, call.seq_len)
            mixed = memory_attention(  # without a memory, chunks only say how queries may be cut
                query, *window, past=call.past, window=self.window, chunk_size=64, scale=self.scale
            )
            state = None if state is None else self.into_cache(state, {"window": (key, value)}, call) | kept
        return self.o_proj(mixed.flatten(-2)), state, {}


class BMojoMixer(BMojoWindowAttention):
    """The B'MOJO layer: one softmax over the window, the fading tokens behind it and the eidetic memory.

    Source: arXiv 2407.06324; the choices that the paper leaves open are those of the configuration's docstring.
    """

    layer_type = "bmojo"

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.memory, self.chunk = config.eidetic_size, config.eidetic_chunk_size
        self.fades, self.tied = config.fading_span, config.tie_attn_weights
        self.ranked = config.eidetic_position == "rank"
        self.fading = SSM_CLASSES[config.ssm_type](config)
        if config.fading_span and not config.tie_attn_weights:
            kv_size = config.num_key_value_heads * config.head_dim
            self.fading_k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
            self.fading_v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.asks_twice = config.fading_query
        if config.fading_query:
            size = config.num_attention_heads * config.head_dim
            self.fading_q_proj = nn.Linear(config.hidden_size, size, bias=config.attention_bias)
            norm = partial(BMojoRMSNorm, config.head_dim, config.rms_norm_eps) if config.use_qk_norm else nn.Identity
            self.fading_q_norm, self.fading_k_norm = norm(), norm()
        if self.memory and config.innovation_predictor == "learnable":
            self.predictor = BMojoPredictor(config)

    def forward(self, u, call: Call, state=None):
        """From (rows, seq_len, hidden_size) to the same, the new state (which the layer drops without cache), and its memory.

        The last is a dict: "innovation" (rows, seq_len), "positions" (rows, chunks, eidetic_size), "loss" of a learnable
        predictor; empty without eidetic memory.
        """
        y, new, _ = self.fading(u, call, state)
        memory = {}
        if self.memory:
            memory = self.innovation(y, call, state)
            if state is not None and "history" in state:
                new["history"] = last_rows(state["history"], y, call.lengths)
        attend = self.attend if call.step is None else self.attend_single
        mixed, kept, positions = attend(u, y, memory.get("innovation"), call, state)
        if positions is not None:
            memory["positions"] = positions
        return self.o_proj(mixed.flatten(-2)), new | kept, memory

    # -- innovation ----------------------------------------------------------------------------------------------------

    def innovation(self, y, call: Call, state) -> dict[str, torch.Tensor]:
        """As `full_innovation`, with few operations for the usual single token."""
        if call.step is None or torch.is_grad_enabled() or "history" not in state or hasattr(self, "predictor"):
            return self.full_innovation(y, call, state)
        expected = torch.bmm(call.step.predictor, widen(state["history"]))
        error = torch.linalg.vector_norm(widen(y) - expected, dim=-1).square_().nan_to_num_(-1, torch.inf)
        return {"innovation": error if call.lengths is None else error.masked_fill(~call.real(), -torch.inf)}

    @torch.no_grad()
    def full_innovation(self, y, call: Call, state) -> dict[str, torch.Tensor]:
        """How badly each output was predicted, (rows, seq_len) in float32 or wider; -inf where there is no token."""
        choice, dtype = self.config.innovation_predictor, at_least_float32(y)
        found = {}
        if choice in LEARNED_CHOICES:
            kernel = self.config.innovation_kernel
            history = y.new_zeros(y.shape[0], kernel, y.shape[2]) if state is None else state["history"]
            if choice == "learnable":
                with torch.enable_grad() if self.training else torch.no_grad():
                    error = (y.detach().to(dtype) - self.predictor(y.detach(), history, call.positions)).pow(2).sum(-1)
                    real = torch.ones_like(error, dtype=torch.bool) if call.real() is None else call.real()
                    found["loss"] = error.masked_fill(~real, 0).sum() / real.sum().clamp(min=1)
                error = error.detach()
            else:
                weights = predictor_weights(self.config, dtype, y.device)
                error = prediction_error(y, history, call.positions, weights)
            error = error.nan_to_num(nan=-1, posinf=torch.inf)  # NaN: below every error, above "no token"
        else:
            scores = {
                "random": partial(hash_scores, salt=self.layer_idx),
                "recent": torch.clone,
                "oldest": torch.zeros_like,
            }
            error = scores[choice](call.positions).to(dtype).expand(y.shape[:2])
        real = call.real()
        found["innovation"] = error if real is None else error.masked_fill(~real, -torch.inf)
        return found

    # -- one token -----------------------------------------------------------------------------------------------------

    def attend_single(self, u, y, innovation, call: Call, state):
        """The mix for one token of each row, what of the state attention keeps, and the memory of the token's chunk."""
        step = call.step
        query = self.query_heads(self.q_proj(u))
        if self.fades and self.tied:  # one product for both
            both = torch.cat([u, y], 1)
            key, value = self.k_proj(both), self.v_proj(both)
        else:
            key, value = self.k_proj(u), self.v_proj(u)
            if self.fades:
                key = torch.cat([key, self.fading_k_proj(y)], 1)
                value = torch.cat([value, self.fading_v_proj(y)], 1)
        if self.asks_twice:
            key = torch.cat([self.key_heads(key[:, :1]), self.key_heads(key[:, 1:], self.fading_k_norm)], 1)
        else:
            key = self.key_heads(key)
        value = self.heads(value)
        heads, rings = query.shape[2], key.shape[1]
        queries = [query, query] if self.memory else [query]
        if self.asks_twice:
            queries.append(self.query_heads(self.fading_q_proj(u), self.fading_q_norm))
        turned = rotate.definition(
            torch.cat([*queries, key.reshape(len(key), 1, -1, key.shape[3])], 2), step.cos, step.sin
        )
        kept = self.put(state, call, turned[:, 0, len(queries) * heads :].unflatten(1, (rings, -1)), value)
        positions = eidetic_query = fading_query = None
        if self.asks_twice:
            fading_query = turned[:, :, (len(queries) - 1) * heads : len(queries) * heads]
        if self.memory:
            slot = step.index["bmojo"][:, 0, :1, 0]
            kept["window_innovation"] = call.put(state["window_innovation"], 1, slot, innovation)
            kept |= {name: state[name] for name in ("eidetic_innovation", "eidetic_position")}
            if step.boundary is not None:
                kept = self.cross_boundary(kept, call)
            positions = kept["eidetic_position"][:, None]
            eidetic_query = turned[:, :, heads : 2 * heads]
        mixed = self.attend_to_cache(kept, call, turned[:, :, :heads], eidetic_query, fading_query)
        return mixed, kept, positions

    def cross_boundary(self, state, call: Call):
        """The state after a chunk boundary: the c tokens that the boundary lets in, merged for the rows at one."""
        positions = call.past_column - self.window - self.chunk + 1 + torch.arange(self.chunk, device=call.past.device)
        slots = positions % state["window_innovation"].shape[1]
        key, value = (take_rows(self.in_cache(state, name, "window"), slots) for name in ("key", "value"))
        scores = state["window_innovation"].gather(1, slots)
        scores = scores.masked_fill(~(call.step.boundary & (positions >= 0)), -torch.inf)
        scores = torch.cat([state["eidetic_innovation"], scores], 1)
        index = select(scores, self.memory)
        entering = {"key": rotate(key, *call.table(positions.clamp(min=0), inverse=True)), "value": value}
        new = state | {
            "eidetic_innovation": scores.gather(1, index),
            "eidetic_position": torch.cat([state["eidetic_position"], positions], 1).gather(1, index),
        }
        for name, tokens in entering.items():
            tokens = take_rows(torch.cat([self.in_cache(state, name, "eidetic"), tokens], 1), index).transpose(1, 2)
            if call.may_overwrite(state[name]):
                state[name][:, :, self.slots["eidetic"]] = tokens
            else:
                new[name] = torch.cat([state[name][:, :, : self.slots["eidetic"].start], tokens], 2)
        return new

    # -- many tokens ---------------------------------------------------------------------------------------------------

    def attend(self, u, y, innovation, call: Call, state):
        """The mix for all tokens, what of the state attention keeps ({} without cache), and the memories of all chunks."""
        query, key = self.query_heads(self.q_proj(u)), self.key_heads(self.k_proj(u))
        spans = {"window": (rotate(key, call.cos, call.sin), self.heads(self.v_proj(u)))}
        if self.fades:
            spans["fading"] = self.fading_tokens(y, call)
        base = 0 if call.past is None else call.past[:, None] - call.phase
        length = call.seq_len + call.lead
        window = self.with_past(spans["window"], "window", call, state, base, self.window - 1, length)
        fading, fading_query = (None, None), None
        if self.asks_twice:
            fading_query = self.query_heads(self.fading_q_proj(u), self.fading_q_norm)
            fading_query = call.align(rotate(fading_query, call.cos, call.sin))
        if self.fades:
            fading = self.with_past(spans["fading"], "fading", call, state, base, 2 * self.window - 1, length)
        eidetic, kept, positions = [None] * 4, {}, None
        if self.memory:
            entries = self.entries(key, spans["window"][1], innovation, call, state, base, length)
            memory, after = self.memories(entries, call, base, length)
            if state is not None:
                kept = {f"eidetic_{name}": take_rows(entries[name], after) for name in entries}
                kept["window_innovation"] = write_ring(state["window_innovation"], innovation, call)
            positions = self.seen(entries["position"], memory, call, base)
            turned = rotate(query, *call.table(torch.full((1, 1), 2 * self.window, device=query.device)))
            eidetic = [call.align(turned), *self.eidetic_entries(entries, memory, call)]
        mixed = memory_attention(
            *(call.align(rotate(query, call.cos, call.sin)), *window, *fading, *eidetic),
            past=None if call.past is None else base[:, 0],
            fading_query=fading_query,
            window=self.window,
            chunk_size=self.chunk,
            scale=self.scale,
        )
        if state is not None:
            memory = [kept.pop(f"eidetic_{name}") for name in ("key", "value")] if self.memory else []
            kept |= self.into_cache(state, spans, call, *memory)
        return call.unalign(mixed), kept, positions

    def fading_tokens(self, y, call: Call):
        """Keys (rotated) and values of the SSM's outputs."""
        tied = self.tied
        key = (self.k_proj if tied else self.fading_k_proj)(y)
        value = (self.v_proj if tied else self.fading_v_proj)(y)
        norm = self.fading_k_norm if self.asks_twice else self.k_norm
        return rotate(self.key_heads(key, norm), call.cos, call.sin), self.heads(value)

    def eidetic_key(self, key, call: Call):
        """Keys of a memory (..., eidetic_size, kv heads, head_dim), turned back by their rank where that counts."""
        if not self.ranked:
            return key if call.scaling == 1 else rotate(key, *call.table(torch.zeros(1, 1, device=key.device)))
        ranks = torch.arange(self.memory, 0, -1, device=key.device)  # the last place holds the newest: rank 1
        return rotate(key, *call.table(-ranks))

    def entries(self, key, value, innovation, call: Call, state, base, length: int):
        """Everything that can be in a memory of the call, in the order of time, with keys that are not rotated.

        The memory before the call, then its tokens, with a past from the first on that may enter.

        Returns:
            "key", "value" (rows, entries, kv heads, head_dim), "innovation" and "position" (rows, entries); the
            latter -inf and -1 where there is nothing, or nothing that may enter.
        """
        rows, tokens = key.shape[0], {"key": key, "value": value, "innovation": innovation}
        if call.past is None:
            positions = call.positions.expand(rows, -1)
            before = {
                "innovation": innovation.new_full((rows, self.memory), -torch.inf),
                "position": positions.new_full((rows, self.memory), -1),
            }
            before |= {name: tokens[name].new_zeros(rows, self.memory, *key.shape[2:]) for name in ("key", "value")}
        else:
            ring = {name: self.in_cache(state, name, "window") for name in ("key", "value")}
            held = ring_positions(ring["key"], call.past_column - 1).clamp(min=0)
            ring["key"] = rotate(ring["key"].to(key.dtype), *call.table(held, inverse=True))
            ring["innovation"] = state["window_innovation"]
            start, slots = base - self.window - self.chunk + 1, -(-length // self.chunk) * self.chunk
            tokens = {name: timeline(token, ring[name], call, start, slots) for name, token in tokens.items()}
            slots = torch.arange(slots, device=key.device)
            positions = start + slots
            exists = (positions >= 0) & (positions < call.end())
            exists &= (call.phase == 0) | (slots >= self.chunk)  # in the middle of a chunk, these came before
            positions = positions.masked_fill(~exists, -1)
            tokens["innovation"] = tokens["innovation"].masked_fill(~exists, -torch.inf)
            before = {name: self.in_cache(state, name, "eidetic") for name in ("key", "value")}
            before |= {name: state[f"eidetic_{name}"] for name in ("innovation", "position")}
        tokens["position"] = positions
        return {name: torch.cat([before[name].to(token.dtype), token], 1) for name, token in tokens.items()}

    @torch.no_grad()
    def memories(self, entries, call: Call, base, length: int):
        """Which entries the queries of each chunk see, (rows, chunks, eidetic_size), -1 for none; and those after the call."""
        scores, size = entries["innovation"], self.memory
        kept = torch.arange(-size, 0, device=scores.device).expand(len(scores), size)
        first = 0 if call.past is not None else 1 - self.window - self.chunk
        chunks = -(-length // self.chunk)
        found = size + running_selection(scores[:, size:], scores[:, :size], kept, first, self.chunk, chunks)
        last = torch.div(call.end() - 1 - base, self.chunk, rounding_mode="floor") + 1  # 0: the memory before the call
        after = found.gather(1, last[..., None].expand(len(scores), 1, size))[:, 0]
        exists = entries["position"].gather(1, found[:, 1:].flatten(1)).view_as(found[:, 1:]) >= 0
        return found[:, 1:].masked_fill(~exists, -1), after

    def eidetic_entries(self, entries, memory, call: Call):
        """Keys, values and the memories' places in them, as attention wants them."""
        if not self.ranked:
            return self.eidetic_key(entries["key"], call), entries["value"], memory
        chosen = (take_rows(entries[name], memory.flatten(1).clamp(min=0)) for name in ("key", "value"))
        key, value = (x.unflatten(1, memory.shape[1:]) for x in chosen)  # a key turns with its rank, memory by memory
        places = torch.arange(memory[0].numel(), device=memory.device).view(memory.shape[1:])
        return self.eidetic_key(key, call).flatten(1, 2), value.flatten(1, 2), places.where(memory >= 0, -1)

    def seen(self, positions, memory, call: Call, base):
        """Positions (rows, chunks, eidetic_size) of the memories, without those of chunks that no token of a row is in."""
        found = positions.gather(1, memory.flatten(1).clamp(min=0)).view_as(memory).masked_fill(memory < 0, -1)
        used = -(-(call.end() - base) // self.chunk)
        found = found.masked_fill((torch.arange(memory.shape[1], device=memory.device) >= used)[..., None], -1)
        return found[:, : max(1, int(used.max()))] if not torch.compiler.is_compiling() else found


class BMojoPredictor(nn.Module):
    """The learnable causal predictor of the SSM's outputs: weight (innovation_kernel, hidden_size), row k - 1 for y_{t-k}."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(
            torch.full((config.innovation_kernel, config.hidden_size), 1 / config.innovation_kernel)
        )

    def forward(self, y, history, positions):
        return predict(y, history, positions, self.weight)


class BMojoHybridMixer(BMojoAttention):
    """Full attention and an SSM side by side: both read the input, and their outputs are added, as in Falcon-H1."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.ssm = SSM_CLASSES[config.ssm_type](config)
        self.multipliers = [getattr(config, f"{part}_multiplier") for part in ("ssm_in", "attention_in")]
        self.multipliers += [getattr(config, f"{part}_multiplier") for part in ("ssm_out", "attention_out")]

    def forward(self, u, call: Call, state=None):
        """From (rows, seq_len, hidden_size) to the same, the new state (None without cache) and nothing to show."""
        ssm_in, attention_in, ssm_out, attention_out = self.multipliers
        y, kept, _ = self.ssm(u * ssm_in, call, state)
        mixed, new, _ = super().forward(u * attention_in, call, state)
        return y * ssm_out + mixed * attention_out, (None if state is None else kept | new), {}


MIXER_CLASSES = {
    "bmojo": BMojoMixer,
    "sliding_attention": BMojoWindowAttention,
    "full_attention": BMojoAttention,
    "hybrid": BMojoHybridMixer,
}


# ----------------------------------------------------------------------------------------------------------------------
# The models
# ----------------------------------------------------------------------------------------------------------------------


class BMojoDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx: int):
        super().__init__()
        layer_type = config.layers_block_type[layer_idx]
        self.input_layernorm = block_norm(config)
        if layer_type in SSM_CLASSES:
            self.mixer = SSM_CLASSES[layer_type](config)
        else:
            self.mixer = MIXER_CLASSES[layer_type](config, layer_idx)
        self.mlp = None
        if config.intermediate_size is not None:
            self.post_attention_layernorm = block_norm(config)
            self.mlp = BMojoMLP(config)
        self.residual_in_fp32 = config.residual_in_fp32

    def mixer_input(self, hidden_states):
        """The normed residual stream, in the dtype of the weights."""
        normed = self.input_layernorm(hidden_states)
        return normed.to(self.input_layernorm.weight.dtype) if self.residual_in_fp32 else normed

    def forward(self, hidden_states, call: Call | PackedCall, state=None):
        """Returns the hidden states, the new state (None without cache), and what a bmojo mixer remembered."""
        normed = self.mixer_input(hidden_states)
        if isinstance(call, PackedCall):
            mixed, memory = call.mix(self.mixer, normed)
            new_state = None
        else:
            mixed, new_state, memory = self.mixer(normed, call, state)
        hidden_states = hidden_states + mixed
        if self.mlp is not None:
            normed = self.post_attention_layernorm(hidden_states)
            if self.residual_in_fp32:
                normed = normed.to(self.post_attention_layernorm.weight.dtype)
            hidden_states = hidden_states + self.mlp(normed)
        return hidden_states, (None if state is None else new_state), memory


class BMojoPreTrainedModel(PreTrainedModel):
    config: BMojoConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BMojoDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True  # of the two names that transformers sets by itself; the layers choose their own formulation
    _is_stateful = False  # the cache rolls back exactly: see BMojoCache.crop
    _can_compile_fullgraph = True

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        attach(config)

    @torch.no_grad()
    def _init_weights(self, module):
        """Transformers calls this for modules with parameters of their own only: every clause is about such a module."""
        std = self.config.initializer_range
        if isinstance(module, BMojoTimeStepProjection):
            init.uniform_(module.weight, -(module.in_features**-0.5), module.in_features**-0.5)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, mean=0.0, std=std)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv1d):
            bound = module.kernel_size[0] ** -0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (BMojoDynamics, BMojoDecay, BMojoHeadExpansion)):
            module.initialise()
        elif isinstance(module, BMojoRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, BMojoLayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, BMojoPredictor):
            init.constant_(module.weight, 1 / module.weight.shape[0])

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers; also writes the whole auto_map and the kernels folder, so that the folder loads alone."""
        auto_map = getattr(self.config, "auto_map", None) or {}
        if not any("--" in name for name in auto_map.values()):  # code in another repository stays there
            self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.is_remote_code() and kwargs.get("is_main_process", True):
            copy_kernels(self.config, save_directory)


class BMojoModel(BMojoPreTrainedModel):
    """The stack of layers, from token ids to normalised hidden states."""

    prefill_piece = 2048  # tokens: on a CPU 32768 take no longer than in one piece, and two fifths of the memory

    def __init__(self, config: BMojoConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([BMojoDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = block_norm(config)
        self.gradient_checkpointing = False
        self.embedding_multiplier, self.residual_in_fp32 = config.embedding_multiplier, config.residual_in_fp32
        self.plan, self.chunk = step_plan(config), config.eidetic_chunk_size
        self.layer_types = list(config.layers_block_type)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: BMojoCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_eidetic: bool | None = None,
        seq_idx: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> BMojoModelOutput | tuple:
        """Run the layers.

        Args:
            input_ids: (batch, seq_len), or inputs_embeds: (batch, seq_len, hidden_size); one of them.
            attention_mask: (batch, seq_len) or (batch, past + seq_len), 1 for tokens, 0 for padding on any side.
            position_ids: (batch or 1, seq_len). Only where they restart counts: a new packed document begins there.
                Positions themselves are counted from the tokens.
            past_key_values: a `BMojoCache`; made here where None and use_cache.
            output_eidetic: also return innovations and eidetic positions: see `BMojoModelOutput`.
            seq_idx, cu_seq_lens_q: other ways to say where packed documents begin: (batch, seq_len) document numbers;
                (documents + 1,) offsets into a batch of one row.

        Raises:
            ValueError: an input is malformed, contradicts another, or asks for what the model has not.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        _check_arguments(self.config, output_attentions, cu_seq_lens_q, cu_seq_lens_k, kwargs)
        inputs_embeds = self.embed(input_ids, inputs_embeds)
        if self.residual_in_fp32:
            inputs_embeds = widen(inputs_embeds)
        asked_for_cache, use_cache = use_cache, self._use_cache(use_cache, past_key_values)
        cache = past_key_values
        seen, past = 0, None
        if cache is not None:
            _check_cache(cache, self.config)
            seen, past = cache.seen_tokens, cache.begin(inputs_embeds)
        tokens = read_mask(attention_mask, *inputs_embeds.shape[:2], seen, past if seen else None)
        layout = read_layout(tokens, inputs_embeds, position_ids, seq_idx, cu_seq_lens_q, has_past=seen > 0)
        packed = isinstance(layout, PackedLayout)
        if packed and (cache is not None or asked_for_cache):
            raise ValueError(
                "Packed documents can't be read into a cache: pass past_key_values=None, use_cache=False."
            )
        if cache is None and use_cache and not packed:
            cache = BMojoCache(self.config)

        if packed:
            rows = layout.from_rows(inputs_embeds)  # whatever padding holds ends here
            call = PackedCall.of(layout, lambda group: self._call(rows, *group.index.shape[1:], group.lengths))
            hidden_states, all_hidden_states, memories, *_ = self._run_layers(rows, call, None, output_hidden_states)
        else:
            rows = inputs_embeds if layout is None else layout.to_rows(inputs_embeds)
            whole = bool(output_hidden_states or output_eidetic)
            hidden_states, all_hidden_states, memories = self._read(rows, layout, tokens, cache, whole)

        back = (lambda x: x) if layout is None else layout.from_rows
        last_hidden_state = back(self.norm(hidden_states))
        if self.residual_in_fp32:
            last_hidden_state = last_hidden_state.to(self.norm.weight.dtype)
        losses = [memory["loss"] for memory in memories if "loss" in memory]
        output = BMojoModelOutput(
            last_hidden_state=last_hidden_state,
            past_key_values=cache if use_cache else None,
            hidden_states=(*map(back, all_hidden_states), last_hidden_state) if output_hidden_states else None,
            predictor_loss=torch.stack(losses).sum() if losses and self.training else None,
        )
        if output_eidetic:
            found = [memory.get("innovation") for memory in memories]
            output.innovations = tuple(None if innovation is None else back(innovation) for innovation in found)
            output.eidetic_positions = tuple(memory.get("positions") for memory in memories)
        return output if return_dict in (None, True) else output.to_tuple()

    def embed(self, input_ids, inputs_embeds):
        """Embeddings of the ids, or the embeddings given; checks both."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is not None:
            if inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != self.config.hidden_size:
                raise ValueError(
                    f"inputs_embeds has shape {tuple(inputs_embeds.shape)}; expected (batch, seq_len, "
                    f"{self.config.hidden_size})."
                )
            return inputs_embeds
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; expected (batch, seq_len).")
        if not torch.compiler.is_compiling() and input_ids.numel() and input_ids.device.type != "meta":
            low, high = (int(bound) for bound in input_ids.aminmax())
            size = self.embed_tokens.num_embeddings
            if low < 0 or high >= size:
                raise ValueError(
                    f"input_ids run from {low} to {high}; the vocabulary has ids 0 to {size - 1}. Is the tokenizer the model's?"
                )
        embeds = self.embed_tokens(input_ids)
        return embeds if self.embedding_multiplier == 1 else embeds * self.embedding_multiplier

    def _use_cache(self, use_cache, past_key_values) -> bool:
        if use_cache is None:
            use_cache = past_key_values is not None or (self.config.use_cache and not self.training)
        if use_cache and self.gradient_checkpointing and self.training:
            logger.warning_once("use_cache=True does not go with gradient checkpointing: no cache is returned.")
            return False
        return use_cache

    def _read(self, rows, layout, tokens, cache, whole: bool):
        """Run the layers on rows (rows, seq_len, hidden_size) and store what the cache needs.

        A long text that goes into a cache without gradients is read in pieces, which bounds memory and is as exact as
        any other split of a sequence, unless `whole` says that the outputs of the layers are wanted for all of it.

        Returns:
            The last hidden states, the inputs of all layers and what they remembered (of the last piece).
        """
        plain = cache is None or cache.is_recording_past() or torch.is_grad_enabled() or torch.compiler.is_compiling()
        size = rows.shape[1] if plain or whole else self.prefill_piece
        pieces = rows.split(max(1, size), 1)
        parts, start = [], 0
        for piece in pieces:
            lengths = None if layout is None else (layout.lengths - start).clamp(min=0, max=piece.shape[1])
            past = None if cache is None else cache.begin(piece)
            call = self._call(piece, piece.shape[1], lengths, cache, past)
            hidden_states, kept, memories, states, replays = self._run_layers(piece, call, cache, whole)
            if cache is not None:
                read = tokens if len(pieces) == 1 else call.real()  # in pieces: places in the row, which count alike
                cache.store(states, piece.shape[1], read, replays)
            parts.append(hidden_states)
            start += piece.shape[1]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1), kept, memories

    def _call(self, like, seq_len: int, lengths=None, cache=None, past=None) -> Call:
        """What the layers share.

        Args:
            like: activations, for their dtype and device.
            seq_len: columns of the rows.
            lengths: real tokens of every row; None: all are.
            cache: a BMojoCache, or None.
            past: the rows' lengths in the cache, None without.
        """
        dtype = at_least_float32(like)
        inv_freq, scaling = rotary_frequencies(self.config)
        head_dim = self.plan.head_dim

        def table(positions, inverse=False):
            cos, sin = rotary_table(positions, inv_freq, 1 / scaling if inverse else scaling, dtype)
            if cos.shape[-1] < head_dim:
                cos = F.pad(cos, (0, head_dim - cos.shape[-1]), value=1.0)
            return (cos, -sin) if inverse else (cos, sin)

        positions = torch.arange(seq_len, device=like.device)[None]
        if cache is not None and cache.seen_tokens == 0 and seq_len > 1:
            past = None  # every row begins here: no ring is read
        phase, lead = None, 0
        if past is not None:
            positions = positions + past[:, None]
            phase, lead = past[:, None] % self.chunk, self.chunk - 1
            if cache.even:
                lead = cache.seen_tokens % self.chunk
            elif not torch.compiler.is_compiling() and like.device.type == "cpu":
                lead = int(phase.max())
        in_place = cache is not None and not cache.is_recording_past() and not torch.is_grad_enabled()
        fixed_columns = cache is not None and cache.max_cache_len is not None
        any_mode = torch.compiler.is_compiling() or torch.is_inference_mode_enabled()
        cos, sin = table(positions)
        call = Call(
            *(past, lengths, positions, table, cos, sin, scaling, in_place, any_mode, fixed_columns, phase, lead),
            step=None,
        )
        if past is not None and seq_len == 1:
            boundary = phase == 0
            if lengths is not None:  # a row without a new token stays before its boundary
                boundary = boundary & (lengths[:, None] > 0)
            if not torch.compiler.is_compiling() and (cache.even or like.device.type == "cpu"):
                begins = lead == 0 if cache.even else bool(boundary.any())
                boundary = boundary if begins else None
            call.step = self._step(call, like, cache)
            call.step.boundary = boundary
        return call

    def _step(self, call: Call, like, cache) -> Step:
        """The step of a single token; those of a whole chunk are worked out together where all rows are as far."""
        rows, seen = len(call.past), cache.seen_tokens
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not cache.even:
            step = make_step(self.plan, call.past, like, call.table, call.scaling)
            for name, mask in step.mask.items():
                step.mask[name] = mask.repeat_interleave(self.plan.num_key_value_heads, 0)
            return step
        start = seen - seen % self.chunk
        which = start, like.dtype, like.device, torch.is_inference_mode_enabled()
        if cache.steps[0] != which:
            past = torch.arange(start, start + self.chunk, device=like.device)
            cache.steps = which, make_step(self.plan, past, like, call.table, call.scaling)
        return cache.steps[1].row(seen - start, rows)

    def _run_layers(self, hidden_states, call: Call, cache, keep_hidden: bool):
        """Hidden states, the inputs of all layers if kept, what they remembered, their states, and how to replay them."""
        if not hidden_states.numel():  # no token: no layer runs, no state changes
            states = None if cache is None else [layer.state for layer in cache.layers]
            return hidden_states, [hidden_states] * len(self.layers), [{}] * len(self.layers), states, None
        kept, memories, states, replays = [], [], [], []
        for layer_idx, layer in enumerate(self.layers):
            if keep_hidden:
                kept.append(hidden_states)
            state = None
            if cache is not None:
                like = hidden_states  # what the mixer's input is like
                if self.residual_in_fp32 and like.dtype is not layer.input_layernorm.weight.dtype:
                    like = like[:, :0].to(layer.input_layernorm.weight.dtype)
                state = cache.layer_state(layer_idx, self.layer_types[layer_idx], like)
                if cache.is_recording_past():
                    replays.append(partial(_replay, layer, hidden_states.detach(), call, state))
            hidden_states, state, memory = layer(hidden_states, call, state)
            states.append(state)
            memories.append(memory)
        return hidden_states, kept, memories, states, replays or None


@torch.no_grad()
def _replay(layer, hidden_states, call: Call, state, lengths):
    """The state of a layer after only the first `lengths` tokens of a call."""
    shorter = replace(call, lengths=lengths.to(hidden_states.device), in_place=False)
    return layer.mixer(layer.mixer_input(hidden_states), shorter, state)[1]


def _check_cache(cache, config):
    if not hasattr(cache, "layer_state"):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}; B'MOJO keeps more than keys and values and needs its own "
            "BMojoCache(model.config), or None. (PEFT prefix tuning passes such a cache: use prompt tuning.)"
        )
    cache.check_model(config)


def _check_arguments(config, output_attentions, cu_seq_lens_q, cu_seq_lens_k, kwargs):
    """Refuse what would otherwise be ignored."""
    if output_attentions or (output_attentions is None and config.output_attentions):
        raise ValueError(
            "output_attentions is not supported: a query's keys differ from layer to layer and are no positions of the input. "
            "output_eidetic=True returns what every layer remembers."
        )
    if (cu_seq_lens_q is None) != (cu_seq_lens_k is None) and cu_seq_lens_q is None:
        raise ValueError("cu_seq_lens_k was passed without cu_seq_lens_q; pass cu_seq_lens_q.")
    if cu_seq_lens_k is not None and not torch.equal(cu_seq_lens_q, cu_seq_lens_k):
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k differ; queries and keys of B'MOJO are the same documents.")
    known = {"max_length_q", "max_length_k", "num_items_in_batch"}  # hints to kernels, and to the loss
    unknown = sorted(name for name, value in kwargs.items() if name not in known and value is not None)
    if unknown:
        raise ValueError(
            f"B'MOJO's forward does not know {', '.join(unknown)}; remove it, or use one of its documented arguments."
        )


@functools.lru_cache(maxsize=8)
def _default_frequencies(theta: float, rotary_dim: int) -> torch.Tensor:
    with torch.inference_mode(False):  # where a first call may be, and a later one not
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device="cpu") / rotary_dim
        return torch.tensor(theta, dtype=torch.float64, device="cpu") ** -exponents


def rotary_frequencies(config) -> tuple[torch.Tensor, float]:
    """inv_freq (rotary_dim / 2,) and the factor on cos and sin, from the config at use: no buffer that a cast could round."""
    parameters, rotary_dim = config.rope_parameters, config.rotary_dim
    if parameters["rope_type"] == "default" or not rotary_dim:
        return _default_frequencies(float(parameters["rope_theta"]), rotary_dim), 1.0
    return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"))


class BMojoForCausalLM(BMojoPreTrainedModel, GenerationMixin):
    """B'MOJO with a language-modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: BMojoConfig):
        super().__init__(config)
        self.model = BMojoModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head_multiplier = config.lm_head_multiplier
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: BMojoCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_eidetic: bool | None = None,
        seq_idx: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        **kwargs,
    ) -> BMojoCausalLMOutput | tuple:
        """Logits, and the loss where labels are given.

        Args:
            labels: (batch, seq_len), shifted inside; -100 is ignored. So are padding and the first token of every row or
                packed document, which nothing of its own predicts. logits_to_keep must then be 0.
            logits_to_keep: only the last so many logits, or those at these indices; 0 keeps all.
            kwargs: for the loss (`num_items_in_batch`, `shift_labels`).

        The other arguments and the errors are those of `BMojoModel.forward`.
        """
        loss_kwargs = {name: kwargs.pop(name) for name in ("num_items_in_batch", "shift_labels") if name in kwargs}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_eidetic=output_eidetic,
            seq_idx=seq_idx,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, keep])
        if self.lm_head_multiplier != 1:
            logits = logits * self.lm_head_multiplier

        loss = None
        if labels is not None:
            if logits.shape[1] != labels.shape[1]:
                raise ValueError(
                    f"labels have {labels.shape[1]} columns, logits_to_keep leaves {logits.shape[1]} logits: leave it 0."
                )
            tokens = read_mask(attention_mask, *hidden_states.shape[:2], _seen_before(attention_mask, hidden_states))
            layout = read_layout(tokens, hidden_states, position_ids, seq_idx, cu_seq_lens_q)
            if layout is not None and loss_kwargs.get("shift_labels") is None:
                # the next token of the row or document, not of the column
                loss_kwargs["shift_labels"] = layout.shift_labels(labels.to(hidden_states.device))
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_kwargs)
            if outputs.predictor_loss is not None:
                share = _share_of_batch(labels, **loss_kwargs)
                loss = loss + share * self.config.innovation_loss_coef * outputs.predictor_loss.to(
                    loss.device, loss.dtype
                )
        return BMojoCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            innovations=outputs.innovations,
            eidetic_positions=outputs.eidetic_positions,
        )

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args, **kwargs
    ):
        """generate() makes a BMojoCache; `cache_implementation` may be None, "dynamic" or "static"."""
        wanted = generation_config.cache_implementation
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            return super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args, **kwargs
            )
        if wanted not in (None, "dynamic", "static"):
            raise ValueError(
                f"cache_implementation={wanted!r} is not supported: B'MOJO's cache is of fixed size already. Use None, or "
                "'static' for static shapes (torch.compile)."
            )
        columns = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
        cache = BMojoCache(self.config, max_cache_len=columns if wanted == "static" else None)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache
        return None

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, past_key_values, position_ids=None, **kwargs):
        """The 2-D mask as it is: B'MOJO makes the others itself, also where generate() compiles."""
        return attention_mask


def _share_of_batch(labels, num_items_in_batch=None, shift_labels=None):
    """What part of a batch, whose micro-batches' losses are added up, this call is: 1 where it is all."""
    if num_items_in_batch is None:
        return 1
    counted = (labels[:, 1:] if shift_labels is None else shift_labels) != -100
    return counted.sum() / num_items_in_batch


def _seen_before(attention_mask, hidden_states) -> int:
    """Columns of the mask that belong to the past."""
    return 0 if attention_mask is None else max(0, attention_mask.shape[-1] - hidden_states.shape[1])


class _HeadOnModel:
    """Builds a head's base model from the class beside it: transformers' generic heads ask AutoModel, which knows no remote code."""

    def _build(self, config):
        PreTrainedModel.__init__(self, config)
        attach(config)
        self.model = BMojoModel(config)


class BMojoForSequenceClassification(_HeadOnModel, GenericForSequenceClassification, BMojoPreTrainedModel):
    def __init__(self, config):
        self._build(config)
        self.num_labels = config.num_labels
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class BMojoForTokenClassification(_HeadOnModel, GenericForTokenClassification, BMojoPreTrainedModel):
    def __init__(self, config):
        self._build(config)
        self.num_labels = config.num_labels
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", None) or 0.0)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class BMojoForQuestionAnswering(_HeadOnModel, GenericForQuestionAnswering, BMojoPreTrainedModel):
    def __init__(self, config):
        self._build(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


def get_parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Groups for an optimizer: weight decay on matrices, none on A_log, D, dt_bias, norms and biases.

    Works on the model and on a PEFT wrapper of it; leaves out frozen parameters.

    Example:
        >>> optimizer = torch.optim.AdamW(get_parameter_groups(model, weight_decay=0.1), lr=1e-3)
    """
    decayed, exempt = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            dynamics = any(part in ("A_log", "D", "dt_bias") for part in name.split("."))
            (exempt if dynamics or parameter.dim() < 2 else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]


__all__ = [
    "BMojoCache",
    "BMojoForCausalLM",
    "BMojoForQuestionAnswering",
    "BMojoForSequenceClassification",
    "BMojoForTokenClassification",
    "BMojoModel",
    "BMojoPreTrainedModel",
    "cache_bytes",
    "get_parameter_groups",
]
