"""Attention over the memories: full, windowed, B'MOJO's one softmax over three spans, and attention beside an SSM."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .cache_bmojo import ROOM, Ring, memory_rings, memory_slots
from .call_bmojo import (
    Call,
    last_rows,
    predictor_weights,
    score_scale,
    take_rows,
    timeline,
    write_ring,
)
from .configuration_bmojo import LEARNED_CHOICES
from .kernels_bmojo import (
    cache_attention,
    memory_attention,
    prediction_error,
    rotate,
    running_selection,
    update_memory,
)
from .linear_bmojo import project
from .norms_bmojo import BMojoRMSNorm
from .numerics_bmojo import as_dtype, at_least_float32, no_autocast, widen
from .ops_bmojo import exchange_slots, hash_scores, predict
from .ssm_bmojo import SSM_CLASSES, BMojoConv1d


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
        self.norms_heads = config.use_qk_norm
        self.head_dim, self.scale, self.key_multiplier = config.head_dim, score_scale(config), config.key_multiplier
        self.interleaved = config.rotary_dim if config.rope_interleave else 0
        self.conv1d = None
        if config.attention_conv_kernel:
            channels, taps = self.q_proj.out_features + 2 * kv_size, config.attention_conv_kernel
            self.conv1d = BMojoConv1d(channels, channels, taps, groups=channels, bias=True, padding=0)

    def heads(self, x):
        return x.view(*x.shape[:-1], -1, self.head_dim)

    def query_heads(self, x, norm=None):
        """Projected queries (..., heads * head_dim) to (..., heads, head_dim), as they are before the rotation."""
        query = self.heads(x)
        if self.norms_heads:
            query = (norm or self.q_norm)(query)
        return self.halves(query) if self.interleaved else query

    def key_heads(self, x, norm=None):
        """Projected keys (..., kv heads * head_dim) to (..., kv heads, head_dim), as they are before the rotation."""
        key = self.heads(x)
        if self.norms_heads:
            key = (norm or self.k_norm)(key)
        if self.key_multiplier != 1:
            key = key * self.key_multiplier
        return self.halves(key) if self.interleaved else key

    def halves(self, x):
        """Entries 2i and 2i + 1, which turn together, moved to i and i + half: scores do not see the order of entries."""
        front, rest = x.split_with_sizes([self.interleaved, self.head_dim - self.interleaved], -1)
        return torch.cat([front[..., ::2], front[..., 1::2], rest], -1)

    def make_qkv(self, u, call: Call, state):
        """Queries and keys, rotated, and values, each (rows, seq_len, heads, head_dim); and what of the state this keeps."""
        query, key, value, kept = project(self.q_proj, u), project(self.k_proj, u), project(self.v_proj, u), {}
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
        """From (rows, seq_len, hidden_size) to the same, the new state (None without cache) and nothing to show.

        In a call that asks for the state alone there is None in place of the first.
        """
        query, key, value, kept = self.make_qkv(u, call, state)
        if state is not None:
            key, value = self._append(state["full_key"], key, call), self._append(state["full_value"], value, call)
            state = {"full_key": key, "full_value": value, **kept}
        if call.state_only:
            return None, state, {}
        query, key, value = query.transpose(1, 2), key.to(u.dtype), value.to(u.dtype)
        if state is None:
            key, value = key.transpose(1, 2), value.transpose(1, 2)
        elif call.filled is not None:
            key, value = key[:, :, : call.filled], value[:, :, : call.filled]
        else:  # columns that hold no token of the row
            columns = torch.arange(key.shape[2], device=u.device)
            key, value = (x.masked_fill((columns >= call.end())[:, None, :, None], 0) for x in (key, value))
        mixed = self._attend(query, key, value, call, all_seen=state is None or call.filled is not None)
        return project(self.o_proj, mixed.transpose(1, 2).flatten(-2)), state, {}

    def _attend(self, query, key, value, call: Call, all_seen: bool):
        """Attention of every query to the columns up to its position.

        Args:
            query: (rows, num_heads, seq_len, head_dim).
            key, value: (rows, num_key_value_heads, columns, head_dim), every number finite.
            call: the call.
            all_seen: whether the last query sees all columns; they are of tokens one after the other.
        """
        attend = partial(F.scaled_dot_product_attention, scale=self.scale)
        rows, heads, seq_len, head_dim = query.shape
        kv_heads, length = key.shape[1:3]
        if seq_len == 1:  # the queries of a group, which see the same, as if they were tokens: no key is copied
            visible = None if all_seen else torch.arange(length, device=key.device) <= call.positions[:, None, :, None]
            query = query.reshape(rows, kv_heads, heads // kv_heads, head_dim)
            return attend(query, key, value, attn_mask=visible).view(rows, heads, 1, head_dim)
        key, value = (x.repeat_interleave(heads // kv_heads, 1) for x in (key, value))
        if all_seen and length == seq_len:
            return attend(query, key, value, is_causal=True)
        parts, columns = [], torch.arange(length, device=key.device)
        for start in range(0, seq_len, 1024):  # bounds the mask: linear in the length
            visible = columns <= call.positions[:, None, start : start + 1024, None]
            parts.append(attend(query[:, :, start : start + 1024], key, value, attn_mask=visible))
        return torch.cat(parts, 2)

    def _append(self, buffer, new, call: Call):
        """The keys or values (rows, kv heads, columns, head_dim) with the call's tokens (rows, seq_len, ...) at their positions.

        Without gradients a buffer is written in place, even while the past is recorded: what the state before it holds stays as
        it is. One that is too short grows, by more than this call needs.
        """
        new = as_dtype(new, buffer.dtype).transpose(1, 2)  # under autocast another than the cache's
        rows, heads, seq_len, head_dim = new.shape
        end, missing = call.filled, 0
        if not call.fixed_columns:
            missing = seq_len if call.columns is None else max(0, call.columns - buffer.shape[2])
            if missing and call.columns is not None and not torch.is_grad_enabled():
                missing += ROOM
        if missing:
            buffer = torch.cat([buffer, buffer.new_zeros(rows, heads, missing, head_dim)], 2)
        if end is not None:
            if not call.may_write(buffer):
                return torch.cat([buffer[:, :, : end - seq_len], new, buffer[:, :, end:]], 2)
            buffer[:, :, end - seq_len : end] = new
            return buffer
        index = call.positions.expand(rows, seq_len)
        real = call.real()
        if real is not None:  # behind a row's last token: put back what is there, at a place nothing else takes
            last = torch.arange(buffer.shape[2] - seq_len, buffer.shape[2], device=new.device)
            index = torch.where(real, index, last)
        index = index[:, None, :, None].expand_as(new)
        if real is not None:
            new = torch.where(real[:, None, :, None], new, buffer.gather(2, index))
        return call.scatter(buffer, 2, index, new, call.may_write(buffer))


class BMojoWindowAttention(BMojoAttention):
    """Attention over the last w tokens: `sliding_attention`, and the frame in which `bmojo` adds its other memories.

    Calls of any length go through `memory_attention`, linear in the length; a single token with a cache attends to the
    cache as it lies.
    """

    layer_type = "sliding_attention"

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.window = config.sliding_window
        self.slots, self.rings = memory_slots(config, self.layer_type), memory_rings(config, self.layer_type)
        names = {"fading": "fading", "memory": "eidetic"}
        self.first_slots = {name: self.slots[span].start for name, span in names.items() if span in self.slots}

    def in_cache(self, state, name: str, span: str):
        """The slots of one memory in the state's "key" or "value", (rows, slots, kv heads, head_dim)."""
        return state[name][:, :, self.slots[span]].transpose(1, 2)

    def in_ring(self, state, name: str, span: str) -> list:
        """All slots of a ring, in the parts that it lies in: those `in_cache`, and of fading tokens those that wait."""
        parts = [self.in_cache(state, name, span)]
        if self.rings[span].waiting:
            parts.append(state[f"waiting_{name}"].transpose(1, 2))
        return parts

    def with_past(self, tokens, span: str, call: Call, state, base, reach: int, length: int):
        """Keys and values for the `reach` positions before base and the `length` from there; without past the call's own."""
        if call.past is None:
            return tokens
        past = [self.in_ring(state, name, span) for name in ("key", "value")]
        return timeline(tokens, past, self.rings[span], call, base - reach, reach + length)

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
            parts = []
            for span, tokens in spans.items():
                ring = self.rings[span]
                front = write_ring(tokens[place], self.in_ring(state, name, span), ring, call).transpose(1, 2)
                if ring.waiting:
                    front, waiting = front.tensor_split((-ring.waiting,), 2)
                    new[f"waiting_{name}"] = waiting.clone(memory_format=torch.contiguous_format)
                parts.append(front)
            parts += [memory.transpose(1, 2).to(state[name].dtype) for memory in eidetic[place : place + 1]]
            new[name] = torch.cat(parts, 2)
        return new

    def put(self, state, call: Call, key, value):
        """Write one token of each ring, (rows, rings, kv heads, head_dim), into the state's keys and values."""
        index = call.step.index[self.layer_type]
        tokens = {"key": key, "value": value}
        return {name: call.put(state[name], 2, index, token.transpose(1, 2)) for name, token in tokens.items()}

    def attend_to_cache(self, state, call: Call, query, eidetic_query=None, fading_query=None):
        """The mix of values for one query of each row, (rows, 1, heads, head_dim); queries are scaled already."""
        key, value, mask, near = state["key"], state["value"], call.step.mask[self.layer_type], call.step.near
        if near is not None:
            return cache_attention(query, key.narrow(2, 0, near), value.narrow(2, 0, near), mask)
        eidetic_key = None
        if eidetic_query is not None and self.ranked:
            eidetic_key = self.eidetic_key(self.in_cache(state, "key", "eidetic").to(query.dtype), call)
        return cache_attention(query, key, value, mask, eidetic_query, fading_query, eidetic_key, **self.first_slots)

    def forward(self, u, call: Call, state=None):
        """From (rows, seq_len, hidden_size) to the same, the new state (None without cache) and nothing to show."""
        query, key, value, kept = self.make_qkv(u, call, state)
        if call.step is not None:
            state = self.put(state, call, key, value) | kept
            mixed = self.attend_to_cache(state, call, query * self.scale)
            return project(self.o_proj, mixed.flatten(-2)), state, {}
        new = None if state is None else self.into_cache(state, {"window": (key, value)}, call) | kept
        if call.state_only:
            return None, new, {}
        past = 0 if call.past is None else call.past[:, None]
        window = self.with_past((key, value), "window", call, state, past, self.window - 1, call.seq_len)
        mixed = memory_attention(  # without a memory, chunks only say how queries may be cut
            query, *window, past=call.past, window=self.window, chunk_size=64, scale=self.scale
        )
        return project(self.o_proj, mixed.flatten(-2)), new, {}


