"""Gated DeltaNet and Gated KalmaNet: forms against definitions, definitions against loops and transformers' own."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from bmojo import delta_ops_bmojo
from bmojo.delta_ops_bmojo import (
    chunked_delta_scan,
    chunked_kalman_scan,
    delta_scan,
    delta_step,
    kalman_scan,
    kalman_step,
)
from bmojo.kernels_bmojo import delta_scan as chosen_delta_scan
from bmojo.kernels_bmojo import kalman_scan as chosen_kalman_scan
from bmojo_tests.reference import chebyshev


SOLVER = {"ridge_strength": 0.02, "num_iter": 30}
CONVERGED = {"ridge_strength": 0.1, "num_iter": 300}
KINDS = ["delta", "kalman"]
FORMS = {"delta": (delta_scan, chunked_delta_scan), "kalman": (kalman_scan, chunked_kalman_scan)}
SHAPES = [(1, 1, 1, 2, 3), (2, 3, 2, 5, 4), (2, 37, 3, 4, 4), (1, 67, 2, 3, 5)]  # batch, seq_len, heads, key and value


def rel_error(got, want):
    """Root mean square error relative to ``want``: one number, whatever the scale."""
    assert got.shape == want.shape
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-12)).item()


def inputs_of(kind, batch, seq_len, heads, key_dim, value_dim, decay="usual", seed=0):
    """Arguments up to the states, in float64; decay: as in training, with pauses, with jumps that leave nothing, or none."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def log_decay():
        g = -F.softplus(random(batch, seq_len, heads) - 1)
        if decay == "pauses":
            g = g * (random(*g.shape) > 0)
        elif decay == "jumps":
            g = torch.where(random(*g.shape) > 1, -90, g)
        return g * 0 if decay == "none" else g

    q, k = (F.normalize(random(batch, seq_len, heads, key_dim), dim=-1) for _ in "qk")
    tokens = [q, k, random(batch, seq_len, heads, value_dim), log_decay()]
    gate = random(batch, seq_len, heads).sigmoid()
    state = random(batch, heads, key_dim, value_dim)
    if kind == "delta":
        tokens += [gate, state]
    else:
        keys = random(batch, heads, key_dim, key_dim)
        tokens += [log_decay(), gate, state, keys @ keys.mT]
    return [x.requires_grad_() for x in tokens]


def options_of(kind, **overrides):
    return SOLVER | overrides if kind == "kalman" else {}


def states_in(kind):
    return 1 if kind == "delta" else 2


def outputs_and_gradients(scan, inputs, chunk_size, wanted, **options):
    outputs = scan(*inputs, chunk_size, **options)
    loss = sum((x.sin() * (1 + number)).sum() for number, x in enumerate(outputs))
    return *outputs, *torch.autograd.grad(loss, wanted)


# ---------------------------------------------------------------------------- definitions


def delta_loop(q, k, v, log_decay, beta, state):
    """Per head, by matrices: S <- e^g (I - beta k k^T) S + beta k v^T."""
    out = []
    for t in range(q.shape[1]):
        key, strength = k[:, t, :, :, None], beta[:, t, :, None, None]
        keep = torch.eye(k.shape[-1], dtype=k.dtype) - strength * key @ key.mT
        state = keep @ (log_decay[:, t].exp()[..., None, None] * state) + strength * key @ v[:, t, :, None]
        out.append(torch.einsum("bhde,bhd->bhe", state, q[:, t]))
    return torch.stack(out, 1), state


def kalman_loop(q, k, v, log_decay, log_decay_kk, alpha, state, kk, ridge_strength, num_iter):
    out = []
    for t in range(q.shape[1]):
        key = k[:, t, :, :, None]
        kk = log_decay_kk[:, t].exp()[..., None, None] * kk + key @ key.mT
        state = log_decay[:, t].exp()[..., None, None] * state + key @ v[:, t, :, None]
        asked = q[:, t].clone()
        for b, h in itertools.product(*map(range, asked.shape[:2])):
            solution = chebyshev(kk[b, h], q[b, t, h], ridge_strength, num_iter)
            asked[b, h] = q[b, t, h] + alpha[b, t, h] * (solution - q[b, t, h])
        out.append(torch.einsum("bhde,bhd->bhe", state, asked))
    return torch.stack(out, 1), state, kk


def test_delta_definition_is_its_loop():
    inputs = inputs_of("delta", 2, 9, 2, 4, 3)
    want = delta_loop(*inputs)
    assert max(map(rel_error, delta_scan(*inputs), want)) < 1e-12


