"""The kernels for one token against the definitions in float64; on a CPU under Triton's interpreter."""

import importlib.util
import sys
from contextlib import contextmanager

import pytest
import torch

from bmojo import kernels_bmojo, ops_bmojo


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def load(name: str):
    return kernels_bmojo.load(name, "step")


@contextmanager
def poisoned():
    """Memory that was allocated and never written holds NaN."""
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def rel_error(got, want):
    """Root mean square error relative to ``want``: one number, whatever the scale."""
    assert got.shape == want.shape
    assert got.isfinite().all()
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-12)).item()


def widened(tensors):
    return [x.double() if x is not None and x.is_floating_point() else x for x in tensors]


# ---------------------------------------------------------------------------- scans


def ssd_inputs(rows=3, heads=6, head_dim=10, groups=2, state_size=7, dtype=torch.float32):
    """Arguments of `ssd_step`: x, B and C parts of one projection, a row without a token, a head that forgets all."""
    generator = torch.Generator().manual_seed(0)
    widths = [heads * head_dim, groups * state_size, groups * state_size]
    joint = torch.randn(rows, sum(widths), generator=generator).to(dtype)
    x, B, C = joint.to(DEVICE).split(widths, -1)
    dt = torch.rand(rows, heads, generator=generator)
    dt[-1] = 0
    A = -torch.rand(heads, generator=generator)
    A[0] = -1e5
    state = torch.randn(rows, heads, head_dim, state_size, generator=generator)
    tensors = (
        x.unflatten(1, (heads, head_dim)),
        dt,
        A,
        B.unflatten(1, (groups, -1)),
        C.unflatten(1, (groups, -1)),
        state,
    )
    return [x.to(DEVICE) for x in tensors]


def selective_inputs(rows=3, channels=21, state_size=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x, B, C = (torch.randn(rows, width, generator=generator).to(dtype) for width in (channels, state_size, state_size))
    dt = torch.rand(rows, channels, generator=generator)
    dt[-1] = 0
    A = -torch.rand(channels, state_size, generator=generator)
    A[0] = -1e5
    return [x.to(DEVICE) for x in (x, dt, A, B, C, torch.randn(rows, channels, state_size, generator=generator))]


SCANS = {
    "ssd": ("ssd_step", ssd_inputs, {}),
    "ssd_one_row": ("ssd_step", ssd_inputs, {"rows": 1}),
    "ssd_one_of_all": ("ssd_step", ssd_inputs, {"rows": 1, "heads": 1, "head_dim": 1, "groups": 1, "state_size": 1}),
    "ssd_a_group_per_head": ("ssd_step", ssd_inputs, {"groups": 6}),
    "ssd_many_blocks": ("ssd_step", ssd_inputs, {"heads": 4, "head_dim": 37, "state_size": 130}),
    "ssd_states_in_pieces": ("ssd_step", ssd_inputs, {"rows": 2, "head_dim": 3, "state_size": 300}),
    "selective": ("selective_step", selective_inputs, {}),
    "selective_many_blocks": ("selective_step", selective_inputs, {"channels": 301, "state_size": 16}),
    "selective_states_in_pieces": ("selective_step", selective_inputs, {"channels": 9, "state_size": 259}),
}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SCANS)
def test_steps_of_scans(case, dtype, in_place):
    name, make, sizes = SCANS[case]
    tensors = make(**sizes, dtype=dtype)
    want_y, want_state = getattr(ops_bmojo, name)(*widened(tensors))
    before, state = tensors[-1].clone(), tensors[-1]
    with poisoned():
        y, new = load(name)(*tensors, in_place=in_place)
    assert (y.dtype, new.dtype) == (torch.float32, torch.float32)
    assert y.is_contiguous()
    assert rel_error(y, want_y) < 1e-6
    assert rel_error(new, want_state) < 1e-6
    assert torch.equal(new[-1], before[-1]), "a row without a token keeps its state"
    assert (new is state) == in_place
    if not in_place:
        assert torch.equal(state, before)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_state_of_another_layout(in_place):
    tensors = ssd_inputs()
    want = ops_bmojo.ssd_step(*widened(tensors))
    state = tensors[-1].transpose(1, 2).contiguous().transpose(1, 2)
    found = load("ssd_step")(*tensors[:-1], state, in_place)
    assert max(map(rel_error, found, want)) < 1e-6
    assert (found[1] is state) == in_place


def test_inputs_of_any_layout():
    tensors = ssd_inputs()
    want = ops_bmojo.ssd_step(*widened(tensors))
    turned = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in tensors]
    assert max(map(rel_error, load("ssd_step")(*turned), want)) < 1e-6
    expanded = [*tensors[:1], tensors[1][:1].expand_as(tensors[1]), *tensors[2:]]
    assert max(map(rel_error, load("ssd_step")(*expanded), ops_bmojo.ssd_step(*widened(expanded)))) < 1e-6


