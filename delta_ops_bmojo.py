"""Two recurrences that write by rule instead of adding up: Gated DeltaNet and Gated KalmaNet, in plain torch.

`delta_scan` and `kalman_scan` are definitions, one token after another. Their chunked forms, which `kernels_bmojo` runs in
their place on every device, take the same arguments and are linear in time; single tokens have forms with few operations.

Legend of the shapes: b batch, t time, h heads, d channels of a key, e of a value, c chunks, l and s positions in a chunk.
States are laid out (b, h, d, e), keys first.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .numerics_bmojo import at_least_float32, no_autocast


_CHUNKS = 8  # computed at once; in a longer sequence gradients recompute them block by block, which bounds memory


def _first_state(state, rows, columns, like, dtype):
    """The state in that dtype, zeros where None; rows and columns as `like` (batch, ..., heads, channels) has them."""
    if state is not None:
        return state.to(dtype)
    return like.new_zeros(like.shape[0], like.shape[-2], rows.shape[-1], columns.shape[-1], dtype=dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Gated DeltaNet
# ----------------------------------------------------------------------------------------------------------------------


def delta_scan(q, k, v, log_decay, beta, initial_state=None, chunk_size: int = 64):
    """Gated delta rule: S <- exp(g_t) S, then S <- S + k_t (beta_t (v_t - S^T k_t))^T; read y_t = S^T q_t.

    Args:
        q, k: queries and keys, (batch, seq_len, num_heads, key_dim); keys of a length of at most about 1.
        v: values, (batch, seq_len, num_heads, value_dim).
        log_decay: the g_t, (batch, seq_len, num_heads), none above 0.
        beta: (batch, seq_len, num_heads), 0 to 2. A token with beta 0 and log_decay 0 leaves the state as it is.
        initial_state: (batch, num_heads, key_dim, value_dim); zeros where None.
        chunk_size: tokens that the chunked form computes as one block.

    Returns:
        y as v and the last state, (batch, num_heads, key_dim, value_dim), both in float32 or wider.

    Source: Yang, Kautz and Hatamizadeh, arXiv 2412.06464, section 3.
    """
    dtype = at_least_float32(q, k, v, log_decay, beta)
    state = _first_state(initial_state, k, v, k, dtype)
    outputs = [torch.zeros_like(v[:, :0], dtype=dtype)]
    with no_autocast(q):
        for q_t, k_t, v_t, g_t, b_t in zip(*(x.to(dtype).unbind(1) for x in (q, k, v, log_decay, beta)), strict=True):
            y, state = delta_step(q_t, k_t, v_t, g_t, b_t, state)
            outputs.append(y[:, None])
    return torch.cat(outputs, 1), state


def delta_step(q, k, v, log_decay, beta, state, in_place: bool = False):
    """`delta_scan` for one token: q, k, v (batch, num_heads, channels), log_decay and beta (batch, num_heads).

    Returns y as v and the state, which in_place overwrites.
    """
    dtype = state.dtype
    q, k, v = (x.to(dtype) for x in (q, k, v))
    decay = log_decay.exp()[..., None, None]
    state = state.mul_(decay) if in_place else state * decay
    with no_autocast(q):
        change = (v - (k[..., None, :] @ state).squeeze(-2)) * beta[..., None]
        change, k = change[..., None, :], k[..., None]
        state = state.addcmul_(k, change) if in_place else torch.addcmul(state, k, change)
        return (q[..., None, :] @ state).squeeze(-2), state


def chunked_delta_scan(q, k, v, log_decay, beta, initial_state=None, chunk_size: int = 64):
    """See `delta_scan`: the changes of a chunk solve a triangular system, from chunk to chunk only states pass."""
    dtype = at_least_float32(q, k, v, log_decay, beta)
    state = _first_state(initial_state, k, v, k, dtype)
    y, (state,) = _run_blocks(_delta_block, (q, k, v, log_decay, beta), (state,), chunk_size, dtype)
    return y, state


def _delta_block(q, k, v, log_decay, beta, state):
    """Chunks (b, c, h, l, ...) and the state before them to the outputs and the state behind them.

    With the decay G_ls from s to l, a chunk's changes u_l = beta_l (v_l - G_l0 S^T k_l - sum_{s<l} G_ls (k_s . k_l) u_s)
    are those of a zero state, less what the state adds to them.
    """
    decay = _Decay(log_decay)
    below = (k @ k.transpose(-1, -2) * decay.between * beta[..., None]).tril(-1)
    wanted = torch.cat([v, k * decay.since_start], -1) * beta[..., None]
    solved = torch.linalg.solve_triangular(below, wanted, upper=False, unitriangular=True)
    alone, through_state = solved.split_with_sizes([v.shape[-1], k.shape[-1]], -1)
    scores, reading = q @ k.transpose(-1, -2) * decay.between, q * decay.since_start
    writing = (k * decay.to_end).transpose(-1, -2)
    outputs = []
    parts = (alone, through_state, scores, reading, writing, decay.through)
    for base, taken, score, query, key, through in zip(*(part.unbind(1) for part in parts), strict=True):
        change = base - taken @ state
        outputs.append(query @ state + score @ change)
        state = through * state + key @ change
    return torch.stack(outputs, 1), state


# ----------------------------------------------------------------------------------------------------------------------
# Gated KalmaNet
# ----------------------------------------------------------------------------------------------------------------------


def kalman_scan(
    q,
    k,
    v,
    log_decay,
    log_decay_kk,
    alpha,
    initial_state=None,
    initial_kk=None,
    chunk_size: int = 64,
    *,
    ridge_strength: float,
    num_iter: int,
    bp_lambda: bool = True,
):
    """Gated KalmaNet: a memory S of keys and values, read by the query that ridge regression on all keys P would use.

    P_t = exp(g'_t) P_{t-1} + k_t k_t^T, x_t = (P_t + l_t I)^-1 q_t with l_t = ridge_strength |P_t| (Frobenius norm),
    S_t = exp(g_t) S_{t-1} + k_t v_t^T, y_t = S_t^T (q_t + alpha_t (x_t - q_t)).

    x_t is what exactly num_iter steps of Chebyshev's iteration give, for eigenvalues in [l, l + |P|]. Its gradient is that
    of the exact solution (implicit function theorem), found by the same iteration; there is no second derivative.

    Args:
        q, k: queries and keys, (batch, seq_len, num_heads, key_dim).
        v: values, (batch, seq_len, num_heads, value_dim).
        log_decay, log_decay_kk: g and g' of S and P, (batch, seq_len, num_heads), none above 0. A token whose key and
            decays are 0 leaves the states as they are.
        alpha: how far to go from q to x, (batch, seq_len, num_heads).
        initial_state, initial_kk: S_0 (batch, num_heads, key_dim, value_dim) and P_0 (batch, num_heads, key_dim, key_dim),
            symmetric; zeros where None.
        chunk_size: tokens that the chunked form computes as one block.
        ridge_strength: above 0.
        num_iter: 0 leaves the query as it is.
        bp_lambda: whether the gradient goes through l_t, too.

    Returns:
        y as v, S and P after the last token, all in float32 or wider. x_t is 0 where P_t is.

    Source: the authors' hybrid-model-factory, as shared/formats/hmf_checkpoint.md states its mathematics.
    """
    dtype = at_least_float32(q, k, v, log_decay, log_decay_kk, alpha)
    state, kk = _first_state(initial_state, k, v, k, dtype), _first_state(initial_kk, k, k, k, dtype)
    inputs = (x.to(dtype).unbind(1) for x in (q, k, v, log_decay, log_decay_kk, alpha))
    outputs = [torch.zeros_like(v[:, :0], dtype=dtype)]
    options = {"ridge_strength": ridge_strength, "num_iter": num_iter, "bp_lambda": bp_lambda}
    with no_autocast(q):
        for tokens in zip(*inputs, strict=True):
            y, state, kk = kalman_step(*tokens, state, kk, **options)
            outputs.append(y[:, None])
    return torch.cat(outputs, 1), state, kk


def kalman_step(
    q,
    k,
    v,
    log_decay,
    log_decay_kk,
    alpha,
    state,
    kk,
    in_place: bool = False,
    *,
    ridge_strength: float,
    num_iter: int,
    bp_lambda: bool = True,
):
    """`kalman_scan` for one token: q, k, v (batch, num_heads, channels), the others (batch, num_heads).

    Returns y as v and both states, which in_place overwrites.
    """
    dtype = state.dtype
    q, k, v = (x.to(dtype) for x in (q, k, v))
    column = k[..., None]
    decay, decay_kk = log_decay.exp()[..., None, None], log_decay_kk.exp()[..., None, None]
    if in_place:
        state.mul_(decay).addcmul_(column, v[..., None, :])
        kk.mul_(decay_kk).addcmul_(column, k[..., None, :])
    else:
        state = torch.addcmul(state * decay, column, v[..., None, :])
        kk = torch.addcmul(kk * decay_kk, column, k[..., None, :])
    with no_autocast(q):
        if num_iter:
            system = _RidgeSystem(kk.square().sum((-1, -2)), ridge_strength, bp_lambda)
            # rows times matrices: on a CPU thrice as fast as matrices times columns
            scaled = (kk * system.scale[..., None]).transpose(-1, -2).flatten(0, 1)
            target, ridge = (x.flatten(0, 1)[:, None] for x in (q * system.scale, system.ridge))
            solution = _solve(torch.bmm, system.centre, num_iter, target, ridge, scaled).view(q.shape)
            q = q + alpha[..., None] * (solution - q)
        return (q[..., None, :] @ state).squeeze(-2), state, kk


def chunked_kalman_scan(
    q,
    k,
    v,
    log_decay,
    log_decay_kk,
    alpha,
    initial_state=None,
    initial_kk=None,
    chunk_size: int = 64,
    *,
    ridge_strength: float,
    num_iter: int,
    bp_lambda: bool = True,
):
    """See `kalman_scan`: P_t x is what linear attention over the keys gives, so that no P_t of a token is ever formed."""
    dtype = at_least_float32(q, k, v, log_decay, log_decay_kk, alpha)
    states = _first_state(initial_state, k, v, k, dtype), _first_state(initial_kk, k, k, k, dtype)
    options = {"ridge_strength": ridge_strength, "num_iter": num_iter, "bp_lambda": bp_lambda}
    tokens = q, k, v, log_decay, log_decay_kk, alpha
    y, states = _run_blocks(partial(_kalman_block, **options), tokens, states, chunk_size, dtype)
    return y, *states


def _kalman_block(q, k, v, log_decay, log_decay_kk, alpha, state, kk, *, ridge_strength, num_iter, bp_lambda):
    """Chunks (b, c, h, l, ...) and the states before them to the outputs and the states behind them."""
    decay = _Decay(log_decay)
    starts, state = _chunk_starts(k * decay.to_end, v, decay.through, state)
    decay_kk = decay if log_decay_kk is log_decay else _Decay(log_decay_kk)
    starts_kk, kk = _chunk_starts(k * decay_kk.to_end, k, decay_kk.through, kk)
    products = k @ k.transpose(-1, -2)
    if num_iter:
        # |P_t|^2 = sum_{s<=t} G_ts^2 (2 k_s^T P_s k_s - |k_s|^4), and what is left of |P_0|^2
        seen = (products.square() * decay_kk.between).sum(-1, keepdim=True)
        seen = torch.addcmul(seen, (k @ starts_kk * k).sum(-1, keepdim=True), decay_kk.since_start)
        added = 2 * seen - k.square().sum(-1, keepdim=True).square()
        squared = decay_kk.between.square() @ added
        begun = starts_kk.square().sum((-1, -2))[..., None, None]
        squared = torch.addcmul(squared, begun, decay_kk.since_start.square()).squeeze(-1)
        system = _RidgeSystem(squared, ridge_strength, bp_lambda)
        operator = (k, decay_kk.between * system.scale, decay_kk.since_start * system.scale, starts_kk)
        solution = _solve(_chunk_product, system.centre, num_iter, q * system.scale, system.ridge, *operator)
        q = q + alpha[..., None] * (solution - q)
    y = (q @ k.transpose(-1, -2) * decay.between) @ v
    return torch.addcmul(y, q @ starts, decay.since_start), state, kk


class _RidgeSystem:
    """The system (P + l I) x = q of every token, scaled so that its eigenvalues lie around 1.

    Attributes:
        scale: 2 / (2 l + |P|), (..., 1), without a gradient, which would be one of the residual; 0 where P is.
        ridge: scale l, (..., 1).
        centre: 1 - scale l where P is not 0, half the width of the scaled eigenvalues' range.
    """

    def __init__(self, squared_norm, ridge_strength: float, bp_lambda: bool):
        smallest = 100 * torch.finfo(squared_norm.dtype).tiny
        norm = squared_norm.clamp_min(smallest).sqrt()[..., None]  # a root of 0 would have no gradient
        self.centre = 1 / (2 * ridge_strength + 1)
        filled = (squared_norm > smallest)[..., None]
        self.scale = (2 * self.centre / norm.detach()).masked_fill(~filled, 0)
        self.ridge = ridge_strength * (norm if bp_lambda else norm.detach()) * self.scale


def _chunk_product(x, k, between, since_start, start):
    """For every token of a chunk its own P_t times x_t: all arguments (..., l, channels), start (..., d, d)."""
    inside = (x @ k.transpose(-1, -2) * between) @ k
    return torch.addcmul(inside, x @ start.transpose(-1, -2), since_start)


def _solve(product, centre: float, num_iter: int, target, ridge, *operator):
    """What num_iter steps make of product(x, *operator) + ridge x = target, differentiable as if it were the solution."""
    with torch.no_grad():
        x, previous, omega = target, None, 2.0
        for _ in range(num_iter):
            omega = 1 / (1 - (centre / 2) ** 2 * omega)
            following = product(x, *operator).mul_(-omega).add_(target, alpha=omega).add_(x, alpha=omega * centre)
            if previous is not None:
                following = following.sub_(previous, alpha=omega - 1)
            x, previous = following, x
    if not torch.is_grad_enabled():
        return x
    residual = target - product(x, *operator) - ridge * x
    return _Solution.apply(residual, x, partial(_solve, product, centre, num_iter), ridge, *operator)


class _Solution(torch.autograd.Function):
    """The solution as a function of its residual: an error in what is solved for moves it by the solution for that error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(residual, x, solve, *operator):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, ctx.solve, *operator = inputs
        ctx.save_for_backward(*operator)

    @staticmethod
    def backward(ctx, grad):
        operator = ctx.saved_tensors  # once: checkpointing computes them again at every reading
        with torch.no_grad():
            found = ctx.solve(grad, *operator)
        if torch.is_grad_enabled():
            found = _NoSecondDerivative.apply(found, grad, *operator)
        return found, None, None, *[None] * len(operator)


class _NoSecondDerivative(torch.autograd.Function):
    """An error when differentiated: the residual of `_Solution` knows nothing of how x itself depends on the inputs.

    PyTorch's `once_differentiable` hangs its error on a leaf of its own, which is left out where `inputs` are named.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(found, *inputs):
        return found.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(
            "Gated KalmaNet has no second derivative; differentiate its first one by finite differences."
        )


# ----------------------------------------------------------------------------------------------------------------------
# Chunks
# ----------------------------------------------------------------------------------------------------------------------


class _Decay:
    """Decays inside chunks, from logarithms (b, c, h, l).

    Attributes:
        between: from token s to token l, 0 where s > l, (b, c, h, l, s).
        since_start, to_end: from the chunk's start to a token, and from it to the chunk's end, (b, c, h, l, 1).
        through: over the whole chunk, (b, c, h, 1, 1).
    """

    def __init__(self, log_decay):
        total = log_decay.cumsum(-1)
        later = torch.ones(2 * total.shape[-1:], dtype=torch.bool, device=total.device).triu(1)
        gap = total[..., :, None] - total[..., None, :]
        self.between = gap.masked_fill(later, -torch.inf).exp()  # masked before exp: of a large future gap it is inf
        self.since_start = total.exp()[..., None]
        self.to_end = (total[..., -1:] - total).exp()[..., None]
        self.through = self.since_start[..., -1:, :]


def _chunk_starts(k, v, through, state):
    """The states at the starts of all chunks, (b, c, h, d, e), and the last: k (decayed to the chunks' ends), v (b, c, h, l, ...)."""
    starts = []
    for added, kept in zip((k.transpose(-1, -2) @ v).unbind(1), through.unbind(1), strict=True):
        starts.append(state)
        state = kept * state + added
    return torch.stack(starts, 1), state


def _run_blocks(compute, tokens, states, chunk_size: int, dtype):
    """Run `compute` on blocks of a few chunks, one after another.

    Args:
        compute: from tensors (b, c, h, l, ...) and states to outputs (b, c, h, l, e) and states.
        tokens: its tensors, (b, t, h, ...). Zeros fill up the last chunk.
        states: before the first token.
        chunk_size, dtype: of the computation.

    Returns:
        Outputs (b, t, h, e), and the states as a tuple.
    """
    seq_len = tokens[0].shape[1]
    chunk_size = max(1, min(chunk_size, seq_len))
    length = _CHUNKS * chunk_size
    bounded = torch.is_grad_enabled() and seq_len > length and not torch._C._are_functorch_transforms_active()
    outputs = [torch.zeros_like(tokens[2][:, :0], dtype=dtype)]
    shared = {id(x): number for number, x in enumerate(tokens)}  # the same decays twice are cut once

    def run(*inputs):
        count = len(tokens)
        chunks = [_in_chunks(x, chunk_size, dtype) for x in inputs[:count]]
        return compute(*(chunks[shared[id(x)]] for x in tokens), *inputs[count:])

    with no_autocast(tokens[0]):
        for parts in zip(*(x.split(length, 1) for x in tokens), strict=True) if seq_len else ():
            if bounded:
                y, *states = checkpoint(run, *parts, *states, use_reentrant=False, preserve_rng_state=False)
            else:
                y, *states = run(*parts, *states)
            outputs.append(y.transpose(2, 3).flatten(1, 2)[:, : parts[0].shape[1]])
    return torch.cat(outputs, 1), tuple(states)


def _in_chunks(x, chunk_size: int, dtype):
    """(b, t, h, ...) to contiguous (b, c, h, l, ...), zeros behind its end."""
    x = F.pad(x.to(dtype), (0, 0) * (x.dim() - 2) + (0, -x.shape[1] % chunk_size))
    return x.unflatten(1, (-1, chunk_size)).transpose(2, 3).contiguous()