@pytest.mark.parametrize("num_iter", [1, 2, 30])
def test_kalman_definition_is_its_loop(num_iter):
    inputs = inputs_of("kalman", 2, 7, 2, 4, 3)
    want = kalman_loop(*inputs, 0.02, num_iter)
    assert max(map(rel_error, kalman_scan(*inputs, ridge_strength=0.02, num_iter=num_iter), want)) < 1e-12


def test_kalman_without_iterations_is_gated_attention():
    q, k, v, log_decay, log_decay_kk, alpha, state, kk = inputs_of("kalman", 2, 7, 2, 4, 3)
    for scan in FORMS["kalman"]:
        y, last, _ = scan(q, k, v, log_decay, log_decay_kk, alpha, state, kk, 3, ridge_strength=0.02, num_iter=0)
        total = log_decay.cumsum(1)
        for t in range(7):
            want = torch.einsum("bhde,bhd->bhe", total[:, t].exp()[..., None, None] * state, q[:, t])
            for s in range(t + 1):
                weight = (q[:, t] * k[:, s]).sum(-1) * (total[:, t] - total[:, s]).exp()
                want = want + weight[..., None] * v[:, s]
            assert rel_error(y[:, t], want) < 1e-12
        assert last.shape == state.shape


def test_kalman_converges_to_the_ridge_regression():
    """Among all queries x, the solution minimises the decayed errors |k_s^T x - ...| plus l |x|^2: here, (P + l I) x = q."""
    q, k, v, log_decay, log_decay_kk, alpha, state, kk = inputs_of("kalman", 1, 12, 2, 4, 3)
    ones = torch.ones_like(alpha)
    y, _, _ = kalman_scan(q, k, v, log_decay, log_decay_kk, ones, state, kk, ridge_strength=0.1, num_iter=300)
    _, last, last_kk = kalman_scan(
        *(x[:, :9] for x in (q, k, v, log_decay, log_decay_kk, ones)), state, kk, **CONVERGED
    )
    ridge = 0.1 * torch.linalg.matrix_norm(last_kk)[..., None, None] * torch.eye(4, dtype=torch.float64)
    x = torch.linalg.solve(last_kk + ridge, q[:, 8, :, :, None])
    assert rel_error(y[:, 8], (last.mT @ x).squeeze(-1)) < 1e-12


@pytest.mark.parametrize("theirs", [torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule])
@pytest.mark.parametrize("form", FORMS["delta"])
def test_delta_is_that_of_transformers(theirs, form):
    """Theirs scales queries, and computes in float32."""
    q, k, v, log_decay, beta, state = (x.detach().float() for x in inputs_of("delta", 2, 71, 3, 8, 8))
    want, last = theirs(q, k, v, log_decay, beta, initial_state=state, output_final_state=True)
    y, got = form(q * 8**-0.5, k, v, log_decay, beta, state)
    assert rel_error(y, want) < 1e-5
    assert rel_error(got, last) < 1e-5


# ---------------------------------------------------------------------------- chunked forms


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("decay", "chunk_size"), [("usual", 1), ("pauses", 4), ("jumps", 5), ("none", 64)])
def test_chunked_form_is_the_definition(kind, shape, decay, chunk_size):
    """Outputs, last states and every gradient, those of the first states included; 67 tokens are many blocks."""
    definition, chunked = FORMS[kind]
    inputs = inputs_of(kind, *shape, decay=decay)
    want = outputs_and_gradients(definition, inputs, chunk_size, inputs, **options_of(kind))
    got = outputs_and_gradients(chunked, inputs, chunk_size, inputs, **options_of(kind))
    assert max(map(rel_error, got, want)) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_chunked_form_begins_at_zero_without_states(kind):
    definition, chunked = FORMS[kind]
    inputs = inputs_of(kind, 2, 37, 2, 3, 4)[: -states_in(kind)]
    nothing = [None] * states_in(kind)
    want = outputs_and_gradients(definition, [*inputs, *nothing], 4, inputs, **options_of(kind))
    got = outputs_and_gradients(chunked, [*inputs, *nothing], 4, inputs, **options_of(kind))
    assert max(map(rel_error, got, want)) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("subset", ["first", "last", "states"])
