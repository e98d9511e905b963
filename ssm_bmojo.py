"""The fading memories: complete mixers of Mamba, Mamba2, Gated DeltaNet and Gated KalmaNet."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from .cache_bmojo import convolved_widths
from .call_bmojo import Call, take_rows
from .configuration_bmojo import DELTA_TYPES
from .delta_ops_bmojo import delta_step, kalman_step
from .kernels_bmojo import (
    causal_conv,
    delta_scan,
    kalman_scan,
    rotate,
    selective_scan,
    selective_step,
    silu_gate,
    ssd_scan,
    ssd_step,
)
from .linear_bmojo import project
from .norms_bmojo import BMojoRMSNorm
from .numerics_bmojo import as_dtype, at_least_float32, widen


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
        dt, A_log, bias = widen(dt), widen(self.A_log), widen(self.dt_bias)
        D = self.D.to(at_least_float32(self.D), copy=True)  # as an FSDP unit this frees its parameters when it returns
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
            y = (x * self.weight.squeeze(1)).sum(-1)
            return (y if self.bias is None else y + self.bias).unsqueeze(-1)
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
        inputs = torch.cat([as_dtype(history, x.dtype), x], 1)
        if call.lengths is None:
            last = inputs.narrow(1, x.shape[1], size)
            if call.step is None:
                last = last.clone()  # not to keep all inputs
            elif call.may_overwrite(state["conv"]):
                last = state["conv"].copy_(last)
        else:
            last = take_rows(inputs, call.lengths[:, None] + torch.arange(size, device=x.device))
        last = as_dtype(last, history.dtype)  # under autocast another than the cache's
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
        projected, mlp = project(self.in_proj, u), None
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
        x = x.reshape(*shape, *x_heads)
        if call.step is None or B_heads[0] > 1 or C_heads[0] > 1:  # else they have that shape
            B, C = B.reshape(*shape, *B_heads), C.reshape(*shape, *C_heads)
        if self.repeats > 1:
            x, B = x.repeat_interleave(self.repeats, -2), B.repeat_interleave(self.repeats, -2)
        if call.step is None:
            y, ssm = ssd_scan(x, dt, A, B, C, None if state is None else state["ssm"], self.chunk_size)
        else:
            y, ssm = ssd_step(x, dt.squeeze(1), A, B, C, state["ssm"], call.may_overwrite(state["ssm"]))
        y = as_dtype(torch.addcmul(y, D.view(self.D_shape), as_dtype(x, y.dtype)).reshape(z.shape), u.dtype)
        y = self.gated(z, y, silu_gate if call.step is None else silu_gate.definition)
        return project(self.out_proj, y if mlp is None else torch.cat([mlp, y], -1)), {"conv": conv, "ssm": ssm}, {}

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
        x, z = project(self.in_proj, u).chunk(2, -1)
        x, conv = self.convolve(x, call, state)
        dt, B, C = project(self.x_proj, x).split_with_sizes(self.sizes, -1)
        if self.normed:
            dt, B, C = self.dt_norm(dt), self.B_norm(B), self.C_norm(C)
        dt, A, D = self.time_step(project(self.dt_proj, dt), call)
        if call.step is None:
            y, ssm = selective_scan(x, dt, A, B, C, None if state is None else state["ssm"], self.chunk_size)
        else:
            now = (part.squeeze(1) for part in (x, dt))
            B, C = B.squeeze(1), C.squeeze(1)
            y, ssm = selective_step(*now, A, B, C, state["ssm"], call.may_overwrite(state["ssm"]))
            y = y[:, None]
        y = as_dtype(torch.addcmul(y, D, as_dtype(x, y.dtype)), u.dtype)
        return (
            project(self.out_proj, silu_gate(z, y) if call.step is None else F.silu(z) * y),
            {"conv": conv, "ssm": ssm},
            {},
        )


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

    def make_qkv(self, u, call: Call, state):
        """Queries, keys and values (rows, seq_len, heads, head_dim), what the convolution keeps, and the other projections."""
        qkv, *others = project(self.in_proj, u).split_with_sizes(self.parts, -1)
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
        return project(self.out_proj, silu_gate(gate, y) if self.gated else y)


class BMojoDeltaNet(BMojoDelta):
    """Gated DeltaNet's mixer (arXiv 2412.06464): a complete layer from (rows, seq_len, hidden_size) to the same."""

    def __init__(self, config):
        super().__init__(config, "gated_deltanet", config.num_attention_heads)
        self.strongest = 2.0 if config.allow_neg_eigval else 1.0

    def forward(self, u, call: Call, state=None):
        """Returns y as u, the tensors "conv" and "ssm" of the new state, and nothing to show."""
        q, k, v, kept, (gate, dt, beta) = self.make_qkv(u, call, state)
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
        q, k, v, kept, (gate, dt) = self.make_qkv(u, call, state)
        q, k = (x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + 1e-6) for x in (q, k))
        if self.b_proj is not None:
            beta = widen(project(self.b_proj, u)).sigmoid()[..., None] + 1e-6
            k, v = k * beta, v * beta
        decay = self.hide(self.dynamics(dt), call) if self.forgets[0] else torch.zeros_like(q[..., 0])
        decay_kk = decay if self.forgets[1] else torch.zeros_like(decay)
        alpha = torch.ones_like(decay) if self.alpha_proj is None else widen(project(self.alpha_proj, u)).sigmoid()
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
        added = project(self.up_proj, F.silu(project(self.down_proj, x.flatten(-2)))).unflatten(-1, (self.heads, -1))
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
