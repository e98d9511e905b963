r"""Window, Mamba, Jamba and B'MOJO as realizations: state matrices that can be looked at, and the models they are.

Commands:

    python examples/realizations.py
    python examples/realizations.py --size 5 --length 100 --output runs/realizations.png

A state-space model of a sequence u is a pair x_t = A_t x_{t-1} + B_t u_t, y_t = C_t x_{t-1} + D_t u_t. In its controllable
canonical form the state is N slots, each of the size of an input, and A has ones (identity blocks) on its upper diagonal,
which makes it a shift register, and an autoregression in its last row:

        0  I  0  0                0
    A = 0  0  I  0            B = 0
        0  0  0  I                0
        a1 a2 a3 a4               I

B'MOJO (arXiv 2407.06324) starts from this form, of which the known memories are corners. The program builds them, in
float64, and prints how far each is from what this repository's layers compute:

    window      the last row 0: A is nilpotent, the state is the last N inputs, and nothing else is left of the past
    attention   a read-out C_t of that state: the weights of the softmax, the values' projection, the output projection
    Mamba       distinct eigenvalues: a change of basis (Vandermonde) makes A diagonal. With time steps, B and C that depend
                on the token the basis moves with it; A_t keeps the canonical form, and the input enters all slots (into
                the last one alone no causal change of basis can lead it, for it would have to know the B to come)
    Jamba       a whole model of a Mamba and an attention layer as one system: norms, convolution, gates, MLPs and
                residuals included, since each multiplies its input by something that depends on state and input.
                A_t is block triangular, with nilpotent, diagonal and nilpotent blocks
    B'MOJO      a further block whose slots switch: where a chunk begins a matrix of zeros and ones chooses, by the
                innovations that the state holds, which tokens stay

The figure, drawn where matplotlib is installed, has the state matrices and what is left of one input after k steps.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from common import ROOT
from torch import nn
from transformers.dynamic_module_utils import get_class_from_dynamic_module


SIZES = {
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "sliding_window": 5,
    "ssm_type": "mamba",
    "state_size": 3,
    "expand": 1,
    "mamba_head_dim": 8,
    "eidetic_size": 3,
    "eidetic_chunk_size": 4,
    "innovation_kernel": 3,
    "time_step_min": 0.05,
    "time_step_max": 0.5,
}


# ----------------------------------------------------------------------------------------------------------------------
# The canonical form, and the diagonal one
# ----------------------------------------------------------------------------------------------------------------------


def canonical_form(last_row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of the controllable canonical form.

    Args:
        last_row: the autoregression, (slots, size, size): block i multiplies slot i, of which the last is the newest.

    Returns:
        A (slots * size, slots * size) and B (slots * size, size).
    """
    slots, size = last_row.shape[:2]
    A = torch.diag(last_row.new_ones((slots - 1) * size), size)
    A[-size:] = last_row.movedim(0, 1).flatten(1)
    B = last_row.new_zeros(slots * size, size)
    B[-size:] = torch.eye(size, dtype=B.dtype)
    return A, B


