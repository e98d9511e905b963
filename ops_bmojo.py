"""The mathematics of B'MOJO in plain torch: scans, innovation, selection, rotary positions, attention over memories.

Every function here is a definition: pure, without parameters, differentiable where a gradient is meant to flow. Faster
forms of some are in `cpu_bmojo` and `kernels/`; `kernels_bmojo` chooses.

Legend of the shapes: b batch, t time, h heads, p channels per head, n state, g groups, c chunks, l and s positions in a
chunk, w `sliding_window`, M `eidetic_size`.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .numerics_bmojo import as_dtype, at_least_float32, no_autocast, widen


# ----------------------------------------------------------------------------------------------------------------------
# Fading memory: the two scans
# ----------------------------------------------------------------------------------------------------------------------


def ssd_scan(x, dt, A, B, C, initial_state=None, chunk_size: int = 64):
    """Mamba2's scan: S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T, y_t = S_t C_t, a scalar decay per head.

    Args:
        x: inputs, (batch, seq_len, num_heads, head_dim).
        dt: time steps, (batch, seq_len, num_heads), none below 0. A token with dt 0 leaves the state as it is.
        A: (num_heads,), none above 0.
        B, C: input and output vectors, (batch, seq_len, n_groups, state_size); head h reads group h // (heads per group).
        initial_state: S_0, (batch, num_heads, head_dim, state_size); zeros where None.
        chunk_size: tokens that are computed as one block.

    Returns:
        y as x and the last state, (batch, num_heads, head_dim, state_size), both in float32 or wider.

    Source: Dao and Gu, arXiv 2405.21060, section 6 (the block decomposition).
    """
    batch, seq_len, num_heads, head_dim = x.shape
    n_groups, state_size = B.shape[2:]
    dtype = at_least_float32(x, dt, A, B)
    if seq_len < chunk_size:
        chunk_size = max(1, seq_len)
    padding = -seq_len % chunk_size

    def in_chunks(tensor, *shape):  # (b, c, *heads, l, channels): products below run over the last two axes
        tensor = F.pad(tensor.to(dtype), (0, 0) * (tensor.dim() - 2) + (0, padding))
        return tensor.unflatten(1, (-1, chunk_size)).unflatten(3, shape).movedim(2, 4)

    with no_autocast(x):
        x, dt, A = x.to(dtype), dt.to(dtype), A.to(dtype)
        per_group = num_heads // n_groups
        weighted = in_chunks(x * dt[..., None], n_groups, per_group)  # (b, c, g, h, l, p)
        B, C = in_chunks(B, n_groups, 1), in_chunks(C, n_groups, 1)  # (b, c, g, 1, l, n)
        log_decay = in_chunks((dt * A)[..., None], n_groups, per_group).squeeze(-1).cumsum(-1)  # (b, c, g, h, l)

        # inside a chunk: token s reaches token l >= s through the decay between them
        causal = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=x.device).tril()
        gap = log_decay[..., :, None] - log_decay[..., None, :]
        between = gap.masked_fill(~causal, -torch.inf).exp()  # masked before exp: exp of a large future gap is inf
        y = (C @ B.transpose(-1, -2) * between) @ weighted

        # from chunk to chunk: what a chunk adds to the state, then a short loop over chunks
        to_end = (log_decay[..., -1:] - log_decay).exp()[..., None]
        added = (weighted * to_end).transpose(-1, -2) @ B  # (b, c, g, h, p, n)
        through = log_decay[..., -1].exp()[..., None, None]
        if initial_state is None:
            state = torch.zeros_like(added[:, 0])
        else:
            state = initial_state.to(dtype).unflatten(1, (n_groups, per_group))
        starts = []
        for chunk_added, chunk_through in zip(added.unbind(1), through.unbind(1), strict=True):
            starts.append(state)
            state = chunk_through * state + chunk_added
        y = y + (C @ torch.stack(starts, 1).transpose(-1, -2)) * log_decay.exp()[..., None]
    y = y.movedim(4, 2).flatten(1, 2)[:, :seq_len].reshape(batch, seq_len, num_heads, head_dim)
    return y, state.reshape(batch, num_heads, head_dim, state_size)


def selective_scan(x, dt, A, B, C, initial_state=None, chunk_size: int = 64):
    """Mamba's scan: h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t . h_t, a decay per channel and state.

    Args:
        x: inputs, (batch, seq_len, channels).
        dt: time steps, (batch, seq_len, channels), none below 0. A token with dt 0 leaves the state as it is.
        A: (channels, state_size), none above 0.
        B, C: (batch, seq_len, state_size), shared by the channels.
        initial_state: h_0, (batch, channels, state_size); zeros where None.
        chunk_size: bounds what is held at once: blocks of 4 * chunk_size tokens, recomputed in the backward pass.

    Returns:
        y as x and the last state, (batch, channels, state_size), both in float32 or wider.

    Source: Gu and Dao, arXiv 2312.00752, section 3.
    """
    dtype = at_least_float32(x, dt, A, B)
    batch, seq_len, channels = x.shape
    state = (
        x.new_zeros(batch, channels, A.shape[-1], dtype=dtype) if initial_state is None else initial_state.to(dtype)
    )
    block = 4 * chunk_size
    outputs = []
    with no_autocast(x):
        x, dt, A, B, C = (tensor.to(dtype) for tensor in (x, dt, A, B, C))
        for start in range(0, seq_len, block):
            cut = slice(start, start + block)
            inputs = x[:, cut], dt[:, cut], A, B[:, cut], C[:, cut], state
            if torch.is_grad_enabled() and seq_len > block and not torch._C._are_functorch_transforms_active():
                y, state = checkpoint(_scan_block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                y, state = _scan_block(*inputs)
            outputs.append(y)
    return torch.cat(outputs, 1), state


def _scan_block(x, dt, A, B, C, state):
    """One block of `selective_scan`: all its short runs of tokens advance together, then their states are chained."""
    seq_len = x.shape[1]
    run = max(1, min(16, seq_len))  # about the square root of a block: as many steps inside a run as between runs
    padding = -seq_len % run

    def in_runs(tensor):  # (b, runs, run, channels)
        return F.pad(tensor, (0, 0, 0, padding)).unflatten(1, (-1, run))

    dt_runs = in_runs(dt)
    log_decay = dt_runs[..., None] * A
    added = in_runs(dt * x)[..., None] * in_runs(B)[..., None, :]  # (b, runs, run, channels, state)
    local, history = None, []
    for decay, increment in zip(log_decay.exp().unbind(2), added.unbind(2), strict=True):
        local = increment if local is None else decay * local + increment
        history.append(local)
    since_start = log_decay.cumsum(2).exp()
    starts = []
    for through, last in zip(since_start[:, :, -1].unbind(1), local.unbind(1), strict=True):
        starts.append(state)
        state = through * state + last
    states = torch.stack(history, 2) + since_start * torch.stack(starts, 1)[:, :, None]
    y = (states * in_runs(C)[..., None, :]).sum(-1)
    return y.flatten(1, 2)[:, :seq_len], state


def ssd_step(x, dt, A, B, C, state, in_place: bool = False):
    """`ssd_scan` for one token, with few operations: x (batch, num_heads, head_dim), dt (batch, num_heads), B, C (batch, n_groups, state_size).

    Returns y as x and the state, which in_place overwrites.
    """
    batch, n_groups, state_size = B.shape
    dtype = state.dtype
    decay = (dt * A).exp_().view(*dt.shape, 1, 1)
    added = (x * dt.unsqueeze(-1)).view(batch * n_groups, -1, 1)
    state = state.mul_(decay) if in_place else state * decay  # contiguous, as the cache makes it
    if n_groups > 1:
        B, C = B.reshape(-1, 1, state_size), C.reshape(-1, 1, state_size)
    if B.dtype is not dtype:
        B, C = B.to(dtype), C.to(dtype)
    grouped = state.view(batch * n_groups, -1, state_size).addcmul_(added, B)
    with no_autocast(x):
        y = torch.bmm(grouped, C.transpose(1, 2))
    return y.view(x.shape), state


def selective_step(x, dt, A, B, C, state, in_place: bool = False):
    """`selective_scan` for one token, with few operations: x, dt (batch, channels), B, C (batch, state_size).

    Returns y as x and the state, which in_place overwrites.
    """
    decay = (dt[..., None] * A).exp_()
    state = state.mul_(decay) if in_place else state * decay
    added, B, C = (x * dt)[..., None], B[:, None].to(state.dtype), C[..., None].to(state.dtype)
    state = state.addcmul_(added, B) if in_place else torch.addcmul(state, added, B)
    with no_autocast(x):
        y = torch.bmm(state, C)
    return y.squeeze(-1), state


def causal_conv(x, weight, bias=None):
    """A depthwise convolution over time: y_t = bias + sum_k weight[k] x_{t + k}, y as long as every tap finds an input.

    Args:
        x: (batch, taps - 1 + seq_len, channels), the inputs after the taps - 1 that came before them.
        weight: (channels, taps); the last tap is for the newest input.
        bias: (channels,), or None.

    Returns:
        (batch, seq_len, channels).
    """
    return F.conv1d(x.transpose(1, 2).contiguous(), weight[:, None], bias, groups=weight.shape[0]).transpose(1, 2)


# ----------------------------------------------------------------------------------------------------------------------
# Projection, norm and gate
# ----------------------------------------------------------------------------------------------------------------------


def rms_norm(x, weight, eps: float, n_groups: int = 1):
    """RMSNorm, x / sqrt(mean(x^2) + eps) * weight, over the last axis, or over n_groups equal parts of it; statistics in float32 or wider.

    Args:
        x: (..., size).
        weight: (size,).
    """
    wide = widen(x) if n_groups == 1 else widen(x).unflatten(-1, (n_groups, -1))
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    mean = torch.addcmul(length.new_full((), eps), length, length, value=1 / wide.shape[-1])  # and eps: one operation
    normed = wide * mean.rsqrt()
    normed = (normed if n_groups == 1 else normed.flatten(-2)) * weight
    return as_dtype(normed, x.dtype)


def silu_gate(gate, x):
    """silu(gate) * x."""
    return F.silu(gate) * x


# ----------------------------------------------------------------------------------------------------------------------
# Innovation and its selection
# ----------------------------------------------------------------------------------------------------------------------


def predict(y, history, positions, weights):
    """Predict y_t from the outputs before it: sum_k weights[k-1] y_{t-k} over the k that exist, renormalised to them.

    Args:
        y: SSM outputs, (batch, seq_len, hidden_size).
        history: the `kernel` outputs before them, (batch, kernel, hidden_size); anything where none exists.
        positions: how many outputs came before each one, (batch or 1, seq_len).
        weights: (kernel,) for fixed weights, which are renormalised to sum 1 over the outputs that exist; or
            (kernel, hidden_size) for learned ones, which are scaled by kernel / (number that exist).

    Returns:
        The prediction, as y but in float32 or wider; 0 for the first token, which has no past.
    """
    kernel, seq_len = weights.shape[0], y.shape[1]
    dtype = at_least_float32(y)
    past = torch.cat([history.to(dtype), y.to(dtype)], 1)
    weights = weights.to(dtype)
    total = torch.zeros_like(past[:, kernel:])
    norm = torch.zeros(positions.shape, dtype=dtype, device=y.device)
    for k in range(1, kernel + 1):  # a fixed order of sums: the same bits for any split of the sequence
        exists = positions >= k
        total = total + (past[:, kernel - k : kernel - k + seq_len] * weights[k - 1]).masked_fill(
            ~exists[..., None], 0
        )
        norm = norm + exists.to(dtype) * (weights[k - 1] if weights.dim() == 1 else 1.0 / kernel)
    return total / torch.where(norm > 0, norm, 1)[..., None]


def hash_scores(positions, salt: int):
    """Pseudo-random numbers in [0, 1) that depend on nothing but the position and `salt`: the `random` control."""
    x = positions * 2654435761 + (salt + 1) * 40503
    for shift, factor in ((15, 2246822519), (13, 3266489917)):
        x = (((x & 0xFFFFFFFF) ^ ((x & 0xFFFFFFFF) >> shift)) * factor) & 0xFFFFFFFF
    return ((x ^ (x >> 16)) & 0xFFFFFF).to(torch.float32) / 2**24


def prediction_error(y, history, positions, weights):
    """The innovation: squared distance of every output from its prediction by `predict`, (batch, seq_len), float32 or wider."""
    return (y.to(at_least_float32(y)) - predict(y, history, positions, weights)).pow(2).sum(-1)


def select(scores, size: int):
    """Which entries stay in a memory of `size`: those with the largest scores, the earlier one of equals.

    Args:
        scores: (batch, entries), entries in the order of time; -inf where there is none. NaN must not occur.
        size: how many to keep, at most `entries`.

    Returns:
        Indices (batch, size) in the order of time. Entries of -inf fill up where fewer exist.

    `torch.topk` leaves the order of equals undefined, a stable sort does not.
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[:, :size].sort(dim=-1).values


