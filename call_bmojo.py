"""What all layers of a forward call share: positions, lengths, rotary tables, rings; and how tokens are laid out in time."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from .cache_bmojo import Ring, memory_rings, memory_slots
from .configuration_bmojo import BMOJO_TYPES, SSM_TYPES
from .layout_bmojo import PackedLayout, Rows
from .numerics_bmojo import as_dtype, at_least_float32


@dataclass
class Step:
    """What every layer needs to answer one token of each row from the cache.

    Attributes:
        index: by layer type the slots that the token is written to, one of every ring, (rows, kv heads, rings, head_dim) int64.
        slot: of those the window's in layers with eidetic memory, (rows, 1); None without such layers.
        output: the slot of `history` that the token's signal is written to, (rows, 1, hidden_size) int64.
        mask: by layer type what is added to the scores of all slots, (rows or rows * kv heads, 1, slots): 0 or -inf.
        cos, sin: by type of B'MOJO layers for queries, queries of the eidetic memory, of fading keys (as far as there are) and
            keys, side by side as heads, (rows, 1, heads, head_dim); times the scale of the scores for queries.
        predictor: weights of the signals in `history` for the prediction of this one, (rows, 1, innovation_kernel).
        boundary: rows that begin a chunk, (rows, 1) bool; None where none does.
        near: how many slots, the first ones of the window, hold all that is seen, while nothing has left it; None: all may.
            `mask` then is for these.
    """

    index: dict[str, torch.Tensor]
    slot: torch.Tensor | None
    output: torch.Tensor
    mask: dict[str, torch.Tensor]
    cos: dict[str, torch.Tensor]
    sin: dict[str, torch.Tensor]
    predictor: torch.Tensor
    boundary: torch.Tensor | None
    near: int | None = None

    def split(self, rows: int, near: int | None) -> list["Step"]:
        """The steps of its rows one by one, each for `rows` rows that are all as far; the first row begins a chunk."""

        def each(part, rows=1):
            return part[:, None].expand(-1, rows, *part.shape[1:]).unbind(0)

        count, device = len(self.output), self.output.device

        def each_of(parts, rows=1):
            columns = {name: each(part, rows) for name, part in parts.items()}
            return [{name: column[number] for name, column in columns.items()} for number in range(count)]

        indices, cosines, sines = each_of(self.index, rows), each_of(self.cos), each_of(self.sin)
        masks = each_of({name: part[..., :near] for name, part in self.mask.items()})
        slots = [None] * count if self.slot is None else each(self.slot, rows)
        outputs, predictors = each(self.output, rows), each(self.predictor, rows)
        boundaries = [torch.ones(rows, 1, dtype=torch.bool, device=device), *[None] * (count - 1)]
        parts = indices, slots, outputs, masks, cosines, sines, predictors, boundaries
        return [Step(*part, near) for part in zip(*parts, strict=True)]


class Call:
    """What the layers need to know about one forward call on rows whose real tokens stand at the front.

    No dataclass: of those in a layer's arguments FSDP's mixed precision would round the tensors, the rotary table among them.

    Attributes:
        past: tokens that came before, (rows,) int64; None where no cache is given, that is: none.
        lengths: real tokens of the call, (rows,) int64; None: all of them are.
        positions: position of every token in its row, (rows or 1, seq_len) int64.
        table: from positions (...) to cos and sin (..., head_dim); `inverse=True` for the opposite rotation. Where only a
            part of a head is rotated, sin is as wide as that part, and cos 1 beyond it.
        cos, sin: the table at `positions`; None for a single token where no layer reads them.
        scaling: the factor that is on them (attention scaling of YaRN; 1 else).
        in_place: states may be overwritten: no gradient is recorded and nothing will be rolled back.
        any_mode: whether torch lets this call write what was made in inference mode.
        fixed_columns: the keys of full attention have all their room already (`max_cache_len`).
        phase: how far into its chunk a row is before the call, (rows, 1) int64; None without past, or where a step says it.
        lead: the largest phase, or chunk - 1 where asking would stop a GPU or a compiler.
        step: of a single token with a cache.
        state_only: nothing asks for what a layer says, only for its new state.
        columns: in the cache after the call, padding included; None without cache, or while a compiler traces.
        even: whether all columns before the call held a token.
        known: what a layer has worked out that others ask for, too (`once`).
    """

    def __init__(
        self,
        past: torch.Tensor | None,
        lengths: torch.Tensor | None,
        positions: torch.Tensor,
        table: Callable,
        cos: torch.Tensor | None,
        sin: torch.Tensor | None,
        scaling: float,
        in_place: bool,
        any_mode: bool,
        fixed_columns: bool,
        phase: torch.Tensor | None,
        lead: int,
        step: Step | None,
        state_only: bool = False,
        columns: int | None = None,
        even: bool = False,
    ):
        self.past, self.lengths, self.positions = past, lengths, positions
        self.table, self.cos, self.sin, self.scaling = table, cos, sin, scaling
        self.in_place, self.any_mode, self.fixed_columns = in_place, any_mode, fixed_columns
        self.phase, self.lead = phase, lead
        self.step, self.state_only = step, state_only
        self.columns, self.even = columns, even
        self.known = {}

    def fields(self) -> dict:
        """What it was made of; not what was worked out since, which another call finds for itself."""
        return {name: value for name, value in vars(self).items() if name != "known"}

    def but(self, **changes) -> "Call":
        """The call with other fields."""
        return Call(**self.fields() | changes)

    def once(self, name, work_out: Callable):
        """What `work_out()` returns, and returned when the first layer asked for what goes by that name."""
        if name not in self.known:
            self.known[name] = work_out()
        return self.known[name]

    @property
    def seq_len(self) -> int:
        return self.positions.shape[1]

    @property
    def filled(self) -> int | None:
        """How many columns the cache has after the call, if every one of them holds a token of every row."""
        return self.columns if self.even and self.lengths is None else None

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

        return Call(**{name: move(value) for name, value in self.fields().items()})

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
        """Whether what a tensor of the cache holds may be overwritten: nothing needs it as it is."""
        return self.in_place and self.may_write(state)

    def may_write(self, state: torch.Tensor) -> bool:
        """Whether a tensor of the cache may be written to where it holds nothing yet: no gradient is recorded."""
        free = not torch.is_grad_enabled() and not state.requires_grad
        return free and (self.any_mode or not state.is_inference())

    def put(self, state: torch.Tensor, dim: int, index: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """The state with `new` scattered at `index` along `dim`, for rows that have a token."""
        new = as_dtype(new, state.dtype)
        if self.lengths is not None:
            wanted = (self.lengths > 0).view(-1, *[1] * (state.dim() - 1))
            new = torch.where(wanted, new, state.gather(dim, index))
        return self.scatter(state, dim, index, new, self.may_overwrite(state))

    @staticmethod
    def scatter(state: torch.Tensor, dim: int, index: torch.Tensor, new: torch.Tensor, in_place: bool) -> torch.Tensor:
        """The state with `new`, of its dtype, scattered at `index` along `dim`."""
        if not in_place:
            return state.scatter(dim, index, new)
        # as integers, for torch scatters 16-bit floats on a CPU through a copy of them all
        if state.is_cpu and state.element_size() == 2:
            state.view(torch.int16).scatter_(dim, index, new.view(torch.int16))
            return state
        return state.scatter_(dim, index, new)


class PackedCall:
    """A call on packed documents: a `Call` for every group of documents of similar length. No dataclass, as `Call` is none.

    Attributes:
        groups: the documents as `Rows`, their `Call`, and which of the flattened rows' places are real tokens.
        where: places of those tokens in the flattened input, group after group.
        order: for the rows of all groups, one after the other, how to put them in the order of the documents.
    """

    def __init__(self, groups: list[tuple[Rows, Call, torch.Tensor]], where: torch.Tensor, order: torch.Tensor):
        self.groups, self.where, self.order = groups, where, order

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


def timeline(tokens, past, ring: Ring, call: Call, start, length: int) -> list[torch.Tensor]:
    """Lay out past and new tokens by position: slot i holds the token at position start + i.

    Args:
        tokens: tensors of the call's tokens, (rows, seq_len, ...).
        past: for each the last tokens before them, as they lie in a ring, in parts (rows, slots, ...).
        ring: says how.
        start: position of slot 0, (rows, 1) int64.
        length: number of slots.

    Returns:
        (rows, length, ...) of each. What is not held (before position 0, overwritten in the ring, or behind the call) is
        another token, or what the ring began with.
    """
    index = _find(start + torch.arange(length, device=start.device), ring, call)
    both = (
        torch.cat([*(part.to(new.dtype) for part in held), new], 1) for new, held in zip(tokens, past, strict=True)
    )
    return [take_rows(x, index) for x in both]


def write_ring(new, held, ring: Ring, call: Call):
    """What a ring holds after the call, every row's last real tokens, (rows, ring.size, ...).

    new and held are tokens of the call and the parts in which those before them lie, as for `timeline`.
    """
    index = call.once(ring, lambda: _find(ring.positions(call.end() - 1), ring, call)).expand(len(new), ring.size)
    new = new.to(held[0].dtype)
    if call.lengths is None and call.seq_len >= ring.size:  # nothing that was held stays
        return take_rows(new, index - ring.size)
    return take_rows(torch.cat([*held, new], 1), index)


def _find(positions, ring: Ring, call: Call):
    """Where tokens are in a ring's slots with the call's tokens behind them; what is not there yet, the last of these."""
    past = call.past_column
    in_new = ring.size + (positions - past).clamp(max=call.seq_len - 1)
    return torch.where(positions >= past, in_new, ring.slots(positions, past - 1))


def last_rows(previous, new, lengths):
    """The last tokens of (previous, new) in a buffer like `previous`, given the real lengths of `new`."""
    size, new = previous.shape[1], new.to(previous.dtype)  # under autocast another than the cache's
    if lengths is None:
        new = new if new.shape[1] <= size else new[:, new.shape[1] - size :]
        return torch.cat([previous[:, new.shape[1] :], new], 1)
    both = torch.cat([previous, new], 1)
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
        "innovation_predictor num_attention_heads num_key_value_heads head_dim hidden_size fading_query"
    )
    plan = SimpleNamespace(**{name: getattr(config, name) for name in names.split()})
    plan.softmax_scale = score_scale(config)
    kinds = sorted(set(config.layers_block_type) & {"sliding_attention", *BMOJO_TYPES})
    # layers that rotate a single token by `Call.cos`, not by `Step.cos`
    plan.turns_alone = config.mamba_use_pos_emb or not set(config.layers_block_type) <= {*BMOJO_TYPES, *SSM_TYPES}
    plan.slots = {layer_type: memory_slots(config, layer_type) for layer_type in kinds}
    plan.rings = {layer_type: memory_rings(config, layer_type) for layer_type in kinds}
    return plan


def make_step(config, past, like: torch.Tensor, table: Callable, scaling: float) -> Step:
    """Work out a `Step`, but for its boundary, for rows that have seen `past` (rows,) tokens.

    config is a `step_plan`, `like` gives dtype and device, table and scaling are those of `Call`.
    """
    dtype, device = at_least_float32(like), past.device
    position = past[:, None]
    index, slot, mask = {}, None, {}
    for layer_type, slots in config.slots.items():
        written, visible = [], []
        for span, newest in (("window", 0), ("fading", config.sliding_window)):
            if span in slots:
                ring, start = config.rings[layer_type][span], slots[span].start
                age = position - ring.positions(position)[:, : ring.size - ring.waiting]
                visible.append((age >= newest) & (age < newest + config.sliding_window) & (age <= position))
                written.append(start + ring.slots(position, position))
        if "eidetic" in slots:  # filled from the back with the tokens that have left the window at the chunk's start
            begun = position - position % config.eidetic_chunk_size - config.sliding_window + 1
            visible.append(torch.arange(config.eidetic_size, 0, -1, device=device) <= begun)
        written = torch.cat(written, 1)
        slot = written[:, :1] if "eidetic" in slots else slot
        index[layer_type] = written[:, None, :, None].expand(-1, config.num_key_value_heads, -1, config.head_dim)
        unseen = torch.zeros(1, dtype=dtype, device=device).masked_fill(~torch.cat(visible, 1), -torch.inf)
        mask[layer_type] = unseen[:, None]

    cos, sin = {}, {}
    for layer_type in config.slots.keys() & set(BMOJO_TYPES):
        remembers = "eidetic" in config.slots[layer_type]
        cos[layer_type], sin[layer_type] = _turns(config, position, dtype, table, scaling, remembers)

    size = config.innovation_kernel
    ages = (position - 1 - torch.arange(size, device=device)) % size + 1  # of the outputs in the ring
    weights = predictor_weights(config, dtype, device)[ages - 1] * (ages <= position)
    total = weights.sum(-1, keepdim=True)
    predictor = (weights / torch.where(total > 0, total, 1))[:, None]
    output = (position % size)[..., None].expand(-1, -1, config.hidden_size)
    return Step(index, slot, output, mask, cos, sin, predictor, None)


def _turns(config, position, dtype, table: Callable, scaling: float, remembers: bool):
    """`Step.cos` and `Step.sin` for rows at `position` (rows, 1), in layers with or without eidetic memory."""
    rows, device = len(position), position.device
    queries, keys = config.num_attention_heads, config.num_key_value_heads * (2 if config.fading_span else 1)
    at = [position.expand(rows, queries), position.expand(rows, keys)]
    if remembers:
        at.insert(1, torch.full_like(at[0], 2 * config.sliding_window))
    if config.fading_query:
        at.insert(-1, at[0])
    cos, sin = table(torch.cat(at, 1)[:, None])
    rotated = sin.shape[-1]
    factor = torch.ones(cos.shape[2], 1 if scaling == 1 else cos.shape[-1], dtype=dtype, device=device)
    factor[: cos.shape[2] - keys] = config.softmax_scale
    if remembers and config.eidetic_position == "constant":
        factor[queries : 2 * queries, :rotated] *= scaling  # as `eidetic_key`
    return cos * factor, sin * factor[:, :rotated]