def test_no_rows():
    y, state = load("ssd_step")(*(x if x.dim() == 1 else x[:0] for x in ssd_inputs()))
    assert (y.shape, state.shape) == ((0, 6, 10), (0, 6, 10, 7))


def test_states_of_tokens_add_up():
    """Many steps in place are the scan."""
    generator = torch.Generator().manual_seed(0)
    x, dt = torch.randn(2, 9, 2, 4, generator=generator), torch.rand(2, 9, 2, generator=generator)
    B, C = torch.randn(2, 2, 9, 1, 5, generator=generator)
    A = torch.tensor([-1.0, -0.1])
    *tensors, A = (tensor.to(DEVICE) for tensor in (x, dt, B, C, A))
    x, dt, B, C = tensors
    want, want_state = ops_bmojo.ssd_scan(x, dt, A, B, C)
    state, found = torch.zeros_like(want_state), []
    for t in range(9):
        y, state = load("ssd_step")(x[:, t], dt[:, t], A, B[:, t], C[:, t], state, in_place=True)
        found.append(y)
    assert rel_error(torch.stack(found, 1), want) < 1e-6
    assert rel_error(state, want_state) < 1e-6


def test_steps_as_operators_of_torch():
    """Schema and fake, and that the compiler is told of what is overwritten."""
    module = sys.modules[load("ssd_step").__module__]
    for tensors in (ssd_inputs(), selective_inputs()):
        for op in (module._scan_step, module._scan_step_):
            torch.library.opcheck(op, tensors)
        want = ops_bmojo.ssd_step(*tensors) if tensors[0].dim() == 3 else ops_bmojo.selective_step(*tensors)
        state = tensors[-1]
        step = torch.compile(load("ssd_step"), backend="aot_eager", fullgraph=True)
        y, new = step(*tensors, True)
        assert max(rel_error(y, want[0]), rel_error(new, want[1]), rel_error(state, want[1])) < 1e-6
        torch.compiler.reset()


# ---------------------------------------------------------------------------- the choice, and the whole model


def test_the_definition_runs_where_a_gradient_is_recorded(monkeypatch):
    monkeypatch.setenv("BMOJO_KERNELS", "triton")
    asked = []
    monkeypatch.setitem(kernels_bmojo._loaded, "ssd_step", lambda *args: asked.append(args))
    tensors = ssd_inputs(dtype=torch.float32)
    tensors[0].requires_grad_()
    y, _ = kernels_bmojo.ssd_step(*tensors)
    y.sum().backward()
    assert tensors[0].grad.abs().sum() > 0
    assert not asked
    with torch.no_grad():
        kernels_bmojo.ssd_step(*tensors)
    assert len(asked) == 1


@pytest.mark.parametrize("name", ["ssd_step", "selective_step"])
def test_the_definition_runs_on_a_cpu(monkeypatch, name):
    monkeypatch.setattr(kernels_bmojo, "_INTERPRETED", False)
    monkeypatch.setattr(kernels_bmojo, "load", None)
    tensors = [x.cpu() for x in (ssd_inputs() if name == "ssd_step" else selective_inputs())]
    op = getattr(kernels_bmojo, name)
    with torch.no_grad():
        assert all(map(torch.equal, op(*tensors), op.definition(*tensors)))


MODELS = {
    "ssd": {},
    "selective": {"ssm_type": "mamba"},
    "groups": {"n_groups": 2, "layers_block_type": ["mamba2", "bmojo"]},
}
IDS = torch.randint(3, 97, (2, 14), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_model_decodes_the_same(tiny_model, monkeypatch, name, recording):
    """Token by token, with padding on the left; recording keeps the states of before, so that none is overwritten."""
    model, ids = tiny_model(**MODELS[name]).to(DEVICE), IDS.to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    found = {}
    for mode in ("torch", "triton"):
        monkeypatch.setenv("BMOJO_KERNELS", mode)
        with torch.no_grad():
            cache = model(ids[:, :6], attention_mask=mask[:, :6], use_cache=True).past_key_values
            if recording:
                cache.activate_past_recording()
            steps = [
                model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache).logits
                for t in range(6, 14)
            ]
            if recording:
                cache.crop(-1)
                steps.append(model(ids[:, 13:], attention_mask=mask, past_key_values=cache).logits)
        found[mode] = torch.cat(steps, 1)
    assert rel_error(found["triton"], found["torch"]) < 2e-5