def simulate(A: torch.Tensor, B: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """States x_t = A x_{t-1} + B u_t from x = 0: inputs (length, size) to (length, states). A and B may have a leading axis of time."""
    x, states = A.new_zeros(A.shape[-1]), []
    for t, u in enumerate(inputs):
        x = (A[t] if A.dim() == 3 else A) @ x + (B[t] if B.dim() == 3 else B) @ u.to(B.dtype)
        states.append(x)
    return torch.stack(states)


def vandermonde(eigenvalues: torch.Tensor) -> torch.Tensor:
    """The eigenvectors of a scalar canonical form as columns: (1, e, e^2, ...) for each of the eigenvalues (N,)."""
    return eigenvalues ** torch.arange(len(eigenvalues))[:, None]


def autoregression(eigenvalues: torch.Tensor) -> torch.Tensor:
    """The last row (N,) of the scalar canonical form that has these eigenvalues (N,): the powers e^N, written in the lower ones."""
    V = vandermonde(eigenvalues)
    return torch.linalg.solve(V.T, eigenvalues ** len(eigenvalues))


def moving_basis(dt: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """Changes of basis T_t under which a diagonal recurrence with steps that vary is a shift register with a last row.

    Row N - k of T_t is the newest row of T_{t-k} taken through the decays since, so that T_t exp(dt_t A) has the rows of
    T_{t-1} but the oldest. With a constant dt this is the Vandermonde matrix, up to the scale of the states.

    Args:
        dt: (length,) time steps of one channel.
        A: (N,) its rates.

    Returns:
        (1 + length, N, N), first the basis before the first token, as if its dt had always been.
    """
    size = len(A)
    time = torch.cat([dt[:1].expand(size), dt]).cumsum(0)
    ages = torch.arange(size - 1, -1, -1)
    since = torch.stack([time[t] - time[t - ages] for t in range(size - 1, len(time))])
    return (-since[..., None] * A).exp()


# ----------------------------------------------------------------------------------------------------------------------
# A model as one system: everything a layer computes is a matrix times (state, input)
# ----------------------------------------------------------------------------------------------------------------------


class System:
    """A stack of layers as x_t = A_t x_{t-1} + B_t u_t, y_t = C_t x_{t-1} + D_t u_t, with matrices formed token by token.

    The input u is an embedding with a 1 behind it: a slot of a register that holds a 1 there holds a token, an empty one
    does not. Below, a `form` is a tensor (..., states + inputs): the rows of a matrix that z = (x_{t-1}, u_t) is
    multiplied by. Coefficients (gates, weights of a softmax, reciprocals of norms) are numbers found at z.

    Args:
        step: from `memories` {name: form (slots, size, len(z))}, the form of u, z and t to the output's form and the
            new memories. Their order is that of the state.
        shapes: {name: (slots, size)} of the memories.
        inputs: u, (length, size).

    Attributes:
        A, B, C, D: the matrices of every token, (length, ...).
        states, outputs: (length, ...), computed by these matrices alone.
    """

    def __init__(self, step: Callable, shapes: dict[str, tuple[int, int]], inputs: torch.Tensor):
        sizes = {name: slots * size for name, (slots, size) in shapes.items()}
        states = sum(sizes.values())
        ends = torch.tensor([0, *sizes.values()]).cumsum(0).tolist()
        self.blocks = {name: slice(*bounds) for name, *bounds in zip(sizes, ends, ends[1:], strict=False)}
        eye = torch.eye(states + inputs.shape[1], dtype=inputs.dtype)
        memories = {name: eye[self.blocks[name]].unflatten(0, shape) for name, shape in shapes.items()}
        x, found = inputs.new_zeros(states), []
        for t, u in enumerate(inputs):
            output, new = step(memories, eye[states:], torch.cat([x, u]), t)
            forward = torch.cat([new[name].flatten(0, 1) for name in shapes])
            A, B, C, D = *forward.split([states, len(u)], 1), *output.split([states, len(u)], 1)
            y, x = C @ x + D @ u, A @ x + B @ u
            found.append((A, B, C, D, x, y))
        self.A, self.B, self.C, self.D, self.states, self.outputs = map(torch.stack, zip(*found, strict=True))

    def response(self, start: int) -> torch.Tensor:
        """What of the input at `start` is in the state since then, (length - start, states, inputs)."""
        found = [self.B[start]]
        for A in self.A[start + 1 :]:
            found.append(A @ found[-1])
        return torch.stack(found)


def push(register: torch.Tensor, newest: torch.Tensor) -> torch.Tensor:
    """A shift register a token later: the oldest slot falls out, the new one comes last."""
    return torch.cat([register[1:], newest[None]])


def norm_form(norm: nn.Module, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return (norm.weight * ((x @ z).square().mean() + norm.eps).rsqrt())[:, None] * x


def mlp_form(mlp: nn.Module, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    gate = F.silu(mlp.gate_proj.weight @ (x @ z))
    return mlp.down_proj.weight @ (gate[:, None] * (mlp.up_proj.weight @ x))


def mamba_shapes(config) -> dict[str, tuple[int, int]]:
    inner = config.expand * config.hidden_size
    return {"convolution": (config.conv_kernel, inner), "fading": (inner, config.state_size)}


def mamba_form(mixer: nn.Module, x, one, memories, z, t) -> tuple[torch.Tensor, dict]:
    """Mamba's mixer: a register of as many slots as the convolution has taps, and the diagonal recurrence."""
    x, gate = (mixer.in_proj.weight @ x).chunk(2)
    taps = push(memories["convolution"], x)
    x = (mixer.conv1d.weight.permute(2, 0, 1) * taps).sum(0) + mixer.conv1d.bias[:, None] * one
    x = (x @ z).sigmoid()[:, None] * x
    dt, B, C = (mixer.x_proj.weight @ (x @ z)).split(mixer.sizes)
    dt, A, D = mixer.dynamics(mixer.dt_proj.weight @ dt)
    decay, weight = (dt[:, None] * A).exp(), dt[:, None] * B
    state = decay[..., None] * memories["fading"] + weight[..., None] * x[:, None]
    y = torch.einsum("n,dnz->dz", C, state) + D[:, None] * x
    return mixer.out_proj.weight @ (F.silu(gate @ z)[:, None] * y), {"convolution": taps, "fading": state}


def turn(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Rotary embedding: the first half of x (..., head_dim) and its second as coordinates that turn by angle (head_dim / 2,)."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def read_out(mixer: nn.Module, x, spans: list, z) -> torch.Tensor:
    """Attention as a matrix on registers: what the softmax makes of z multiplies their slots.

    Args:
        mixer: has the projections.
        x: form of the query's token.
        spans: registers (slots, 1 + hidden_size or more, len(z)), each with the slots' distances from the query. A slot
            holds a vector, then the 1 that says so.
        z: state and input.
    """
    config = mixer.config
    groups = config.num_attention_heads // config.num_key_value_heads
    rates = config.rope_parameters["rope_theta"] ** (-torch.arange(0, config.head_dim, 2).double() / config.head_dim)
    query, scores = mixer.heads(mixer.q_proj.weight @ (x @ z)), []
    for register, distances in spans:
        tokens = register @ z
        key = mixer.heads(tokens[:, : config.hidden_size] @ mixer.k_proj.weight.T)
        key = turn(key, -distances[:, None, None] * rates).repeat_interleave(groups, 1)
        score = torch.einsum("hd,shd->hs", query, key) * config.head_dim**-0.5
        scores.append(score.masked_fill(tokens[:, config.hidden_size] < 0.5, -torch.inf))
    slots = torch.cat([register[:, : config.hidden_size] for register, _ in spans])
    mixed = torch.einsum("hs,suz->huz", torch.cat(scores, 1).softmax(-1), slots)
    values = mixer.v_proj.weight.unflatten(0, (-1, config.head_dim)).repeat_interleave(groups, 0)
    return mixer.o_proj.weight @ (values @ mixed).flatten(0, 1)


def window_shapes(config) -> dict[str, tuple[int, int]]:
    return {"window": (config.sliding_window, config.hidden_size + 1)}


def window_form(mixer: nn.Module, x, one, memories, z, t) -> tuple[torch.Tensor, dict]:
    """Attention over a sliding window: one register."""
    window = push(memories["window"], torch.cat([x, one]))
    ages = torch.arange(len(window) - 1, -1, -1)
    return read_out(mixer, x, [(window, ages)], z), {"window": window}


def bmojo_shapes(config) -> dict[str, tuple[int, int]]:
    tokens, slot = config.sliding_window + config.eidetic_chunk_size, config.hidden_size + 2
    outputs = {"outputs": (2 * config.sliding_window, config.hidden_size + 1)}
    return mamba_shapes(config) | outputs | {"window": (tokens, slot), "eidetic": (config.eidetic_size, slot)}


def bmojo_form(mixer: nn.Module, x, one, memories, z, t) -> tuple[torch.Tensor, dict]:
    """B'MOJO's layer: Mamba, a register of its outputs, one of the tokens and their innovations, and the slots that switch."""
    config, w, c = mixer.config, mixer.window, mixer.chunk
    y, new = mamba_form(mixer.fading, x, one, memories, z, t)

    past = memories["outputs"][-config.innovation_kernel :]
    exist = (past[:, -1] @ z).sum().clamp(min=1)
    error = y - past[:, :-1].sum(0) / exist  # empty slots are 0
    innovation = (error @ z)[None] @ error

    new["outputs"] = push(memories["outputs"], torch.cat([y, one]))
    new["window"] = push(memories["window"], torch.cat([x, one, innovation]))
    new["eidetic"] = memories["eidetic"]
    if t % c == 0:  # the tokens that have left the window since the last chunk began are in the oldest slots
        candidates = torch.cat([memories["eidetic"], new["window"][:c]])
        marks, scores = (candidates[:, -2:] @ z).unbind(1)
        best = sorted(range(len(scores)), key=lambda i: (marks[i] < 0.5, -scores[i].item(), i))[: mixer.memory]
        choice = torch.eye(len(scores), dtype=z.dtype)[sorted(best)]
        new["eidetic"] = torch.einsum("mc,csz->msz", choice, candidates)

    ages = torch.arange(2 * w - 1, -1, -1)
    spans = [(new["window"][c:], ages[w:]), (new["outputs"][:w], ages[:w])]
    spans.append((new["eidetic"], torch.full((mixer.memory,), 2 * w)))
    return read_out(mixer, x, spans, z), new


LAYERS = {
    "mamba": (mamba_shapes, mamba_form),
    "sliding_attention": (window_shapes, window_form),
    "bmojo": (bmojo_shapes, bmojo_form),
}


def realize(model: nn.Module, embeddings: torch.Tensor) -> System:
    """The system of a whole model (`BMojoModel` of the layer types in LAYERS) that reads embeddings (length, hidden_size)."""
    kinds = list(enumerate(model.config.layers_block_type))
    shapes = {f"{i} {name}": s for i, kind in kinds for name, s in LAYERS[kind][0](model.config).items()}

    def step(memories, u, z, t):
        hidden, one, new = u[:-1], u[-1:], {}
        for i, kind in kinds:
            layer, prefix = model.layers[i], f"{i} "
            own = {name.removeprefix(prefix): m for name, m in memories.items() if name.startswith(prefix)}
            mixed, after = LAYERS[kind][1](layer.mixer, norm_form(layer.input_layernorm, hidden, z), one, own, z, t)
            new |= {prefix + name: memory for name, memory in after.items()}
            hidden = hidden + mixed
            hidden = hidden + mlp_form(layer.mlp, norm_form(layer.post_attention_layernorm, hidden, z), z)
        return norm_form(model.norm, hidden, z), new

    return System(step, shapes, mark(embeddings))


def realize_mixer(mixer: nn.Module, kind: str, inputs: torch.Tensor) -> System:
    """The system of a mixer alone, on its own inputs (length, hidden_size)."""
    shapes, form = LAYERS[kind]
    step = lambda memories, u, z, t: form(mixer, u[:-1], u[-1:], memories, z, t)  # noqa: E731
    return System(step, shapes(mixer.config), mark(inputs))


def mark(inputs: torch.Tensor) -> torch.Tensor:
    """A 1 behind every input, so that a slot tells a zero vector from nothing."""
    return F.pad(inputs, (0, 1), value=1.0)


# ----------------------------------------------------------------------------------------------------------------------
# The claims
# ----------------------------------------------------------------------------------------------------------------------


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def make_model(kinds: list[str], seed: int = 0, **fields):
    """A tiny `BMojoModel` of these layer types with random weights, in float64."""
    model_class = get_class_from_dynamic_module("modeling_bmojo.BMojoModel", str(ROOT))
    torch.manual_seed(seed)
    config = model_class.config_class(layers_block_type=kinds, num_hidden_layers=len(kinds), **SIZES | fields)
    return model_class(config).double().eval().requires_grad_(False)


def read(model, length: int, seed: int = 0):
    """Embeddings of random tokens (length, hidden_size), the model's output, and the inputs and outputs of its mixers."""
    ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))
    seen, hooks = [], []
    for layer in model.layers:
        hooks.append(layer.mixer.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0][0], out[0][0]))))
    output = model(ids, use_cache=False, output_eidetic=True)
    for hook in hooks:
        hook.remove()
    return model.embed_tokens(ids)[0], output, seen


