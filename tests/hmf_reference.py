"""The authors' standard models (`hybrid_qwen3`), token by token in float64, from their config.json and their tensors by name.

Written from the project's description of the format, section by section, and from nothing of ours: what a converter gets
wrong, names, orders of rows, options, shows here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class Weights:
    """Tensors by name below a prefix; remembers which have been read."""

    def __init__(self, tensors: dict[str, Tensor], prefix: str = "", read: set | None = None):
        self.tensors, self.prefix, self.read = tensors, prefix, set() if read is None else read

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(self.prefix + name)
        return self.tensors[self.prefix + name].double()

    def under(self, prefix: str) -> "Weights":
        return Weights(self.tensors, self.prefix + prefix, self.read)

    def linear(self, name: str, x: Tensor, bias: bool = False) -> Tensor:
        out = x @ self[f"{name}.weight"].T
        return out + self[f"{name}.bias"] if bias else out


def logits_of(config: dict, tensors: dict[str, Tensor], ids: Tensor) -> tuple[Tensor, set[str]]:
    """Logits of one sequence (seq_len,), and the names of all tensors that they are made of."""
    weights = Weights(tensors)
    x = weights["model.embed_tokens.weight"][ids]
    eps = config["rms_norm_eps"]
    for number, symbol in enumerate(config["hybrid_override_pattern"].split("-")):
        layer = weights.under(f"model.layers.{number}.")
        u = rms_norm(x, layer["input_layernorm.weight"], eps)
        x = x + mix(config, symbol, layer, u)
        n = rms_norm(x, layer["post_attention_layernorm.weight"], eps)
        x = x + layer.linear(
            "mlp.down_proj", F.silu(layer.linear("mlp.gate_proj", n)) * layer.linear("mlp.up_proj", n)
        )
    x = rms_norm(x, weights["model.norm.weight"], eps)
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return x @ weights[head].T, weights.read


def mix(config: dict, symbol: str, layer: Weights, u: Tensor) -> Tensor:
    mixers = {"mamba2": ("mamba.", mamba2), "gka": ("gka.", gka), "gdn": ("gdn.", gdn)}
    if symbol == "*":
        return attention(config, layer.under("self_attn."), u, len(u))
    if symbol == "SWA":
        return attention(config, layer.under("swa."), u, config["swa_config"]["window_size"])
    if symbol in ("M2", "GKA", "GDN"):
        prefix, mixer = mixers[{"M2": "mamba2", "GKA": "gka", "GDN": "gdn"}[symbol]]
        return mixer(config, layer.under(prefix), u)
    prefix, mixer = mixers[config["bmojo_config"]["ssm_mixer"]]
    return bmojo(config, layer.under("bmojo_f.bmojo_attn."), u, mixer(config, layer.under(f"bmojo_f.{prefix}"), u))


def sizes_of(config: dict) -> tuple[int, int, int]:
    return config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)


def rope(config: dict, x: Tensor) -> Tensor:
    """Turn token t of (seq_len, heads, D) by its position t."""
    half = x.shape[-1] // 2
    frequencies = config["rope_parameters"]["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(len(x), dtype=torch.float64)[:, None] * frequencies
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin], -1)


# ---------------------------------------------------------------------------------------------------- attention


def projected(config: dict, weights: Weights, name: str, x: Tensor, suffix: str = "") -> Tensor:
    """Heads of a projection, normed and turned where queries and keys are."""
    out = weights.linear(f"{name}_proj{suffix}", x, config["attention_bias"]).unflatten(-1, (-1, config["head_dim"]))
    if name == "v":
        return out
    return rope(config, rms_norm(out, weights[f"{name}_norm{suffix}.weight"], config["rms_norm_eps"]))


def softmax_mix(config: dict, spans: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """One softmax over spans of (query (H, D), keys and values (n, K, D)); (H D,)."""
    heads, kv_heads, depth = sizes_of(config)
    out = []
    for head in range(heads):
        kv = head // (heads // kv_heads)
        scores = torch.cat([keys[:, kv] @ query[head] for query, keys, _ in spans]) * depth**-0.5
        out.append(scores.softmax(0) @ torch.cat([values[:, kv] for _, _, values in spans]))
    return torch.cat(out)


def attention(config: dict, weights: Weights, u: Tensor, window: int) -> Tensor:
    q, k, v = (projected(config, weights, name, u) for name in "qkv")
    out = [
        softmax_mix(config, [(q[i], k[max(0, i - window + 1) : i + 1], v[max(0, i - window + 1) : i + 1])])
        for i in range(len(u))
    ]
    return weights.linear("o_proj", torch.stack(out), config["attention_bias"])


def bmojo(config: dict, weights: Weights, u: Tensor, y: Tensor) -> Tensor:
    window, suffix = config["bmojo_config"]["window_size"], "" if config["bmojo_config"]["tie_attn_weights"] else "_"
    q, k, v = (projected(config, weights, name, u) for name in "qkv")
    fading_q = projected(config, weights, "q", u, suffix)
    fading_k, fading_v = (projected(config, weights, name, y, suffix) for name in "kv")
    out = []
    for i in range(len(u)):
        near = slice(max(0, i - window + 1), i + 1)
        far = slice(max(0, i - 2 * window + 1), max(0, i - window + 1))
        out.append(softmax_mix(config, [(q[i], k[near], v[near]), (fading_q[i], fading_k[far], fading_v[far])]))
    return weights.linear("o_proj", torch.stack(out), config["attention_bias"])


# ---------------------------------------------------------------------------------------------------- mixers


def convolution(weight: Tensor, x: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Depthwise and causal, the current token at the last tap; then silu."""
    taps = weight.shape[-1]
    padded = torch.cat([torch.zeros(taps - 1, x.shape[1], dtype=x.dtype), x])
    out = [(padded[t : t + taps] * weight[:, 0].T).sum(0) + bias for t in range(len(x))]
    return F.silu(torch.stack(out))