def test_gradients_for_some_inputs_only(kind, subset):
    definition, chunked = FORMS[kind]
    inputs = [x.detach() for x in inputs_of(kind, 1, 37, 2, 3, 4)]
    chosen = {"first": inputs[:1], "last": inputs[4:5], "states": inputs[-1:]}[subset]
    for x in chosen:
        x.requires_grad_()
    want = outputs_and_gradients(definition, inputs, 4, chosen, **options_of(kind))
    got = outputs_and_gradients(chunked, inputs, 4, chosen, **options_of(kind))
    assert max(map(rel_error, got, want)) < 1e-10


def test_one_decay_for_both_states():
    """What the mixer passes: the same tensor twice, whose gradient is the sum of both."""
    inputs = inputs_of("kalman", 2, 37, 2, 3, 4)
    inputs[4] = inputs[3]
    wanted = [x for number, x in enumerate(inputs) if number != 4]
    want = outputs_and_gradients(kalman_scan, inputs, 4, wanted, **SOLVER)
    got = outputs_and_gradients(chunked_kalman_scan, inputs, 4, wanted, **SOLVER)
    assert max(map(rel_error, got, want)) < 1e-10


@pytest.mark.parametrize("options", [{"bp_lambda": False}, {"num_iter": 3}, {"ridge_strength": 0.5, "num_iter": 1}])
def test_kalman_options(options):
    inputs = inputs_of("kalman", 2, 19, 2, 3, 4)
    options = SOLVER | options
    want = outputs_and_gradients(kalman_scan, inputs, 4, inputs, **options)
    got = outputs_and_gradients(chunked_kalman_scan, inputs, 4, inputs, **options)
    assert max(map(rel_error, got, want)) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    inputs = inputs_of(kind, 1, 7, 1, 3, 2)
    scan, options = FORMS[kind][1], CONVERGED if kind == "kalman" else {}
    assert torch.autograd.gradcheck(lambda *x: scan(*x, 3, **options), inputs)


def test_kalman_gradient_is_the_implicit_one():
    """With few iterations it is the gradient of the solution, by an inexact solver: not that of the iterations."""
    inputs = inputs_of("kalman", 1, 9, 2, 4, 3)
    loss = chunked_kalman_scan(*inputs, 4, **SOLVER)[0].square().sum()
    implicit = torch.autograd.grad(loss, inputs)
    loss = kalman_loop(*inputs, 0.02, 30)[0].square().sum()
    through_iterations = torch.autograd.grad(loss, inputs)
    loss = chunked_kalman_scan(*inputs, 4, ridge_strength=0.02, num_iter=500)[0].square().sum()
    exact = torch.autograd.grad(loss, inputs)
    assert rel_error(implicit[0], through_iterations[0]) < 1e-12  # linear in the queries: the same
    assert rel_error(implicit[1], exact[1]) < 1e-2
    assert rel_error(implicit[1], through_iterations[1]) > 1e-6