def random_inputs(length: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(length, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def window_error(slots: int, size: int, length: int) -> float:
    """The nilpotent case against the last inputs themselves, oldest first, zeros before the first."""
    A, B = canonical_form(torch.zeros(slots, size, size, dtype=torch.float64))
    inputs = random_inputs(length, size)
    states = simulate(A, B, inputs)
    want = F.pad(inputs, (0, 0, slots - 1, 0)).unfold(0, slots, 1).transpose(1, 2).flatten(1)
    return relative_error(states, want) + torch.linalg.matrix_power(A, slots).abs().max().item()


def attention_error(length: int, seed: int = 0) -> float:
    """A sliding-window mixer of this repository against the read-out of a register of its inputs."""
    model = make_model(["sliding_attention"], seed)
    inputs, outputs = read(model, length, seed)[2][0]
    return relative_error(realize_mixer(model.layers[0].mixer, "sliding_attention", inputs).outputs, outputs)


def scan_definition() -> Callable:
    """`selective_scan` of ops_bmojo.py."""
    return get_class_from_dynamic_module("ops_bmojo.selective_scan", str(ROOT))


def diagonal_errors(size: int, length: int) -> tuple[float, float]:
    """A scalar canonical form against its diagonal recurrence, and that against Mamba's scan with constant dt, A, B, C."""
    dt, rates = 0.4, -torch.arange(1, size + 1, dtype=torch.float64)
    eigenvalues = (dt * rates).exp()
    A, B = canonical_form(autoregression(eigenvalues)[:, None, None])
    C, inputs = random_inputs(1, size, seed=1), random_inputs(length, 1)
    canonical = simulate(A, B, inputs) @ C.T
    V = vandermonde(eigenvalues)
    into = torch.linalg.solve(V, B)
    diagonal = simulate(torch.diag(eigenvalues), into, inputs) @ (C @ V).T
    constant = lambda x: x.expand(1, length, -1)  # noqa: E731
    steps = torch.full((1, length, 1), dt, dtype=torch.float64)
    scan = scan_definition()(inputs[None], steps, rates[None], constant(into.T / dt), constant(C @ V))[0][0]
    return relative_error(diagonal, canonical), relative_error(canonical, scan)


def channels_error(size: int, channels: int, length: int) -> float:
    """Mamba's scan of several channels, constant dt, B, C, against one canonical form of vectors: diagonal blocks in its last row."""
    dt = torch.linspace(0.3, 0.5, channels, dtype=torch.float64)
    rates = -torch.arange(1, size + 1, dtype=torch.float64) * torch.linspace(1, 1.3, channels).double()[:, None]
    B, C = 1 + random_inputs(2, size, seed=2).abs()
    inputs = random_inputs(length, channels)
    eigenvalues = (dt[:, None] * rates).exp()
    rows, read_outs = [], []
    for channel in range(channels):
        V = vandermonde(eigenvalues[channel])
        unit = torch.zeros(size, dtype=torch.float64)
        unit[-1] = 1
        scale = torch.linalg.solve(V, unit) / (
            dt[channel] * B
        )  # of the states, so that the input enters the last slot
        rows.append(autoregression(eigenvalues[channel]))
        read_outs.append(torch.linalg.solve(V.T, C / scale))
    A, into = canonical_form(torch.diag_embed(torch.stack(rows, 1)))
    states = simulate(A, into, inputs).unflatten(1, (size, channels))
    got = torch.einsum("tnd,dn->td", states, torch.stack(read_outs))
    steps, constant = dt.expand(1, length, -1), lambda x: x.expand(1, length, -1)
    return relative_error(got, scan_definition()(inputs[None], steps, rates, constant(B), constant(C))[0][0])


def dense_error(slots: int, size: int, length: int) -> float:
    """A canonical form of vectors whose last row mixes them, against its diagonal form in the complex numbers."""
    A, B = canonical_form(0.6 / slots * random_inputs(slots * size, size, seed=3).view(slots, size, size))
    inputs, C = random_inputs(length, size), random_inputs(2, slots * size, seed=4)
    eigenvalues, V = torch.linalg.eig(A)
    into = torch.linalg.solve(V, B.to(V.dtype))
    got = simulate(torch.diag(eigenvalues), into, inputs) @ (C.to(V.dtype) @ V).T
    return relative_error(got, (simulate(A, B, inputs) @ C.T).to(got.dtype))


def canonical_scan(inputs, dt, A, B, C) -> tuple[torch.Tensor, torch.Tensor]:
    """Mamba's scan with steps, B and C of every token, in canonical form: outputs (length, channels) and A_t (channels, length, N, N).

    Args as those of `selective_scan`, without the batch.
    """
    outputs, matrices = [], []
    for channel in range(A.shape[0]):
        T = moving_basis(dt[:, channel], A[channel])
        decay = torch.diag_embed((dt[:, channel, None] * A[channel]).exp())
        moved = torch.linalg.solve(T[:-1].mT, (T[1:] @ decay).mT).mT  # T_t decay_t T_{t-1}^-1
        into = T[1:] @ (dt[:, channel, None] * B)[..., None]
        states = simulate(moved, into, inputs[:, channel, None])
        outputs.append((C * torch.linalg.solve(T[1:], states)).sum(-1))
        matrices.append(moved)
    return torch.stack(outputs, -1), torch.stack(matrices)


def selective_inputs(size: int, channels: int, length: int) -> tuple[torch.Tensor, ...]:
    """Inputs, steps, rates, B and C as a Mamba layer makes them: all but the rates depend on the token."""
    inputs = random_inputs(length, channels)
    dt = F.softplus(random_inputs(length, channels, seed=5) / 2 - 1)
    rates = -torch.arange(1, size + 1, dtype=torch.float64).expand(channels, -1)
    return inputs, dt, rates, random_inputs(length, size, seed=6), random_inputs(length, size, seed=7)


def selective_errors(size: int, channels: int, length: int) -> tuple[float, float]:
    """Mamba's scan as it is against its canonical form in a moving basis; and how far that is from ones above the diagonal."""
    inputs, dt, A, B, C = selective_inputs(size, channels, length)
    outputs, matrices = canonical_scan(inputs, dt, A, B, C)
    want = scan_definition()(inputs[None], dt[None], A, B[None], C[None])[0][0]
    shift = torch.eye(size, dtype=torch.float64)[1:]
    return relative_error(outputs, want), (matrices[..., :-1, :] - shift).abs().max().item()


def model_error(kinds: list[str], length: int, seed: int = 0) -> float:
    """A model of these layer types against its system."""
    model = make_model(kinds, seed)
    embeddings, output, _ = read(model, length, seed)
    return relative_error(realize(model, embeddings).outputs, output.last_hidden_state[0])


def measure(size: int, length: int) -> list[tuple[str, float]]:
    """What is compared, and the relative error."""
    rows = [
        ("window: nilpotent canonical form = the last inputs, scalars", window_error(size, 1, length)),
        ("window: the same, vectors", window_error(size, 3, length)),
        ("attention: sliding_attention = read-out of the register", attention_error(length)),
    ]
    diagonal, scan = diagonal_errors(size, length)
    rows += [
        ("Mamba: canonical form = diagonal recurrence (Vandermonde), scalars", diagonal),
        ("Mamba: canonical form = selective_scan with constant dt, A, B, C", scan),
        ("Mamba: the same, vectors, a channel's autoregression each", channels_error(size, 3, length)),
        ("Mamba: autoregression that mixes the channels = complex diagonal", dense_error(size, 3, length)),
    ]
    outputs, shape = selective_errors(size, 3, length)
    rows += [
        ("Mamba: dt, B, C of every token = canonical form in a moving basis", outputs),
        ("Mamba: its state matrices = upper diagonal of ones and a last row", shape),
    ]
    for name, kinds in (
        ("Jamba", ["mamba", "sliding_attention"]),
        ("B'MOJO", ["bmojo"]),
        ("B'MOJO", ["mamba", "bmojo"]),
    ):
        rows.append((f"{name}: model of {' + '.join(kinds)} = one system", model_error(kinds, length)))
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# The figure
# ----------------------------------------------------------------------------------------------------------------------

COLOURS = {
    "window": "#2f6fb0",
    "convolution": "#7fb2dd",
    "fading": "#e07b2a",
    "outputs": "#f2b26b",
    "eidetic": "#2a9d6f",
}
NAMES = {"outputs": "fading tokens", "eidetic": "eidetic slots"}
INK, PALE = "#333333", "#b8b8b8"


def kind_of(block: str) -> str:
    """The memory's name in a system: without the number of its layer."""
    return block.split()[-1]


def paint(axes, A: torch.Tensor, blocks: dict[str, slice], names: bool = True):
    """Draw a matrix: every row in the colour of its memory, strong where the entry is large, over three decades."""
    from matplotlib.colors import to_rgb

    image = torch.zeros(*A.shape, 4)
    for name, block in blocks.items():
        image[block, :, :3] = torch.tensor(to_rgb(COLOURS[kind_of(name)]))
    image[..., 3] = (1 + A.abs().clamp(min=1e-9).log10() / 3).clamp(0, 1)
    axes.imshow(image.numpy(), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for block in list(blocks.values())[1:]:
        axes.axhline(block.start - 0.5, color=PALE, linewidth=0.6)
        axes.axvline(block.start - 0.5, color=PALE, linewidth=0.6)
    for spine in axes.spines.values():
        spine.set(color=PALE, linewidth=0.8)
    if names:
        centres = [(block.start + block.stop - 1) / 2 for block in blocks.values()]
        axes.set_yticks(centres, [NAMES.get(kind_of(name), kind_of(name)) for name in blocks])
        axes.tick_params(length=0, labelsize=8)
        for label, name in zip(axes.get_yticklabels(), blocks, strict=True):
            label.set_color(COLOURS[kind_of(name)])


def write_entries(axes, A: torch.Tensor):
    """Write the numbers into the cells of a small matrix, where they are not 0."""
    for (row, column), entry in zip(
        torch.cartesian_prod(*map(torch.arange, A.shape)).tolist(), A.flatten().tolist(), strict=True
    ):
        if entry:
            text = "1" if entry == 1 else f"{entry:.2f}".replace("0.", ".").replace("-", "\N{MINUS SIGN}")
            axes.text(
                column, row, text, ha="center", va="center", color="white" if abs(entry) > 0.15 else INK, fontsize=7
            )


def draw_fading(axes, size: int, steps: int):
    """Two matrices of one recurrence, and the response of the canonical slots and of the diagonal states."""
    rates = -torch.arange(1, size + 1, dtype=torch.float64) / 4
    A, B = canonical_form(autoregression(rates.exp())[:, None, None])
    diagonal = torch.diag(rates.exp())
    axes[0].axis("off")
    axes[0].set_box_aspect(1)
    for left, title, matrix in ((0.0, "canonical", A), (0.54, "diagonal", diagonal)):
        inset = axes[0].inset_axes([left, 0.27, 0.46, 0.46])
        paint(inset, matrix, {"fading": slice(0, size)}, names=False)
        write_entries(inset, matrix)
        inset.set_title(title, fontsize=8, color=INK)
    axes[0].text(0.5, 0.14, r"$V^{-1} A\, V$ with Vandermonde's $V$", ha="center", fontsize=9, color=INK)
    impulse = torch.zeros(steps, 1, dtype=torch.float64)
    impulse[0] = 1
    for number, state in enumerate(simulate(diagonal, torch.ones_like(B), impulse).T):
        label = None if number else "diagonal states"
        axes[1].plot(state, color=COLOURS["fading"], alpha=0.5, linewidth=1, label=label)
    slot = simulate(A, B, impulse)[:, -1]
    axes[1].plot(slot / slot.max(), color=COLOURS["fading"], linewidth=2.2, label="newest canonical slot")


def draw_response(axes, system: System, start: int, steps: int, **style):
    """What of the input at `start` is in every memory since then: the norm of the block, over its largest."""
    response = system.response(start)[:steps, :, :-1].flatten(2)
    for name, block in system.blocks.items():
        left = response[:, block].norm(dim=(1, 2))
        axes.plot(left / left.max(), color=COLOURS[kind_of(name)], linewidth=1.8, **style)


def draw(target: Path, size: int, steps: int = 28):
    """Draw state matrices and impulse responses of the window, Mamba, Jamba and B'MOJO."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6.6), layout="constrained", facecolor="white")
    panels = figure.subplots(2, 4, height_ratios=(1.35, 1))

    A, B = canonical_form(torch.zeros(2 * size, 1, 1, dtype=torch.float64))
    paint(panels[0, 0], A, {"window": slice(0, 2 * size)}, names=False)
    write_entries(panels[0, 0], A)
    impulse = torch.zeros(steps, 1, dtype=torch.float64)
    impulse[0] = 1
    held = simulate(A, B, impulse).norm(dim=1)
    panels[1, 0].plot(held, color=COLOURS["window"], linewidth=2.2)

    draw_fading(panels[:, 1], size, steps)

    for column, kinds in ((2, ["mamba", "sliding_attention"]), (3, ["bmojo"])):
        model = make_model(kinds, hidden_size=4, num_attention_heads=2, num_key_value_heads=1, mamba_head_dim=4)
        embeddings, output, _ = read(model, 3 * steps)
        system, chunk = realize(model, embeddings), model.config.eidetic_chunk_size
        start, boundary = steps, 2 * steps - 2 * steps % chunk  # at a boundary: where slots switch
        if "bmojo" in kinds:
            memory = output.eidetic_positions[0][0]
            spans = {p: (memory == p).any(-1).sum().item() for p in range(steps, 2 * steps)}
            start = max(spans, key=spans.get)
            boundary = (
                next(b for b in range(1, len(memory)) if start in memory[b] and start not in memory[b - 1]) * chunk
            )
        paint(panels[0, column], system.A[boundary], system.blocks)
        draw_response(panels[1, column], system, start, steps)

    titles = {
        "window": "nilpotent: the last N inputs, exactly",
        "Mamba": "distinct eigenvalues: diagonal, fading",
        "Jamba": "fading in front of a window",
        "B'MOJO": "and slots that switch: tokens that stay",
    }
    for column, (name, title) in enumerate(titles.items()):
        panels[0, column].set_title(f"{name}\n", fontsize=13, color=INK, fontweight="bold")
        panels[0, column].text(
            0.5, 1.02, title, transform=panels[0, column].transAxes, ha="center", fontsize=9, color=INK
        )
        axes = panels[1, column]
        axes.set(xlabel="tokens since", yscale="log", xlim=(-0.5, steps - 1), ylim=(1e-3, 1.6))
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(PALE)
        axes.tick_params(labelsize=8, color=PALE, which="both")
        axes.grid(axis="y", color=PALE, alpha=0.35, linewidth=0.6)
    panels[1, 1].legend(frameon=False, fontsize=8, loc="upper right")
    panels[1, 0].set_ylabel("what is left of one input")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)


def main(argv: list[str] | None = None):
    """Print the errors, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size",
        type=int,
        default=4,
        choices=range(2, 7),
        help="slots of the canonical forms (default 4); a further one costs a change of basis a digit or two",
    )
    parser.add_argument("--length", type=int, default=60, help="tokens (default 60)")
    parser.add_argument(
        "--output",
        default=str(ROOT / "assets" / "realizations.png"),
        help="the figure (default assets/realizations.png)",
    )
    options = parser.parse_args(argv)
    if options.length < 1:
        parser.error(f"--length is {options.length}; it must be at least 1.")
    rows = measure(options.size, options.length)
    width = max(len(name) for name, _ in rows)
    for name, error in rows:
        print(f"{name:<{width}}  {error:.1e}")
    try:
        draw(Path(options.output), options.size)
    except ImportError:
        print("No figure was drawn: it needs matplotlib (pip install matplotlib).", file=sys.stderr)
    else:
        print(f"\nfigure: {options.output}")


if __name__ == "__main__":
    main()