class BMojoMixer(BMojoWindowAttention):
    """The B'MOJO layer: one softmax over the window, the fading tokens behind it and the eidetic memory.

    Source: arXiv 2407.06324; the choices that the paper leaves open are those of the configuration's docstring.
    """

    layer_type = "bmojo"

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.memory = config.eidetic_size if "eidetic" in self.slots else 0
        self.chunk = config.eidetic_chunk_size
        self.scores_input = config.innovation_signal == "layer_input"
        self.fades, self.tied = config.fading_span, config.tie_attn_weights
        self.waits = self.fades and self.rings["fading"].waiting > 0
        self.ranked = config.eidetic_position == "rank"
        lasts = config.innovation_half_life is None or config.innovation_predictor in ("recent", "oldest")
        self.forgetting = 0 if lasts else math.log(2) / config.innovation_half_life  # per token
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
        self.learns = bool(self.memory) and config.innovation_predictor == "learnable"
        if self.learns:
            self.predictor = BMojoPredictor(config)

    def forward(self, u, call: Call, state=None):
        """From (rows, seq_len, hidden_size) to the same, the new state (which the layer drops without cache), and its memory.

        The last is a dict: "innovation" (rows, seq_len), "positions" (rows, chunks, eidetic_size), "loss" of a learnable
        predictor; empty without eidetic memory.
        """
        y, new, _ = self.fading(u, call, state)
        memory = {}
        if self.memory:
            signal = u if self.scores_input else y
            memory = self.innovation(signal, call, state)
            if state is not None and "history" in state:
                if call.step is None:
                    held = state["history"]
                    new["history"] = write_ring(signal, [held], Ring(held.shape[1]), call)
                else:
                    new["history"] = call.put(state["history"], 1, call.step.output, signal)
        attend = self.attend if call.step is None else self.attend_single
        score = self.score(memory["innovation"], call) if self.memory else None
        mixed, kept, positions = attend(u, y, score, call, state)
        if positions is not None:
            memory["positions"] = positions
        return None if mixed is None else project(self.o_proj, mixed.flatten(-2)), new | kept, memory

    # -- innovation ----------------------------------------------------------------------------------------------------

    def innovation(self, signal, call: Call, state) -> dict[str, torch.Tensor]:
        """As `full_innovation`, with few operations for the usual single token."""
        if call.step is None or torch.is_grad_enabled() or "history" not in state or self.learns:
            return self.full_innovation(signal, call, state)
        with no_autocast(signal):
            missed = torch.baddbmm(widen(signal), call.step.predictor, widen(state["history"]), alpha=-1)
        error = torch.linalg.vecdot(missed, missed).nan_to_num_(-1, torch.inf)
        return {"innovation": error if call.lengths is None else error.masked_fill(~call.real(), -torch.inf)}

    @torch.no_grad()
    def full_innovation(self, signal, call: Call, state) -> dict[str, torch.Tensor]:
        """How badly the signal was predicted at each token, (rows, seq_len) in float32 or wider; -inf where there is no token."""
        choice, dtype = self.config.innovation_predictor, at_least_float32(signal)
        found = {}
        if choice in LEARNED_CHOICES:
            kernel = self.config.innovation_kernel
            history = signal.new_zeros(signal.shape[0], kernel, signal.shape[2]) if state is None else state["history"]
            if call.past is not None:  # a ring
                history = take_rows(history, (call.past_column + torch.arange(kernel, device=signal.device)) % kernel)
            if choice == "learnable":
                with torch.enable_grad() if self.training else torch.no_grad():
                    missed = signal.detach().to(dtype) - self.predictor(signal.detach(), history, call.positions)
                    error = missed.pow(2).sum(-1)
                    real = torch.ones_like(error, dtype=torch.bool) if call.real() is None else call.real()
                    found["loss"] = error.masked_fill(~real, 0).sum() / real.sum().clamp(min=1)
                error = error.detach()
            else:
                weights = predictor_weights(self.config, dtype, signal.device)
                error = prediction_error(signal, history, call.positions, weights)
            error = error.nan_to_num(nan=-1, posinf=torch.inf)  # NaN: below every error, above "no token"
        else:
            scores = {
                "random": partial(hash_scores, salt=self.layer_idx),
                "recent": torch.clone,
                "oldest": torch.zeros_like,
            }
            error = scores[choice](call.positions).to(dtype).expand(signal.shape[:2])
        real = call.real()
        found["innovation"] = error if real is None else error.masked_fill(~real, -torch.inf)
        return found

    @torch.no_grad()
    def score(self, innovation, call: Call):
        """What the selection compares, (rows, seq_len): innovations, or with a half-life what is left of them.

        That is innovation * 2^(-age / half-life) at any time. The factor 2^(-time / half-life) is the same for all tokens,
        and left out, so that a token's score never changes; of the rest this is the logarithm, -inf where there is no token.
        """
        if not self.forgetting:
            return innovation
        left = torch.add(innovation.log(), call.positions, alpha=self.forgetting)
        least = torch.finfo(left.dtype).min  # of NaNs, which are -1 here; nothing remains nothing, and is above them
        left = left.nan_to_num_(least, torch.inf, least / 2)
        real = call.real()
        return left if real is None else left.masked_fill_(~real, -torch.inf)

    # -- one token -----------------------------------------------------------------------------------------------------

    def attend_single(self, u, y, score, call: Call, state):
        """The mix for one token of each row, what of the state attention keeps, and the memory of the token's chunk."""
        step = call.step
        query = self.query_heads(project(self.q_proj, u))
        if self.fades and self.tied:  # one product for both
            both = torch.cat([u, y], 1)
            key, value = project(self.k_proj, both), project(self.v_proj, both)
        else:
            key, value = project(self.k_proj, u), project(self.v_proj, u)
            if self.fades:
                key = torch.cat([key, project(self.fading_k_proj, y)], 1)
                value = torch.cat([value, project(self.fading_v_proj, y)], 1)
        if self.asks_twice:
            key = torch.cat([self.key_heads(key[:, :1]), self.key_heads(key[:, 1:], self.fading_k_norm)], 1)
        else:
            key = self.key_heads(key)
        value = self.heads(value)
        rows, rings, heads = *key.shape[:2], query.shape[2]
        queries = [query, query] if self.memory else [query]
        if self.asks_twice:
            queries.append(self.query_heads(project(self.fading_q_proj, u), self.fading_q_norm))
        key = key.view(rows, 1, -1, self.head_dim)
        turned = rotate.definition(torch.cat([*queries, key], 2), step.cos[self.layer_type], step.sin[self.layer_type])
        query, *queries, key = turned.split_with_sizes([heads] * len(queries) + [key.shape[2]], 2)
        kept = self.put(state, call, key.view(rows, rings, -1, self.head_dim), value)
        positions = eidetic_query = None
        fading_query = queries.pop() if self.asks_twice else None
        if self.waits:
            kept |= {name: state[name] for name in ("waiting_key", "waiting_value")}
            if step.boundary is not None:
                kept |= self.exchange(kept, call)
        if self.memory:
            eidetic_query = queries.pop()
            kept["window_innovation"] = call.put(state["window_innovation"], 1, step.slot, score)
            kept |= {name: state[name] for name in ("eidetic_innovation", "eidetic_position")}
            if step.boundary is not None:
                kept = self.cross_boundary(kept, call)
            positions = kept["eidetic_position"][:, None]
        mixed = self.attend_to_cache(kept, call, query, eidetic_query, fading_query)
        return mixed, kept, positions

    def cross_boundary(self, state, call: Call):
        """The state after a chunk boundary: the c tokens that the boundary lets in, merged for the rows at one."""
        names = ("key", "value", "window_innovation", "eidetic_innovation", "eidetic_position")
        key, value, innovation, position = update_memory(
            *(state[name] for name in names),
            *(call.past, call.step.boundary, *call.once("entering", partial(self.entering, call))),
            in_place=call.may_overwrite(state["key"]) and call.may_overwrite(state["value"]),
        )
        return state | {"key": key, "value": value, "eidetic_innovation": innovation, "eidetic_position": position}

    def entering(self, call: Call):
        """Cos and sin that turn the keys of the tokens back that may enter the memory at a boundary."""
        positions = call.past_column - self.window - self.chunk + 1 + torch.arange(self.chunk, device=call.past.device)
        return call.table(positions.clamp(min=0), inverse=True)

    def exchange(self, state, call: Call):
        """Keys and values after a chunk boundary: the chunk's fading tokens go to wait, and as many come to be seen."""
        front, behind = call.once(("exchanged", self.layer_type), partial(self.exchanged, call))
        rows, new = None if call.filled is not None else call.step.boundary, {}
        for name in ("key", "value"):
            pair = state[name], state[f"waiting_{name}"]
            in_place = all(map(call.may_overwrite, pair))
            new[name], new[f"waiting_{name}"] = exchange_slots(*pair, front, behind, rows, in_place=in_place)
        return new

    def exchanged(self, call: Call):
        """The slots whose tokens `exchange` exchanges, (rows, chunk) in keys and values and in those that wait."""
        ring = self.rings["fading"]
        read = call.past_column - ring.period + torch.arange(ring.period, device=call.past.device)
        return self.slots["fading"].start + (read - ring.size) % ring.front, read % ring.waiting

    # -- many tokens ---------------------------------------------------------------------------------------------------

    def attend(self, u, y, score, call: Call, state):
        """The mix for all tokens, what of the state attention keeps ({} without cache), and the memories of all chunks.

        There is None in place of the mix in a call that asks for the state alone.
        """
        key, value = self.key_heads(project(self.k_proj, u)), self.heads(project(self.v_proj, u))
        spans = {"window": (rotate(key, call.cos, call.sin), value)}
        if self.fades:
            spans["fading"] = self.fading_tokens(y, call)
        base = 0 if call.past is None else call.past[:, None] - call.phase
        length = call.seq_len + call.lead
        kept, positions, chosen = {}, None, None
        if self.memory:
            entries = self.entries(key, value, score, call, state, base, length)
            memory, after = self.memories(entries, call, base, length)
            if state is not None:
                kept = {f"eidetic_{name}": take_rows(entries[name], after) for name in entries}
                kept["window_innovation"] = write_ring(score, [state["window_innovation"]], self.rings["window"], call)
            positions, chosen = self.seen(entries["position"], memory, call, base), (entries, memory)
        mixed = None if call.state_only else self.mix(u, spans, chosen, call, state, base, length)
        if state is not None:
            eidetic = [kept.pop(f"eidetic_{name}") for name in ("key", "value")] if self.memory else []
            kept |= self.into_cache(state, spans, call, *eidetic)
        return mixed, kept, positions

    def mix(self, u, spans, chosen, call: Call, state, base, length: int):
        """What all tokens find in the memories, (rows, seq_len, heads, head_dim).

        Args:
            u: the layer's input, for the queries.
            spans: of the rings the keys and values of the call's tokens.
            chosen: `entries` and which of them each chunk sees; None without eidetic memory.
            call, state: the call, and the state before it.
            base: position of the first chunk that the call has tokens in, (rows, 1), or 0.
            length: positions from there on.
        """
        query = self.query_heads(project(self.q_proj, u))
        window = self.with_past(spans["window"], "window", call, state, base, self.window - 1, length)
        fading, fading_query, eidetic = (None, None), None, [None] * 4
        if self.asks_twice:
            fading_query = self.query_heads(project(self.fading_q_proj, u), self.fading_q_norm)
            fading_query = call.align(rotate(fading_query, call.cos, call.sin))
        if self.fades:
            fading = self.with_past(spans["fading"], "fading", call, state, base, 2 * self.window - 1, length)
        if chosen is not None:
            turned = rotate(query, *call.table(torch.full((1, 1), 2 * self.window, device=query.device)))
            eidetic = [call.align(turned), *self.eidetic_entries(*chosen, call)]
        mixed = memory_attention(
            *(call.align(rotate(query, call.cos, call.sin)), *window, *fading, *eidetic),
            past=None if call.past is None else base[:, 0],
            fading_query=fading_query,
            window=self.window,
            chunk_size=self.chunk,
            scale=self.scale,
        )
        return call.unalign(mixed)

    def fading_tokens(self, y, call: Call):
        """Keys (rotated) and values of the SSM's outputs."""
        tied = self.tied
        key = project(self.k_proj if tied else self.fading_k_proj, y)
        value = project(self.v_proj if tied else self.fading_v_proj, y)
        norm = self.fading_k_norm if self.asks_twice else self.k_norm
        return rotate(self.key_heads(key, norm), call.cos, call.sin), self.heads(value)

    def eidetic_key(self, key, call: Call):
        """Keys of a memory (..., eidetic_size, kv heads, head_dim), turned back by their rank where that counts."""
        if not self.ranked:
            return key if call.scaling == 1 else rotate(key, *call.table(torch.zeros(1, 1, device=key.device)))
        ranks = torch.arange(self.memory, 0, -1, device=key.device)  # the last place holds the newest: rank 1
        return rotate(key, *call.table(-ranks))

    def entries(self, key, value, score, call: Call, state, base, length: int):
        """Everything that can be in a memory of the call, in the order of time, with keys that are not rotated.

        The memory before the call, then its tokens, with a past from the first on that may enter.

        Returns:
            "key", "value" (rows, entries, kv heads, head_dim), "innovation" (of `score`) and "position" (rows, entries); the
            latter -inf and -1 where there is nothing, or nothing that may enter.
        """
        rows, tokens = key.shape[0], {"key": key, "value": value, "innovation": score}
        if call.past is None:
            positions = call.positions.expand(rows, -1)
            before = {
                "innovation": score.new_full((rows, self.memory), -torch.inf),
                "position": positions.new_full((rows, self.memory), -1),
            }
            before |= {name: tokens[name].new_zeros(rows, self.memory, *key.shape[2:]) for name in ("key", "value")}
        else:
            ring = self.rings["window"]
            held = {name: self.in_cache(state, name, "window") for name in ("key", "value")}
            at = ring.positions(call.past_column - 1).clamp(min=0)
            held["key"] = rotate(held["key"].to(key.dtype), *call.table(at, inverse=True))
            held["innovation"] = state["window_innovation"]
            start, slots = base - self.window - self.chunk + 1, -(-length // self.chunk) * self.chunk
            past = [[held[name]] for name in tokens]
            tokens = dict(zip(tokens, timeline(tokens.values(), past, ring, call, start, slots), strict=True))
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
        if call.past is None and call.lengths is None:
            return found  # every chunk has a token
        used = -(-(call.end() - base) // self.chunk)
        found = found.masked_fill((torch.arange(memory.shape[1], device=memory.device) >= used)[..., None], -1)
        if torch.compiler.is_compiling():
            return found
        chunks = call.once("chunks", lambda: max(1, int(used.max())))  # once a call: a GPU has to answer
        return found[:, :chunks]


class BMojoFMixer(BMojoMixer):
    """The B'MOJO layer without eidetic memory: the paper's B'MOJO-F."""

    layer_type = "bmojo_f"


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
        state = None if state is None else kept | new
        return None if mixed is None else y * ssm_out + mixed * attention_out, state, {}


MIXER_CLASSES = {
    "bmojo": BMojoMixer,
    "bmojo_f": BMojoFMixer,
    "sliding_attention": BMojoWindowAttention,
    "full_attention": BMojoAttention,
    "hybrid": BMojoHybridMixer,
}
