"""Realizations: each memory is the state matrix that the program says it is, and another matrix is not."""

import sys
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).resolve().parent.parent
EXACT = 1e-12


@pytest.fixture(scope="module")
def program():
    """The program as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        import realizations

        yield realizations
    for name in ("realizations", "common"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("slots", [1, 2, 5])
def test_window_is_nilpotent_and_holds_the_last_inputs_only(program, slots, size):
    last_row = torch.zeros(slots, size, size, dtype=torch.float64)
    A, B = program.canonical_form(last_row)
    inputs = program.random_inputs(12, size)
    states = program.simulate(A, B, inputs).unflatten(1, (slots, size))
    for t in range(12):
        for age in range(slots):
            held = states[t, slots - 1 - age]
            assert torch.equal(held, inputs[t - age] if t >= age else torch.zeros_like(held))
    other = inputs.clone()
    other[: 12 - slots] += 1
    assert torch.equal(program.simulate(A, B, other)[-1], states[-1].flatten()), "the rest is forgotten"
    assert not torch.linalg.matrix_power(A, slots).any()
    if slots > 1:
        assert torch.linalg.matrix_power(A, slots - 1).any()

    last_row[0, 0, 0] = 0.9  # a control: with an autoregression it is not
    A, B = program.canonical_form(last_row)
    assert torch.linalg.matrix_power(A, slots).any()
    a, b = (program.simulate(A, B, x)[-1] for x in (inputs, other))
    assert (a - b).norm() > 0.1


def test_canonical_form_is_the_autoregression(program):
    last_row = program.random_inputs(4 * 3, 3, seed=1).view(4, 3, 3) / 8
    A, B = program.canonical_form(last_row)
    inputs = program.random_inputs(20, 3)
    series = [torch.zeros(3, dtype=torch.float64)] * 4
    for u in inputs:
        series.append(u + sum(last_row[i] @ series[-4 + i] for i in range(4)))
    states = program.simulate(A, B, inputs)
    assert torch.allclose(states[-1], torch.cat(series[-4:]), atol=1e-14, rtol=0)


@pytest.mark.parametrize("seed", [0, 1])
def test_attention_is_a_read_out_of_the_register(program, seed):
    model = program.make_model(["sliding_attention"], seed)
    inputs, outputs = program.read(model, 17, seed)[2][0]
    mixer = model.layers[0].mixer
    system = program.realize_mixer(mixer, "sliding_attention", inputs)
    window, slot = model.config.sliding_window, model.config.hidden_size + 1
    A, B = program.canonical_form(torch.zeros(window, slot, slot, dtype=torch.float64))
    assert torch.equal(system.A, A.expand_as(system.A)), "the state is that of the nilpotent form"
    assert torch.equal(system.B, B.expand_as(system.B))
    assert torch.allclose(system.outputs, outputs, atol=EXACT, rtol=0)
    before = torch.cat([torch.zeros_like(system.states[:1]), system.states[:-1]])
    again = (system.C @ before[..., None] + system.D @ program.mark(inputs)[..., None]).squeeze(-1)
    assert torch.allclose(again, system.outputs, atol=EXACT, rtol=0)
    assert system.C[:window].flatten(1).norm(dim=1).diff().abs().min() > 1e-3, "the read-out depends on the inputs"

    shorter = program.window_shapes(model.config)["window"][0] - 1  # a control: a window of one token less
    mixer.window = mixer.config.sliding_window = shorter
    wrong = program.realize_mixer(mixer, "sliding_attention", inputs).outputs
    assert torch.allclose(wrong[:shorter], outputs[:shorter], atol=EXACT, rtol=0)
    assert ((wrong - outputs)[shorter:].norm(dim=-1) > 1e-4).all()


def test_vandermonde_holds_the_eigenvectors(program):
    eigenvalues = torch.tensor([0.9, 0.5, 0.3, -0.4], dtype=torch.float64)
    A, _ = program.canonical_form(program.autoregression(eigenvalues)[:, None, None])
    V = program.vandermonde(eigenvalues)
    assert torch.allclose(A @ V, V * eigenvalues, atol=1e-14, rtol=0)
    assert torch.allclose(torch.linalg.eigvals(A).real.sort().values, eigenvalues.sort().values, atol=EXACT, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_canonical_form_is_diagonal_and_mamba(program, size, monkeypatch):
    def errors():
        return (*program.diagonal_errors(size, 50), program.channels_error(size, 3, 50))

    assert max(errors()) < EXACT
    assert program.dense_error(3, max(2, size), 50) < EXACT
    right = program.autoregression
    monkeypatch.setattr(program, "autoregression", lambda eigenvalues: right(0.99 * eigenvalues))
    assert min(errors()[1:]) > 1e-3, "eigenvalues a little off"


def test_selective_scan_is_canonical_in_a_moving_basis(program):
    size, channels, length = 4, 3, 40
    inputs, dt, A, B, C = program.selective_inputs(size, channels, length)
    want = program.scan_definition()(inputs[None], dt[None], A, B[None], C[None])[0][0]
    got, matrices = program.canonical_scan(inputs, dt, A, B, C)
    assert program.relative_error(got, want) < EXACT
    shift = torch.eye(size, dtype=torch.float64)[1:]
    assert torch.allclose(matrices[..., :-1, :], shift.expand_as(matrices[..., :-1, :]), atol=EXACT, rtol=0)
    assert matrices[..., -1, :].std(dim=1).min() > 1e-3, "the autoregression depends on the token"
    first = program.moving_basis(dt[:, 0], A[0])
    later = dt.clone()
    later[20:] = 0.1
    assert torch.equal(first[:21], program.moving_basis(later[:, 0], A[0])[:21]), "the basis is causal"

    # a constant step gives the Vandermonde matrix, but for the scale of its columns
    basis = program.moving_basis(torch.full((5,), 0.3, dtype=torch.float64), A[0])[-1]
    V = program.vandermonde((0.3 * A[0]).exp())
    assert torch.allclose(basis / basis[0], V, atol=EXACT, rtol=0)

    # a control: one basis for all tokens leaves no shift register
    fixed = torch.diag_embed((dt[:, :1] * A[0]).exp())
    fixed = V @ fixed @ torch.linalg.inv(V)
    assert (fixed[:, :-1] - shift).abs().amax((1, 2)).median() > 1e-2


def test_jamba_is_one_block_triangular_system(program):
    model = program.make_model(["mamba", "sliding_attention"])
    embeddings, output, _ = program.read(model, 23)
    system = program.realize(model, embeddings)
    assert torch.allclose(system.outputs, output.last_hidden_state[0], atol=EXACT, rtol=0)

    names = list(system.blocks)
    assert names == ["0 convolution", "0 fading", "1 window"]
    convolution, fading, window = (system.A[:, block, block] for block in system.blocks.values())
    for number, name in enumerate(names):
        for later in names[number + 1 :]:
            assert not system.A[:, system.blocks[name], system.blocks[later]].any(), f"{name} does not look at {later}"
            assert system.A[1:, system.blocks[later], system.blocks[name]].any(), f"{later} looks at {name}"
    for register, slots in ((convolution, model.config.conv_kernel), (window, model.config.sliding_window)):
        assert not torch.linalg.matrix_power(register, slots).any()
        assert torch.equal(register, register[:1].expand_as(register))
    decays = fading.diagonal(dim1=1, dim2=2)
    assert torch.equal(fading, torch.diag_embed(decays))
    assert ((decays > 0) & (decays < 1)).all()

    # controls: without the coupling of the memories, and with the layers in the other order, it is another model
    cut = system.A.clone()
    cut[:, system.blocks["1 window"], : system.blocks["1 window"].start] = 0
    x, states = torch.zeros_like(system.states[0]), []
    for A, B, u in zip(cut, system.B, program.mark(embeddings), strict=True):
        x = A @ x + B @ u
        states.append(x)
    assert (torch.stack(states) - system.states).norm() > 1e-2
    model.layers = model.layers[::-1]
    model.config.layers_block_type = model.config.layers_block_type[::-1]
    assert program.relative_error(program.realize(model, embeddings).outputs, output.last_hidden_state[0]) > 1e-2


@pytest.mark.parametrize("kinds", [["bmojo"], ["mamba", "bmojo"], ["bmojo", "bmojo"]])
def test_bmojo_is_a_system_whose_slots_switch(program, kinds):
    model = program.make_model(kinds, seed=3)
    embeddings, output, _ = program.read(model, 41, seed=3)
    system = program.realize(model, embeddings)
    assert torch.allclose(system.outputs, output.last_hidden_state[0], atol=EXACT, rtol=0)

    # the slots hold the very inputs of the tokens that the model says it kept, and change at chunks only
    slots, chunk = model.config.eidetic_size, model.config.eidetic_chunk_size
    inputs = program.read(model, 41, seed=3)[2][-1][0]
    memories = output.eidetic_positions[-1][0]
    block = system.blocks[f"{len(kinds) - 1} eidetic"]
    for t in range(41):
        held = system.states[t, block].unflatten(0, (slots, -1))
        kept = memories[t // chunk]
        assert (held[:, -2] == (kept >= 0)).all()
        tokens = inputs[kept.clamp(min=0)] * (kept >= 0)[:, None]
        assert torch.allclose(held[:, :-2], tokens, atol=EXACT, rtol=0)
        switch = system.A[t, block]
        if t % chunk:
            assert torch.equal(switch[:, block], torch.eye(block.stop - block.start, dtype=switch.dtype))
        assert set(switch.unique().tolist()) <= {0.0, 1.0}
        assert (switch.sum(1) <= 1).all()
    assert len({tuple(memory) for memory in memories.tolist()}) > 3, "the memory changes"
    assert any((memory[:-1].diff() > 1).any() for memory in memories), "and is no second window"

    if kinds == ["bmojo"]:  # a control: a single slot
        model.layers[0].mixer.memory = 1
        mixer, seen = model.layers[0].mixer, program.read(program.make_model(kinds, seed=3), 41, seed=3)[2][0]
        shapes = dict(program.bmojo_shapes(mixer.config), eidetic=(1, mixer.config.hidden_size + 2))
        step = lambda memories, u, z, t: program.bmojo_form(mixer, u[:-1], u[-1:], memories, z, t)  # noqa: E731
        smaller = program.System(step, shapes, program.mark(seen[0]))
        assert program.relative_error(smaller.outputs, seen[1]) > 1e-3


def test_an_input_is_forgotten_faded_or_kept(program):
    model = program.make_model(["bmojo"])
    embeddings, output, _ = program.read(model, 60)
    system = program.realize(model, embeddings)
    memories, chunk = output.eidetic_positions[0][0], model.config.eidetic_chunk_size
    hidden = model.config.hidden_size
    kept = int(memories[-1][0])
    lost = next(p for p in range(kept + 1, 40) if not (memories == p).any())
    for token, remains in ((kept, True), (lost, False)):
        response = system.response(token)[-1][:, :hidden]
        slots = response[system.blocks["0 eidetic"]].unflatten(0, (-1, hidden + 2))[:, :hidden]
        assert slots.any() == remains
        fading = (
            response[system.blocks["0 fading"]].norm()
            / system.response(token)[0][system.blocks["0 fading"], :hidden].norm()
        )
        assert 0 < fading < 0.1
        assert not response[system.blocks["0 convolution"]].any()
    assert kept // chunk < len(memories) - 3


def test_the_program_prints_and_draws(program, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    target = tmp_path / "new" / "figure.png"
    program.main(["--length", "9", "--size", "3", "--output", str(target)])
    printed = capsys.readouterr().out
    errors = [float(line.split()[-1]) for line in printed.splitlines() if ": " in line and "figure" not in line]
    assert len(errors) == 12
    assert max(errors) < EXACT
    assert target.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        program.main(["--length", "0"])
    assert "--length is 0" in capsys.readouterr().err
