"""The B'MOJO language model, token by token in float64, straight from section 1 of DESIGN.

Slow on purpose: every loop over time is a Python loop, nothing is chunked, padded, cached or batched, and no file of the
implementation is read. What the model computes is defined here; the tests compare every faster path against it.
Operations are out of place, so gradients flow to whatever tensors of `state_dict` require them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN


Weights = dict[str, Tensor]


@dataclass
class Reference:
    """What the reference computes for one sequence of T tokens.

    Attributes:
        logits: (T, vocab_size).
        hidden: final normed states, (T, hidden_size).
        hidden_states: the embeddings and every layer's output before the final norm, num_layers + 1 of (T, hidden_size).
        innovations: per layer the T scores that the memory is chosen by; None where the layer is no bmojo layer.
        memory: per layer, for every t, the ascending positions of M_{t//c}; None where the layer is no bmojo layer.
        innovation_loss: what the learnable predictors add to the loss, with gradients to their weights only; 0 for the others.
    """

    logits: Tensor
    hidden: Tensor
    hidden_states: list[Tensor] = field(default_factory=list)
    innovations: list[list[float] | None] = field(default_factory=list)
    memory: list[list[list[int]] | None] = field(default_factory=list)
    innovation_loss: Tensor | float = 0.0


def reference_forward(
    config: Any,
    state_dict: Weights,
    input_ids: Tensor | list[int],
    random_scores: Callable[[int, int], list[float]] | None = None,
) -> Reference:
    """Run a B'MOJO language model over one unpadded sequence.

    Args:
        config: anything with BMojoConfig's attributes, derived ones filled in.
        state_dict: of a BMojoForCausalLM, in any dtype and on any device.
        input_ids: (T,), T at least 1.
        random_scores: `random_scores(layer_idx, T)` gives the T scores of the predictor "random", whose hash is the
            implementation's own choice.
    """
    if config.rope_parameters.get("rope_type", "default") != "default":
        raise ValueError(f"The reference has only default rotary embeddings, got {config.rope_parameters}.")
    weights = {name: tensor.to("cpu", torch.float64) for name, tensor in state_dict.items()}
    embeddings = weights["model.embed_tokens.weight"]
    x = embeddings[torch.as_tensor(input_ids, dtype=torch.long).cpu()] * config.embedding_multiplier

    result = Reference(logits=x, hidden=x, hidden_states=[x])
    for layer_idx, layer_type in enumerate(config.layers_block_type):
        layer = under(weights, f"model.layers.{layer_idx}.")
        u = block_norm(config, under(layer, "input_layernorm."), x)
        x = x + mix(config, layer_idx, layer_type, under(layer, "mixer."), u, random_scores, result)
        if config.intermediate_size is not None:
            u = block_norm(config, under(layer, "post_attention_layernorm."), x)
            x = x + swiglu(config, under(layer, "mlp."), u)
        result.hidden_states.append(x)

    result.hidden = block_norm(config, under(weights, "model.norm."), x)
    head = embeddings if config.tie_word_embeddings else weights["lm_head.weight"]
    result.logits = result.hidden @ head.T * config.lm_head_multiplier
    return result


def mix(
    config, layer_idx: int, layer_type: str, weights: Weights, u: Tensor, random_scores, result: Reference
) -> Tensor:
    """The mixer of any layer type, (T, hidden_size) to the same; writes down what a bmojo layer chose in `result`."""
    innovations = memory = None
    if layer_type == "bmojo":
        out, innovations, memory, prediction_loss = bmojo_mixer(config, layer_idx, weights, u, random_scores)
        result.innovation_loss = result.innovation_loss + prediction_loss
    elif layer_type == "bmojo_f":
        out = bmojo_mixer(config, layer_idx, weights, u, random_scores, remembers=False)[0]
    elif layer_type == "full_attention":
        out = attention_mixer(config, weights, u, window=len(u))
    elif layer_type == "sliding_attention":
        out = attention_mixer(config, weights, u, window=config.sliding_window)
    elif layer_type == "hybrid":
        attended = attention_mixer(config, weights, config.attention_in_multiplier * u, window=len(u))
        remembered = ssm(config, config.ssm_type, under(weights, "ssm."), config.ssm_in_multiplier * u)
        out = config.attention_out_multiplier * attended + config.ssm_out_multiplier * remembered
    elif layer_type in ("mamba", "mamba2", "gated_deltanet", "gated_kalmanet"):
        out = ssm(config, layer_type, weights, u)
    else:
        raise ValueError(f"Unknown layer type {layer_type!r} in layers_block_type.")
    result.innovations.append(innovations)
    result.memory.append(memory)
    return out


# ---------------------------------------------------------------------------------------------------- small parts


def under(weights: Weights, prefix: str) -> Weights:
    """The weights below `prefix`, their names without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    out = x @ weights[f"{name}.weight"].T
    return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def block_norm(config, weights: Weights, x: Tensor) -> Tensor:
    if config.rms_norm:
        return rms_norm(x, weights["weight"], config.rms_norm_eps)
    centred = x - x.mean(-1, keepdim=True)
    return rms_norm(centred, weights["weight"], config.rms_norm_eps) + weights["bias"]


def swiglu(config, weights: Weights, x: Tensor) -> Tensor:
    gate_factor, factor = config.mlp_multipliers or (1.0, 1.0)
    gate = ACT2FN[config.hidden_act](gate_factor * linear(weights, "gate_proj", x))
    return factor * linear(weights, "down_proj", gate * linear(weights, "up_proj", x))


def rotate(config, x: Tensor, position: int) -> Tensor:
    """Rotary embedding of the heads of one token, (heads, head_dim): dimension m turns with dimension m + rotary_dim/2.

    Or 2m with 2m + 1 under rope_interleave. Dimensions from rotary_dim on stay as they are.
    """
    if config.position_embedding_type == "nope":
        return x
    rotary_dim = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
    turned = x.clone()
    for m in range(rotary_dim // 2):
        angle = position * config.rope_parameters["rope_theta"] ** (-2.0 * m / rotary_dim)
        i, j = (2 * m, 2 * m + 1) if config.rope_interleave else (m, m + rotary_dim // 2)
        turned[:, i] = x[:, i] * math.cos(angle) - x[:, j] * math.sin(angle)
        turned[:, j] = x[:, j] * math.cos(angle) + x[:, i] * math.sin(angle)
    return turned


# ---------------------------------------------------------------------------------------------------- attention


def queries_of(config, weights: Weights, u: Tensor, prefix: str = "") -> Tensor:
    """(T, num_attention_heads, head_dim), not yet rotated; `prefix` "fading_" for those that read fading keys."""
    query = projected(config, weights, u, query_prefix=prefix)[0].view(
        len(u), config.num_attention_heads, config.head_dim
    )
    return rms_norm(query, weights[f"{prefix}q_norm.weight"], config.rms_norm_eps) if config.use_qk_norm else query


def projected(config, weights: Weights, u: Tensor, prefix: str = "", query_prefix: str = "") -> tuple[Tensor, ...]:
    """Queries, keys and values of all heads side by side, after the convolution where there is one."""
    names = (f"{query_prefix}q_proj", f"{prefix}k_proj", f"{prefix}v_proj")
    parts = [linear(weights, name, u) for name in names]
    if not config.attention_conv_kernel:
        return tuple(parts)
    return short_conv(weights, torch.cat(parts, -1)).split([part.shape[-1] for part in parts], dim=-1)


def keys_and_values_of(config, weights: Weights, u: Tensor, prefix: str = "") -> tuple[Tensor, Tensor]:
    """Both (T, num_key_value_heads, head_dim), not yet rotated; `prefix` "fading_" takes the fading tokens' own projections."""
    _, key, value = projected(config, weights, u, prefix)
    key = key.view(len(u), config.num_key_value_heads, config.head_dim)
    value = value.view(len(u), config.num_key_value_heads, config.head_dim)
    if config.use_qk_norm:
        norm = f"{prefix}k_norm.weight" if config.fading_query else "k_norm.weight"
        key = rms_norm(key, weights[norm], config.rms_norm_eps)
    return config.key_multiplier * key, value


def attend(config, t: int, attended: list[tuple[Tensor, Tensor, Tensor, int]]) -> Tensor:
    """Answer token t with one softmax over all `attended` tokens, (num_attention_heads * head_dim,).

    Each of them is a query (num_attention_heads, head_dim), a key and a value (num_key_value_heads, head_dim), and the
    position at which the key is rotated.
    """
    queries = torch.stack([rotate(config, query, t) for query, _, _, _ in attended])
    keys = torch.stack([rotate(config, key, position) for _, key, _, position in attended])
    values = torch.stack([value for _, _, value, _ in attended])
    heads_per_group = config.num_attention_heads // config.num_key_value_heads
    scale = config.head_dim**-0.5 if config.softmax_scale is None else config.softmax_scale
    out = []
    for head in range(config.num_attention_heads):
        group = head // heads_per_group
        scores = (keys[:, group] * queries[:, head]).sum(-1) * scale
        out.append(scores.softmax(0) @ values[:, group])
    return torch.cat(out)


def attention_mixer(config, weights: Weights, u: Tensor, window: int) -> Tensor:
    """Causal attention over the last `window` tokens, the query's own included."""
    query = queries_of(config, weights, u)
    key, value = keys_and_values_of(config, weights, u)
    out = []
    for t in range(len(u)):
        attended = [(query[t], key[j], value[j], j) for j in range(t + 1) if j > t - window]
        out.append(attend(config, t, attended))
    return linear(weights, "o_proj", torch.stack(out))


def bmojo_mixer(config, layer_idx: int, weights: Weights, u: Tensor, random_scores, remembers: bool = True):
    """Fading, innovation, selection, and one softmax over three spans; two where it does not remember.

    Returns:
        The output (T, hidden_size), the innovations, the memory of every t, and the prediction loss.
    """
    w = config.sliding_window
    y = ssm(config, config.ssm_type, under(weights, "fading."), u)
    signal = {"ssm_output": y, "layer_input": u}[config.innovation_signal]
    innovations, prediction_loss = None, None
    if remembers:
        innovations, prediction_loss = innovations_of(config, layer_idx, weights, signal, random_scores)

    query = queries_of(config, weights, u)
    fading_query = queries_of(config, weights, u, "fading_") if config.fading_query else query
    key, value = keys_and_values_of(config, weights, u)
    fading_key, fading_value = keys_and_values_of(config, weights, y, "" if config.tie_attn_weights else "fading_")

    out, memory = [], []
    for t in range(len(u)):
        chosen = select(config, t // config.eidetic_chunk_size, innovations) if remembers else []
        q, fading_q = query[t], fading_query[t]
        in_window = [(q, key[j], value[j], j) for j in range(t + 1) if t - w < j <= t]
        fading = [(fading_q, fading_key[j], fading_value[j], j) for j in range(t + 1) if t - 2 * w < j <= t - w]
        eidetic = [(q, key[j], value[j], t - eidetic_distance(config, j, chosen)) for j in chosen]
        out.append(attend(config, t, in_window + fading + eidetic))
        memory.append(chosen)
    return linear(weights, "o_proj", torch.stack(out)), innovations, memory, prediction_loss


def select(config, chunk: int, innovations: list[float]) -> list[int]:
    """M_b, ascending: the eidetic_size most innovative of all tokens that the window of the chunk's first query left."""

    def rank(j: int) -> tuple[bool, float, int]:
        error = innovations[j]
        if config.innovation_half_life is not None and config.innovation_predictor not in ("recent", "oldest"):
            error *= 0.5 ** ((chunk * config.eidetic_chunk_size - j) / config.innovation_half_life)
        return math.isnan(error), 0.0 if math.isnan(error) else -error, j  # NaN last; in a tie the earlier token first

    newest = chunk * config.eidetic_chunk_size - config.sliding_window
    return sorted(sorted(range(newest + 1), key=rank)[: config.eidetic_size])


def eidetic_distance(config, position: int, chosen: list[int]) -> int:
    """How far behind the query the key of an eidetic token is rotated."""
    if config.eidetic_position == "constant":
        return 2 * config.sliding_window
    if config.eidetic_position == "rank":
        return 2 * config.sliding_window + len([j for j in chosen if j >= position])  # the newest is the first
    raise ValueError(f"Unknown eidetic_position {config.eidetic_position!r}.")


# ---------------------------------------------------------------------------------------------------- innovation


def innovations_of(
    config, layer_idx: int, weights: Weights, y: Tensor, random_scores
) -> tuple[list[float], Tensor | float]:
    """The scores that the memory is chosen by, and the predictor's own loss (0 where nothing is learned)."""
    seq_len = len(y)
    kind = config.innovation_predictor
    if kind == "recent":
        return [float(t) for t in range(seq_len)], 0.0
    if kind == "oldest":
        return [0.0] * seq_len, 0.0
    if kind == "random":
        if random_scores is None:
            raise ValueError(
                "innovation_predictor 'random' needs random_scores(layer_idx, T), the implementation's hash."
            )
        scores = [float(score) for score in random_scores(layer_idx, seq_len)]
        assert len(scores) == seq_len, f"random_scores gave {len(scores)} scores for {seq_len} tokens."
        return scores, 0.0
    y = y.detach()  # no gradient flows through the choice, and the predictor's loss trains the predictor alone
    errors = [(y[t] - predict(config, weights, y, t)).square().sum() for t in range(seq_len)]
    loss = config.innovation_loss_coef * sum(errors) / seq_len if kind == "learnable" else 0.0
    return [error.item() for error in errors], loss


def predict(config, weights: Weights, y: Tensor, t: int) -> Tensor:
    """The prediction of y_t from those of the last innovation_kernel outputs that exist; 0 for the first token."""
    kernel = config.innovation_kernel
    past = [k for k in range(1, kernel + 1) if t - k >= 0]  # y_{t-k}, from the newest back
    prediction = torch.zeros_like(y[t])
    for k in past:
        if config.innovation_predictor == "average":
            weight = 1 / len(past)
        elif config.innovation_predictor == "exponential":
            decay = 1 - 2 / (kernel + 1)  # k - 1 and not k: equal once normalised, and defined for innovation_kernel 1
            weight = decay ** (k - 1) / sum(decay ** (i - 1) for i in past)
        elif config.innovation_predictor == "learnable":
            weight = weights["predictor.weight"][k - 1] * (kernel / len(past))
        else:
            raise ValueError(f"Unknown innovation_predictor {config.innovation_predictor!r}.")
        prediction = prediction + weight * y[t - k]
    return prediction


# ---------------------------------------------------------------------------------------------------- fading memory


def ssm(config, ssm_type: str, weights: Weights, u: Tensor) -> Tensor:
    """A complete SSM mixer, (T, hidden_size) to the same."""
    kinds = {"mamba": mamba, "mamba2": mamba2, "gated_deltanet": gated_deltanet, "gated_kalmanet": gated_kalmanet}
    return kinds[ssm_type](config, weights, u)


def short_conv(weights: Weights, x: Tensor) -> Tensor:
    """Depthwise convolution of every channel with its own past, zeros before the start; (T, channels)."""
    kernel = weights["conv1d.weight"][:, 0]  # (channels, conv_kernel), the last column for the current token
    width = kernel.shape[1]
    out = []
    for t in range(len(x)):
        total = torch.zeros_like(x[t])
        for back in range(min(width, t + 1)):
            total = total + kernel[:, width - 1 - back] * x[t - back]
        out.append(total + weights["conv1d.bias"] if "conv1d.bias" in weights else total)
    return torch.stack(out)


def causal_conv(config, weights: Weights, x: Tensor) -> Tensor:
    """An SSM's convolution with its activation; (T, channels)."""
    return ACT2FN[config.mamba_hidden_act](short_conv(weights, x))


def step_size(config, weights: Weights, dt: Tensor) -> Tensor:
    low, high = config.time_step_limit or (0.0, math.inf)
    return F.softplus(dt + weights["dynamics.dt_bias"]).clamp(low, high)


def mixer_norm(config, weights: Weights, name: str, x: Tensor) -> Tensor:
    """The norm inside a mixer: over the last axis, with a weight that the heads share or with none."""
    if config.mixer_norm is None:
        return x
    return rms_norm(x, weights[f"{name}.weight"] if config.mixer_norm == "learned" else 1.0, config.mixer_rms_eps)


def mamba2(config, weights: Weights, u: Tensor) -> Tensor:
    """SSD: one scalar decay per head, state (head_dim, state_size) per head; beside it an MLP where mamba_d_mlp says so."""
    heads, head_dim, groups, n = config.mamba_num_heads, config.mamba_head_dim, config.n_groups, config.state_size
    d_inner, d_mlp = heads * head_dim, config.mamba_d_mlp
    x_heads, B_heads = (config.mamba_num_key_value_heads,) * 2 if config.mamba_num_key_value_heads else (heads, groups)
    sizes = [d_mlp, d_mlp, d_inner, x_heads * head_dim, B_heads * n, groups * n, heads]
    z0, x0, *parts = linear(weights, "in_proj", u).split(sizes, dim=-1)
    z, x, B, C, dt = (part * by for part, by in zip(parts, config.ssm_multipliers or [1.0] * 5, strict=True))

    B = mixer_norm(config, weights, "B_norm", B.view(len(u), B_heads, n))
    C = mixer_norm(config, weights, "C_norm", C.view(len(u), groups, n))
    if config.mamba_use_pos_emb:
        B, C = (torch.stack([rotate(config, vectors[t], t) for t in range(len(u))]) for vectors in (B, C))
    x, B, C = causal_conv(config, weights, torch.cat([x, B.flatten(1), C.flatten(1)], dim=-1)).split(
        sizes[3:6], dim=-1
    )
    x, B, C = x.view(len(u), x_heads, head_dim), B.view(len(u), B_heads, n), C.view(len(u), groups, n)
    dt = step_size(config, weights, dt)
    A, D = -torch.exp(weights["dynamics.A_log"]), weights["dynamics.D"].view(heads, -1)

    state = [torch.zeros(head_dim, n, dtype=u.dtype) for _ in range(heads)]
    out = []
    for t in range(len(u)):
        y_t = []
        for h in range(heads):
            x_h, B_h, C_h = x[t, h * x_heads // heads], B[t, h * B_heads // heads], C[t, h * groups // heads]
            state[h] = torch.exp(A[h] * dt[t, h]) * state[h] + dt[t, h] * torch.outer(x_h, B_h)
            y_t.append(state[h] @ C_h + D[h] * x_h)
        y_t = gated(config, weights, torch.cat(y_t), z[t])
        out.append(torch.cat([F.silu(z0[t]) * x0[t], y_t]))
    return linear(weights, "out_proj", torch.stack(out))


def gated(config, weights: Weights, y: Tensor, z: Tensor) -> Tensor:
    """Gate and norm of the output of one token, (d_inner,): the norm within each group of channels."""
    if not config.mamba_rms_norm:
        return y * F.silu(z)
    y = y if config.mamba_norm_before_gate else y * F.silu(z)
    eps = config.mamba_norm_eps or config.rms_norm_eps
    y = torch.cat([rms_norm(group, 1.0, eps) for group in y.chunk(config.n_groups)]) * weights["norm.weight"]
    return y * F.silu(z) if config.mamba_norm_before_gate else y


def mamba(config, weights: Weights, u: Tensor) -> Tensor:
    """S6: a diagonal decay per channel, state (d_inner, state_size)."""
    d_inner, n = config.mamba_intermediate_size or config.expand * config.hidden_size, config.state_size
    x, z = linear(weights, "in_proj", u).split([d_inner, d_inner], dim=-1)
    x = causal_conv(config, weights, x)
    dt_low, B, C = linear(weights, "x_proj", x).split([config.time_step_rank, n, n], dim=-1)
    dt_low, B, C = (
        mixer_norm(config, weights, name, part) for name, part in (("dt_norm", dt_low), ("B_norm", B), ("C_norm", C))
    )
    dt = step_size(config, weights, linear(weights, "dt_proj", dt_low))
    A, D = -torch.exp(weights["dynamics.A_log"]), weights["dynamics.D"]

    state = torch.zeros(d_inner, n, dtype=u.dtype)
    out = []
    for t in range(len(u)):
        state = torch.exp(A * dt[t, :, None]) * state + torch.outer(dt[t] * x[t], B[t])
        out.append((state @ C[t] + D * x[t]) * F.silu(z[t]))
    return linear(weights, "out_proj", torch.stack(out))


def delta_parts(config, weights: Weights, u: Tensor, more: int) -> tuple[Tensor, ...]:
    """Queries, keys and values by head, (T, heads, head_dim), the gate, the logarithm of the decay, and the rest of in_proj."""
    heads, kv_heads, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    sizes = [heads * d, kv_heads * d, kv_heads * d, heads * d if config.use_gate else 0, heads, more]
    *qkv, gate, dt, rest = linear(weights, "in_proj", u).split(sizes, dim=-1)
    if not config.use_short_conv:
        qkv = [ACT2FN[config.mamba_hidden_act](x) for x in qkv]
    elif config.use_v_conv:
        qkv = causal_conv(config, weights, torch.cat(qkv, -1)).split(sizes[:3], dim=-1)
    else:
        qkv = [*causal_conv(config, weights, torch.cat(qkv[:2], -1)).split(sizes[:2], dim=-1), qkv[2]]
    q = qkv[0].view(len(u), heads, d)
    keys_and_values = []
    for name, x in zip(("expand_k.", "expand_v."), qkv[1:], strict=True):
        by_head = x.view(len(u), kv_heads, d)
        expanded = torch.stack([by_head[:, h // (heads // kv_heads)] for h in range(heads)], 1)
        if config.kv_proj_rank is not None and heads > kv_heads:
            own = under(weights, name)
            if config.kv_learnable_residual:
                expanded = torch.einsum("hk,tkd->thd", own["mixture"], by_head)
            added = linear(own, "up_proj", F.silu(linear(own, "down_proj", x)))
            expanded = expanded + added.view(len(u), heads, d)
        keys_and_values.append(expanded)
    log_decay = -weights["dynamics.A_log"].exp() * F.softplus(dt + weights["dynamics.dt_bias"])
    return q, *keys_and_values, gate, log_decay, rest


def delta_output(config, weights: Weights, out: list[Tensor], gate: Tensor) -> Tensor:
    """Norm per head, then the gate."""
    y = rms_norm(torch.stack(out), weights["norm.weight"], config.mamba_norm_eps or config.rms_norm_eps).flatten(1)
    return linear(weights, "out_proj", y * F.silu(gate) if config.use_gate else y)


def gated_deltanet(config, weights: Weights, u: Tensor) -> Tensor:
    """A delta rule with decay, state (head_dim, head_dim) per head."""
    heads, d = config.num_attention_heads, config.head_dim
    q, k, v, gate, log_decay, beta = delta_parts(config, weights, u, heads)
    beta = beta.sigmoid() * (2 if config.allow_neg_eigval else 1)
    state = [torch.zeros(d, d, dtype=u.dtype) for _ in range(heads)]
    out = []
    for t in range(len(u)):
        y_t = []
        for h in range(heads):
            query, key = (x[t, h] / (x[t, h].square().sum() + 1e-6).sqrt() for x in (q, k))
            decayed = log_decay[t, h].exp() * state[h]
            state[h] = decayed + torch.outer(key, beta[t, h] * (v[t, h] - decayed.T @ key))
            y_t.append(state[h].T @ query * d**-0.5)
        out.append(torch.stack(y_t))
    return delta_output(config, weights, out, gate)


def gated_kalmanet(config, weights: Weights, u: Tensor) -> Tensor:
    """A memory read by the query of a ridge regression, found by a fixed number of Chebyshev steps."""
    heads, d = config.num_attention_heads, config.head_dim
    q, k, v, gate, log_decay, _ = delta_parts(config, weights, u, 0)
    ones = torch.ones(len(u), heads, dtype=u.dtype)
    beta = linear(weights, "b_proj", u).sigmoid() + 1e-6 if config.use_beta_gate else ones
    alpha = linear(weights, "alpha_proj", u).sigmoid() if config.use_alpha_connection else ones
    state, covariance = ([torch.zeros(d, d, dtype=u.dtype) for _ in range(heads)] for _ in range(2))
    out = []
    for t in range(len(u)):
        y_t = []
        for h in range(heads):
            query, key = (x[t, h] / (x[t, h].norm() + 1e-6) for x in (q, k))
            key, value = beta[t, h] * key, beta[t, h] * v[t, h]
            decay = log_decay[t, h].exp() if config.use_forgetting_gate else 1.0
            covariance[h] = (decay if config.use_forgetting_gate_kk else 1.0) * covariance[h] + torch.outer(key, key)
            state[h] = decay * state[h] + torch.outer(key, value)
            if config.num_iter:
                solution = chebyshev(covariance[h], query, config.ridge_strength, config.num_iter)
                query = query + alpha[t, h] * (solution - query)
            y_t.append(state[h].T @ query * (d**-0.5 if config.gla_rescale else 1.0))
        out.append(torch.stack(y_t))
    return delta_output(config, weights, out, gate)


def chebyshev(matrix: Tensor, target: Tensor, ridge_strength: float, num_iter: int) -> Tensor:
    """What the iteration makes of (matrix + ridge I) x = target, for eigenvalues between ridge and ridge + norm."""
    norm = matrix.norm()
    ridge = ridge_strength * norm
    step, ratio = 2 / (2 * ridge + norm), (norm / (2 * ridge + norm) / 2) ** 2
    x, previous, omega = step * target, torch.zeros_like(target), 2.0
    for _ in range(num_iter):
        omega = 1 / (1 - ratio * omega)
        residual = matrix @ x + ridge * x - target
        x, previous = omega * x - step * omega * residual - (omega - 1) * previous, x
    return x