def test_kalman_has_no_second_derivative_and_says_so():
    inputs = inputs_of("kalman", 1, 3, 1, 2, 2)
    (gradient,) = torch.autograd.grad(chunked_kalman_scan(*inputs, **SOLVER)[0].sum(), inputs[1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.sum(), inputs[1], retain_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_definitions_run_when_they_are_asked_for(monkeypatch, kind):
    chosen = {"delta": chosen_delta_scan, "kalman": chosen_kalman_scan}[kind]
    definition, chunked = FORMS[kind]
    assert (chosen.definition, chosen.chunked) == (definition, chunked)
    inputs = [x.detach() for x in inputs_of(kind, 1, 9, 2, 3, 4)]
    got = {}
    for mode in ("auto", "torch", "definition"):
        monkeypatch.setenv("BMOJO_KERNELS", mode)
        got[mode] = chosen(*inputs, 4, **options_of(kind))[0]
    assert torch.equal(got["definition"], definition(*inputs, 4, **options_of(kind))[0])
    for mode in ("auto", "torch"):
        assert torch.equal(got[mode], chunked(*inputs, 4, **options_of(kind))[0])


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_bounded_by_blocks(kind, monkeypatch):
    """What is saved for the backward pass of a long sequence: inputs and states between blocks, no chunk's matrices."""
    monkeypatch.setattr(delta_ops_bmojo, "_CHUNKS", 2)
    inputs = inputs_of(kind, 1, 512, 1, 2, 2)
    sizes = []

    def pack(x):
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        FORMS[kind][1](*inputs, 32, **options_of(kind))
    assert sum(sizes) < 512 * 32  # the scores of one chunk for each token alone would be more


# ---------------------------------------------------------------------------- single tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("in_place", [False, True])
@torch.no_grad()
def test_steps_are_the_scan(kind, in_place):
    *tokens, state = (x.detach() for x in inputs_of(kind, 2, 23, 2, 4, 3))
    states = [state] if kind == "delta" else [tokens.pop(), state]
    want, *last = FORMS[kind][1](*tokens, *states, 5, **options_of(kind))
    states = [x.clone() for x in states]
    outputs = []
    for t in range(23):
        step, before = {"delta": delta_step, "kalman": kalman_step}[kind], states
        y, *states = step(*(x[:, t] for x in tokens), *states, in_place, **options_of(kind))
        assert all((x.data_ptr() == old.data_ptr()) == in_place for x, old in zip(states, before, strict=True))
        outputs.append(y)
    assert rel_error(torch.stack(outputs, 1), want) < 1e-12
    assert max(map(rel_error, states, last)) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", [0, 1])
def test_tokens_that_change_nothing(kind, form):
    """Beta 0 or key 0, and no decay: padding. Bit for bit, also behind the last token of a chunk."""
    inputs = [x.detach() for x in inputs_of(kind, 2, 21, 2, 4, 3)]
    inputs[3][:, 6:], inputs[4][:, 6:] = 0, 0
    if kind == "kalman":
        inputs[1][:, 6:] = 0
    short = [x[:, :6] for x in inputs[: -states_in(kind)]] + inputs[-states_in(kind) :]
    for chunk_size in (2, 6, 21):
        long_states = FORMS[kind][form](*inputs, chunk_size, **options_of(kind))[1:]
        short_states = FORMS[kind][form](*short, chunk_size, **options_of(kind))[1:]
        for got, want in zip(long_states, short_states, strict=True):
            assert rel_error(got, want) < 1e-14


# ---------------------------------------------------------------------------- precision and edges


@pytest.mark.parametrize("form", [0, 1])
def test_kalman_without_any_key_is_zero_and_has_gradients(form):
    """0/0 in the original: a solution of a system that is empty."""
    inputs = [torch.zeros_like(x).requires_grad_() for x in inputs_of("kalman", 1, 5, 1, 3, 2)]
    inputs[0].data.fill_(1)
    outputs = outputs_and_gradients(FORMS["kalman"][form], inputs, 2, inputs, **SOLVER)
    assert not any(x.any() for x in outputs[:3])
    assert all(x.isfinite().all() for x in outputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decay", ["usual", "jumps"])
def test_single_and_half_precision(kind, decay):
    inputs = [x.detach() for x in inputs_of(kind, 2, 130, 2, 8, 8, decay=decay)]
    want = FORMS[kind][0](*inputs, **options_of(kind))
    single = FORMS[kind][1](*(x.float() for x in inputs), **options_of(kind))
    assert all(x.dtype == torch.float32 for x in single)
    assert max(map(rel_error, single, want)) < 1e-4
    half = FORMS[kind][1](*(x.bfloat16() for x in inputs), **options_of(kind))
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in half)
    assert max(map(rel_error, half, want)) < 5e-2


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_sequence(kind):
    inputs = inputs_of(kind, 2, 3, 2, 4, 3)
    empty = [x[:, :0] for x in inputs[: -states_in(kind)]] + inputs[-states_in(kind) :]
    for form in FORMS[kind]:
        y, *states = form(*empty, **options_of(kind))
        assert y.shape == (2, 0, 2, 3)
        assert all(map(torch.equal, states, inputs[-states_in(kind) :]))


@pytest.mark.parametrize("kind", KINDS)
def test_functional_transforms(kind):
    """torch.func and batched gradients see through the chunked form."""
    inputs = inputs_of(kind, 1, 20, 1, 3, 2)
    scan = FORMS[kind][1]

    def loss(q):
        return scan(q, *inputs[1:], 4, **options_of(kind))[0].sin().sum()

    want = torch.autograd.grad(loss(inputs[0]), inputs[0])[0]
    assert rel_error(torch.func.grad(loss)(inputs[0].detach()), want) < 1e-12
    y = scan(*inputs, 4, **options_of(kind))[0]
    seeds = torch.eye(3, dtype=y.dtype)[:, :1].expand(3, y.numel()).reshape(3, *y.shape)
    batched = torch.autograd.grad(y, inputs[0], seeds, is_grads_batched=True, retain_graph=True)[0]
    for seed, got in zip(seeds, batched, strict=True):
        assert rel_error(got, torch.autograd.grad(y, inputs[0], seed, retain_graph=True)[0]) < 1e-12