def running_selection(scores, kept_scores, kept, first: int, chunk_size: int, chunks: int):
    """The memory of every chunk: chunk b keeps the best of what b - 1 kept and of the tokens that have left the window since.

    Args:
        scores: (batch, tokens), -inf where there is none.
        kept_scores, kept: the memory before chunk 0, (batch, size): scores, and numbers in ascending order, all below 0.
        first: the token that is the first to enter at chunk 0, then chunk_size at every chunk; tokens below 0 do not exist.
        chunk_size, chunks: tokens per chunk, and for how many chunks.

    Returns:
        (batch, 1 + chunks, size): the memory before chunk 0 and of every chunk; tokens by their number, in ascending order.
    """
    memories = [kept]
    numbers = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    for start in range(first, first + chunks * chunk_size, chunk_size):
        entering = slice(max(0, start), max(0, start + chunk_size))
        if entering.start < min(entering.stop, scores.shape[1]):
            both_scores = torch.cat([kept_scores, scores[:, entering]], 1)
            best = select(both_scores, kept.shape[1])
            kept_scores = both_scores.gather(1, best)
            kept = torch.cat([kept, numbers[:, entering]], 1).gather(1, best)
        memories.append(kept)
    return torch.stack(memories, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Rotary positions
# ----------------------------------------------------------------------------------------------------------------------


def rotary_table(positions, inv_freq, scaling: float, dtype):
    """Cos and sin, each (*positions.shape, head_dim), of positions of any size; sin negated in its first half.

    Angles are formed in float64, so that a position of a billion costs no precision (in float32 neighbours err by 0.05
    radians at a million). Devices without float64 form them on the CPU.
    """
    device = positions.device
    if device.type == "mps":
        positions = positions.cpu()
    angles = positions.to(torch.float64)[..., None] * inv_freq.to(positions.device, torch.float64)
    cos, sin = angles.cos() * scaling, angles.sin() * scaling
    return torch.cat([cos, cos], -1).to(device, dtype), torch.cat([-sin, sin], -1).to(device, dtype)


def rotate(x, cos, sin):
    """Rotate x (..., heads, head_dim) by a `rotary_table` (..., heads or head_dim): computed in float32 or wider, returned in x's dtype.

    cos and sin lack the axis of heads, unless they have as many as x. Where sin is narrower than a head, only so many
    entries at its front are rotated, and the others multiplied by their cos.
    """
    if cos.dim() < x.dim():
        cos, sin = cos[..., None, :], sin[..., None, :]
    wide, width = widen(x), sin.shape[-1]
    if width == x.shape[-1]:
        turned = torch.addcmul(wide * cos, wide.roll(width // 2, -1), sin)
    else:
        front = wide[..., :width]
        front = torch.addcmul(front * cos[..., :width], front.roll(width // 2, -1), sin)
        turned = torch.cat([front, wide[..., width:] * cos[..., width:]], -1)
    return as_dtype(turned, x.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Attention over the memories
# ----------------------------------------------------------------------------------------------------------------------


def memory_attention(
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
    """One softmax over the window, the fading tokens behind it, and the eidetic memory.

    Query i of a row stands at position past + i. Keys of window and fading tokens are given for the positions past -
    before to past + seq_len - 1, `before` being what they have more than seq_len; the query sees those that are 0 to
    window - 1 tokens old in the window, and window to 2 window - 1 among the fading tokens.

    Args:
        query: (rows, seq_len, num_heads, head_dim), rotated as the keys of window and fading tokens are.
        window_key, window_value: (rows, before + seq_len, num_key_value_heads, head_dim).
        fading_key, fading_value: the same, their `before` may differ; None without fading tokens.
        eidetic_query: as query, but rotated for the eidetic keys; None, like the next three, without eidetic memory.
        eidetic_key, eidetic_value: whatever can be in a memory, (rows, entries, num_key_value_heads, head_dim).
        memory: (rows, chunks, eidetic_size) int64, which entries the queries of a chunk see, -1 where a place is empty.
        past: (rows,) int64, tokens before the first query; None: 0. Positions below 0 do not exist.
        fading_query: as query, for the fading keys; None: the query itself.
        window: the number of tokens in the window.
        chunk_size: queries of a chunk.
        scale: factor on the scores.

    Returns:
        (rows, seq_len, num_heads, head_dim) in the dtype of the values. The softmax runs in float32 or wider. Where past
        is given, queries at positions below 0 must not be asked for: what they get is undefined.
    """
    seq_len = query.shape[1]
    per_block = max(1, min(64 // chunk_size, -(-seq_len // chunk_size)))
    block = per_block * chunk_size
    count = -(-seq_len // block)

    def in_blocks(x):  # (rows, seq_len, ...) to (rows, blocks, block, ...)
        return F.pad(x, (0, 0) * (x.dim() - 2) + (0, count * block - seq_len)).unflatten(1, (count, block))

    def span(query_blocks, key, value, newest, oldest):
        before, width = key.shape[1] - seq_len, oldest - newest + block - 1
        slots = torch.arange(1 - oldest, (count - 1) * block + width + 1 - oldest, device=key.device)
        exists = (slots >= -before)[None] if past is None else (slots >= -before) & (slots >= -past[:, None])
        index = (slots + before).clamp(0, key.shape[1] - 1)
        key = key.index_select(1, index)
        value = value.index_select(1, index).masked_fill(~exists[..., None, None], 0)
        key, value = (x.unfold(1, width, block).movedim(-1, 2) for x in (key, value))
        age = torch.arange(block, device=key.device)[:, None] + oldest - 1 - torch.arange(width, device=key.device)
        visible = ((age >= newest) & (age < oldest)) & exists.unfold(1, width, block)[:, :, None]
        return query_blocks, key, value, visible

    query_blocks = in_blocks(query)
    spans = [span(query_blocks, window_key, window_value, 0, window)]
    if fading_key is not None:
        fading_blocks = query_blocks if fading_query is None else in_blocks(fading_query)
        spans.append(span(fading_blocks, fading_key, fading_value, window, 2 * window))
    if memory is not None:
        spans.append(_eidetic_span(in_blocks(eidetic_query), eidetic_key, eidetic_value, memory, chunk_size))
    return span_attention(spans, scale).flatten(1, 2)[:, :seq_len]


def _eidetic_span(query, key, value, memory, chunk_size):
    """The memories of a block's chunks side by side; a query sees the one of its chunk."""
    rows, count, block = query.shape[:3]
    per_block, size = block // chunk_size, memory.shape[-1]
    memory = F.pad(memory, (0, 0, 0, count * per_block - memory.shape[1]), value=-1)
    exists = (memory >= 0).view(rows, count, 1, -1)
    index = memory.flatten(1).clamp(min=0)[..., None, None].expand(-1, -1, *key.shape[2:])
    key, value = (x.gather(1, index).unflatten(1, (count, -1)) for x in (key, value))
    value = value.masked_fill(~exists.movedim(-1, 2)[..., None], 0)
    chunk_of_query = torch.arange(block, device=key.device)[:, None] // chunk_size
    chunk_of_entry = torch.arange(per_block * size, device=key.device) // size
    return query, key, value, exists & (chunk_of_query == chunk_of_entry)


def span_attention(spans, scale: float):
    """One softmax over the keys of several spans, each with its own queries.

    Args:
        spans: list of (query, key, value, visible). query (..., seq_len, num_heads, head_dim); key and value (...,
            keys, num_key_value_heads, head_dim); visible, a bool mask that broadcasts to (..., seq_len, keys). Every
            query must see at least one key of one span.
        scale: factor on the scores.

    Returns:
        (..., seq_len, num_heads, head_dim), in the dtype of the values. The softmax runs in float32 or wider.
    """
    num_heads, kv_heads = spans[0][0].shape[-2], spans[0][1].shape[-2]
    seq_len = spans[0][0].shape[-3]
    scores = []
    for query, key, _, visible in spans:
        query = query.unflatten(-2, (kv_heads, num_heads // kv_heads)).movedim(-4, -2)  # (..., kv, group, seq, d)
        score = (query.flatten(-3, -2) * scale) @ key.movedim(-3, -2).transpose(-1, -2)
        score = score.unflatten(-2, (-1, seq_len)).to(at_least_float32(score))
        scores.append(score.masked_fill(~visible[..., None, None, :, :], -torch.inf))
    sizes = [score.shape[-1] for score in scores]
    weights = torch.cat(scores, -1).softmax(-1).to(spans[0][2].dtype).flatten(-3, -2)
    mixed = 0
    for weight, (_, _, value, _) in zip(weights.split(sizes, -1), spans, strict=True):
        mixed = mixed + weight @ value.movedim(-3, -2)
    return mixed.unflatten(-2, (-1, seq_len)).movedim(-2, -4).flatten(-3, -2)


# ----------------------------------------------------------------------------------------------------------------------
# One token and the cache
# ----------------------------------------------------------------------------------------------------------------------


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
    """`memory_attention` for one token of each row, over the slots of the cache as they lie.

    Args:
        query: (rows, 1, num_heads, head_dim), rotated, times the scale of the scores.
        key, value: (rows, num_key_value_heads, slots, head_dim): of window, fading tokens and memory, in this order.
        mask: 0 for a slot that is seen, -inf for one that is not, (rows * num_key_value_heads or 1, 1, slots) in float32 or
            wider. Every token sees one.
        eidetic_query: as query, for the slots from `memory` on; None: they are none of their own.
        fading_query: as query, for the slots from `fading` to the memory; None: the query itself.
        eidetic_key: keys of the memory in place of those in the cache, (rows, eidetic_size, num_key_value_heads, head_dim).
        fading, memory: the first slot of either; needed with a query of its own.

    Returns:
        As query, in its dtype. The softmax runs in that of the mask.
    """
    rows, _, heads, head_dim = query.shape
    dtype = query.dtype
    if (
        query.is_cpu and query.element_size() == 2
    ):  # a CPU's products of few rows are slower in 16 bits than widening is
        query, eidetic_query, fading_query, eidetic_key = (
            x if x is None else x.to(mask.dtype) for x in (query, eidetic_query, fading_query, eidetic_key)
        )
    if key.dtype is not query.dtype:
        key, value = key.to(query.dtype), value.to(query.dtype)
    key, value, shape = key.flatten(0, 1), value.flatten(0, 1), (-1, heads // key.shape[1], head_dim)
    key = key.transpose(1, 2)
    if eidetic_query is None and fading_query is None:
        scores = torch.bmm(query.reshape(shape), key)
    else:  # a product of few queries with many keys for each: cheaper than one of all queries
        parts, near = [], key
        if eidetic_query is not None:
            near, last = key.tensor_split((memory,), 2)
            if eidetic_key is not None:
                last = eidetic_key.permute(0, 2, 3, 1).flatten(0, 1)
            parts = [torch.bmm(eidetic_query.reshape(shape), last)]
        if fading_query is not None:
            near, far = near.tensor_split((fading,), 2)
            parts.insert(0, torch.bmm(fading_query.reshape(shape), far))
        scores = torch.cat([torch.bmm(query.reshape(shape), near), *parts], -1)
    weights = as_dtype((scores + mask).softmax(-1), value.dtype)
    return as_dtype(torch.bmm(weights, value), dtype).view(rows, 1, heads, head_dim)


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
    """The eidetic memory in the cache after a chunk boundary: of what it held and the chunk that enters, the best.

    Args:
        key, value: (rows, num_key_value_heads, slots, head_dim): the first slots are the window's ring, rotated, the last
            eidetic_size those of the memory, not rotated.
        window_innovation: (rows, ring), of the tokens in the ring.
        eidetic_innovation, eidetic_position: (rows, eidetic_size), -inf and -1 where a place is empty.
        past: tokens before the one that begins a chunk, (rows,) int64.
        boundary: (rows, 1) bool; the memory of other rows stays as it is.
        cos, sin: the opposite rotation of the tokens that enter, (rows, chunk_size, ...), those at the positions from
            past + 1 - ring on; positions below 0 do not exist, and anything may stand there.
        in_place: key and value are overwritten.

    Returns:
        key, value, eidetic_innovation and eidetic_position after it.
    """
    ring, size = window_innovation.shape[1], eidetic_innovation.shape[1]
    start, heads, head_dim = key.shape[2] - size, key.shape[1], key.shape[3]
    positions = past[:, None] - ring + 1 + torch.arange(cos.shape[1], device=past.device)
    slots = positions % ring
    scores = window_innovation.gather(1, slots).masked_fill(~(boundary & (positions >= 0)), -torch.inf)
    scores = torch.cat([eidetic_innovation, scores], 1)
    index = select(scores, size)

    def take(x, index):
        return x.gather(2, index[:, None, :, None].expand(-1, heads, -1, head_dim))

    new = []
    for kept, entering in ((key, rotate(take(key, slots), cos[:, None], sin[:, None])), (value, take(value, slots))):
        tokens = take(torch.cat([kept[:, :, start:], entering], 2), index)
        if in_place:
            kept[:, :, start:] = tokens
        new.append(kept if in_place else torch.cat([kept[:, :, :start], tokens], 2))
    return *new, scores.gather(1, index), torch.cat([eidetic_position, positions], 1).gather(1, index)


def exchange_slots(a, b, a_slots, b_slots, boundary=None, in_place: bool = False):
    """Keys or values in two tensors after some of their slots have changed places.

    Args:
        a, b: (rows, num_key_value_heads, slots, head_dim), contiguous; the number of slots may differ.
        a_slots, b_slots: which with which, (rows, n) int64, none twice.
        boundary: (rows, 1) bool, the rows in which they do; None: in all.
        in_place: a and b are overwritten.

    Returns:
        a and b after it.
    """
    rows, heads, _, head_dim = a.shape
    count, pair = a_slots.shape[1], torch.arange(rows * heads, device=a.device).view(rows, heads, 1)
    a_slots, b_slots = ((x.shape[2] * pair + slots[:, None]).flatten() for x, slots in ((a, a_slots), (b, b_slots)))
    new = [x.view(-1, head_dim) for x in (a, b)]
    to_b, to_a = new[0].index_select(0, a_slots), new[1].index_select(0, b_slots)
    if boundary is not None:
        swap = boundary.repeat_interleave(heads * count, 0)
        to_b, to_a = torch.where(swap, to_b, to_a), torch.where(swap, to_a, to_b)
    for place, slots, tokens in ((0, a_slots, to_a), (1, b_slots, to_b)):
        new[place] = (new[place].index_copy_ if in_place else new[place].index_copy)(0, slots, tokens)
    return new[0].view_as(a), new[1].view_as(b)
