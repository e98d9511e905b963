"""The mathematics of B'MOJO in plain torch: scans, innovation, selection, rotary positions, attention over memories.

Every function here is a definition: pure, without parameters, differentiable where a gradient is meant to flow. Those
with a faster kernel in `kernels/` are dispatch points (see `kernels_bmojo.dispatch`).

Legend of the shapes: b batch, t time, h heads, p channels per head, n state, g groups, c chunks, l and s positions in a
chunk, w `sliding_window`, M `eidetic_size`.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .kernels_bmojo import dispatch


def at_least_float32(*tensors: torch.Tensor) -> torch.dtype:
    """The dtype in which states, errors and softmax are computed: float32, or float64 where an input is."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def no_autocast(x: torch.Tensor):
    """A context in which autocast does not turn float32 matrix products into bfloat16."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


# ----------------------------------------------------------------------------------------------------------------------
# Fading memory: the two scans
# ----------------------------------------------------------------------------------------------------------------------


@dispatch
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


@dispatch
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
            if torch.is_grad_enabled() and seq_len > block:
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


# ----------------------------------------------------------------------------------------------------------------------
# Rotary positions
# ----------------------------------------------------------------------------------------------------------------------


def rotary_table(positions, inv_freq, scaling: float, dtype):
    """Cos and sin, each (*positions.shape, head_dim), of positions of any size.

    Angles are formed in float64, so that a position of a billion costs no precision (in float32 neighbours err by 0.05
    radians at a million). Devices without float64 form them on the CPU.
    """
    device = positions.device
    if device.type == "mps":
        positions = positions.cpu()
    angles = positions.to(torch.float64)[..., None] * inv_freq.to(positions.device, torch.float64)
    angles = torch.cat([angles, angles], -1)
    return (angles.cos() * scaling).to(device, dtype), (angles.sin() * scaling).to(device, dtype)


def rotate(x, cos, sin):
    """Rotate x (..., heads, head_dim) by the table (..., head_dim); computed in float32 or wider, returned in x's dtype."""
    half = x.shape[-1] // 2
    wide = x.to(at_least_float32(x))
    turned = torch.cat([-wide[..., half:], wide[..., :half]], -1)
    return (wide * cos[..., None, :] + turned * sin[..., None, :]).to(x.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Attention over several memories
# ----------------------------------------------------------------------------------------------------------------------


def span_attention(spans, scale: float):
    """One softmax over the keys of several spans, each with its own queries (they differ in rotation only).

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