def repeated(config: dict, x: Tensor) -> Tensor:
    """(seq_len, K D) to (seq_len, H, D), head h a copy of h // G."""
    heads, kv_heads, depth = sizes_of(config)
    x = x.view(len(x), kv_heads, depth)
    return torch.stack([x[:, head // (heads // kv_heads)] for head in range(heads)], 1)


def mamba2(config: dict, weights: Weights, u: Tensor) -> Tensor:
    heads, kv_heads, depth = sizes_of(config)
    block = config.get("mamba2_config", {})
    queries, keys = heads * depth, kv_heads * depth
    z, x, B, C, dt = weights.linear("in_proj", u).split([queries, keys, keys, queries, heads], -1)
    B, C = B.unflatten(-1, (kv_heads, depth)), C.unflatten(-1, (heads, depth))
    if block.get("use_qk_norm", True):
        B, C = rms_norm(B, weights["B_norm.weight"], 1e-6), rms_norm(C, weights["C_norm.weight"], 1e-6)
    if block.get("use_pos_emb", False):
        B, C = rope(config, B), rope(config, C)
    mixed = convolution(
        weights["conv1d.weight"], torch.cat([x, B.flatten(1), C.flatten(1)], -1), weights["conv1d.bias"]
    )
    x, B, C = mixed.split([keys, keys, queries], -1)
    x, B, C = repeated(config, x), repeated(config, B), C.unflatten(-1, (heads, depth))
    dt, A, D = F.softplus(dt + weights["dt_bias"]), -weights["A_log"].exp(), weights["D"]
    state = torch.zeros(heads, depth, depth, dtype=u.dtype)
    out = []
    for t in range(len(u)):
        added = dt[t, :, None, None] * x[t, :, :, None] * B[t, :, None]
        state = (A * dt[t]).exp()[:, None, None] * state + added
        out.append((state @ C[t, :, :, None]).squeeze(-1) + D[:, None] * x[t])
    y = torch.stack(out) * F.silu(z).unflatten(-1, (heads, depth))
    return weights.linear("out_proj", rms_norm(y, weights["norm.weight"].view(heads, depth), 1e-5).flatten(1))


def expanded(config: dict, block: dict, weights: Weights, name: str, x: Tensor) -> Tensor:
    heads, kv_heads, depth = sizes_of(config)
    out = repeated(config, x)
    if block.get("kv_proj_rank") is None or heads == kv_heads:
        return out
    if block.get("kv_learnable_residual"):
        out = torch.einsum("hk,tkd->thd", weights[f"{name}_rep"], x.unflatten(-1, (kv_heads, depth)))
    low = F.silu(weights.linear(f"proj_{name}.linearA", x))
    return out + weights.linear(f"proj_{name}.linearB", low).unflatten(-1, (heads, depth))


def queries_keys_values(config: dict, block: dict, weights: Weights, u: Tensor, convolved: str, biased: bool):
    """By head; those named in `convolved` pass a convolution, the others as they are."""
    found = []
    for name in "qkv":
        x = weights.linear(f"{name}_proj", u)
        if name in convolved:
            x = convolution(weights[f"{name}_conv1d.weight"], x, weights[f"{name}_conv1d.bias"] if biased else 0.0)
        found.append(x)
    return found


def gated(config: dict, block: dict, weights: Weights, out: list[Tensor], u: Tensor, eps: float) -> Tensor:
    """Norm by head, then the gate."""
    y = rms_norm(torch.stack(out), weights["o_norm.weight"], eps).flatten(1)
    if block.get("use_gate", True):
        y = y * F.silu(weights.linear("g_proj", u))
    return weights.linear("o_proj", y)


def log_decay(weights: Weights, name: str, u: Tensor) -> Tensor:
    return -weights["A_log"].exp() * F.softplus(weights.linear(name, u) + weights["dt_bias"])


def gka(config: dict, weights: Weights, u: Tensor) -> Tensor:
    heads, _, depth = sizes_of(config)
    block = config.get("gka_config", {})
    convolved = "qkv" if block.get("use_v_conv", True) else "qk"
    q, k, v = queries_keys_values(config, block, weights, u, convolved, False)
    q, k, v = (
        q.unflatten(-1, (heads, depth)),
        expanded(config, block, weights, "k", k),
        expanded(config, block, weights, "v", v),
    )
    q, k = (x / (x.norm(dim=-1, keepdim=True) + 1e-6) for x in (q, k))
    if block.get("use_beta_gate", True):
        beta = weights.linear("b_proj", u, bias=True).sigmoid()[..., None]
        k, v = (beta + 1e-6) * k, (beta + 1e-6) * v
    alpha = torch.ones(len(u), heads, dtype=u.dtype)
    if block.get("use_alpha_connection", True):
        alpha = weights.linear("alpha_proj", u, bias=True).sigmoid()
    g = log_decay(weights, "a_proj", u)
    g = g if block.get("use_forgetting_gate", True) else 0 * g
    g_kk = g if block.get("use_forgetting_gate_kk", True) else 0 * g
    ridge, steps = block.get("ridge_strength", 0.02), block.get("num_iter", 30)
    scale = depth**-0.5 if block.get("gla_rescale", True) else 1.0
    P = [torch.zeros(depth, depth, dtype=u.dtype)] * heads
    S = [torch.zeros(depth, depth, dtype=u.dtype)] * heads
    out = []
    for t in range(len(u)):
        row = []
        for h in range(heads):
            P[h] = g_kk[t, h].exp() * P[h] + torch.outer(k[t, h], k[t, h])
            S[h] = g[t, h].exp() * S[h] + torch.outer(k[t, h], v[t, h])
            asked = q[t, h]
            if steps:
                f = P[h].square().sum().sqrt()
                lam = ridge * f
                s, r = 2 / (2 * lam + f), (f / (2 * lam + f) / 2) ** 2
                x, before, omega = s * asked, torch.zeros_like(asked), 2.0
                for _ in range(steps):
                    omega = 1 / (1 - r * omega)
                    x, before = omega * x - s * omega * (P[h] @ x + lam * x - asked) - (omega - 1) * before, x
                asked = asked + alpha[t, h] * (x - asked)
            row.append(scale * (asked @ S[h]))
        out.append(torch.stack(row))
    return gated(config, block, weights, out, u, block.get("norm_eps", 1e-6))


def gdn(config: dict, weights: Weights, u: Tensor) -> Tensor:
    heads, _, depth = sizes_of(config)
    block = config.get("gdn_config", {})
    short = block.get("use_short_conv", True)
    q, k, v = queries_keys_values(config, block, weights, u, "qkv" if short else "", block.get("conv_bias", False))
    if not short:
        q, k, v = F.silu(q), F.silu(k), F.silu(v)
    q, k, v = (
        q.unflatten(-1, (heads, depth)),
        expanded(config, block, weights, "k", k),
        expanded(config, block, weights, "v", v),
    )
    q, k = (x / torch.sqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    beta = weights.linear("b_proj", u).sigmoid() * (2 if block.get("allow_neg_eigval", False) else 1)
    g = log_decay(weights, "gk_proj", u)
    S = torch.zeros(heads, depth, depth, dtype=u.dtype)
    out = []
    for t in range(len(u)):
        S = g[t].exp()[:, None, None] * S
        error = v[t] - (S.mT @ k[t, :, :, None]).squeeze(-1)
        S = S + k[t, :, :, None] * (beta[t, :, None] * error)[:, None]
        out.append(depth**-0.5 * (S.mT @ q[t, :, :, None]).squeeze(-1))
    return gated(config, block, weights, out, u, block.get("norm_eps", 1e-5))
