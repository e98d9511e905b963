"""The kernel of Mamba's scan against the definition in float64; on a CPU under Triton's interpreter."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bmojo import delta_ops_bmojo, kernels_bmojo, ops_bmojo
from bmojo_tests.kernel_checks import DEVICE, needs_triton, poisoned, rel_error


pytestmark = needs_triton


@pytest.fixture(scope="module")
def kernel():
    return kernels_bmojo.load("selective_scan", "selective")


@pytest.fixture
def blocks_of_16(kernel, monkeypatch):
    """Blocks of fewer tokens than the usual 64: many of them in a short sequence."""
    module = sys.modules[kernel.__module__]
    monkeypatch.setattr(module, "_T", 16)
    module.settings.cache_clear()
    yield
    module.settings.cache_clear()


def inputs(rows=2, seq_len=11, channels=5, state_size=3, steps="usual", initial=True, seed=0):
    """Arguments of the op in float64; `steps`: of time, see below."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    dt = F.softplus(random(rows, seq_len, channels))
    if steps == "jumps":  # that leave nothing of the state
        dt = torch.where(random(*dt.shape) > 1, 400, dt)
    elif steps == "ragged":  # rows of other lengths, one of 0
        dt = dt * (torch.arange(seq_len)[:, None] < torch.tensor([[seq_len - 3], [0]])[:rows, :, None])
    elif steps == "still":
        dt = dt * 0
    tensors = {
        "x": random(rows, seq_len, channels),
        "dt": dt,
        "A": -random(channels, state_size).exp(),
        "B": random(rows, seq_len, state_size),
        "C": random(rows, seq_len, state_size),
        "initial_state": random(rows, channels, state_size) if initial else None,
    }
    return {name: x if x is None else x.to(DEVICE) for name, x in tensors.items()}


def differentiate(function, tensors, dtype=torch.float64, uses=("y", "last")):
    """Output, last state, and the gradients of all tensors by those two that are used."""
    leaves = {name: x if x is None else x.detach().to(dtype).requires_grad_() for name, x in tensors.items()}
    found = dict(zip(("y", "last"), function(*leaves.values(), chunk_size=16), strict=True))
    generator = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(x.shape, generator=generator, dtype=torch.float64) for name, x in found.items()}
    sum((found[name] * weights[name].to(found[name])).sum() for name in uses).backward()
    outputs = {name: x.detach() for name, x in found.items()}
    return outputs | {name: x.grad for name, x in leaves.items() if x is not None}


def errors(kernel, tensors, dtype=torch.float32, **options):
    """Of the kernel's outputs and gradients, which are all written, against the definition in float64."""
    want = differentiate(ops_bmojo.selective_scan, tensors, **options)
    with poisoned():
        got = differentiate(kernel, tensors, dtype, **options)
    assert all(x.isfinite().all() for x in got.values())
    return {name: rel_error(got[name], want[name]) for name in want if want[name] is not None}


CASES = {
    "one_token": {"seq_len": 1},
    "one_channel": {"channels": 1, "rows": 1},
    "one_state": {"state_size": 1, "rows": 1},
    "from_zeros": {"initial": False},
    "many_channels": {"channels": 67, "seq_len": 3, "state_size": 12},
    "state_16": {"channels": 33, "seq_len": 9, "state_size": 16, "rows": 1},
    "state_24": {"channels": 34, "seq_len": 5, "state_size": 24, "rows": 1},
    "state_64": {"channels": 3, "seq_len": 10, "state_size": 64, "rows": 1},
    "state_50": {"channels": 33, "seq_len": 2, "state_size": 50, "initial": False},
    "still": {"steps": "still"},
}
IN_BLOCKS = {
    "a_block": {"seq_len": 16},
    "more_than_a_block": {"seq_len": 17},
    "three_blocks": {"seq_len": 37, "rows": 1, "channels": 70},
    "jumps": {"steps": "jumps", "seq_len": 35},
    "ragged": {"steps": "ragged", "seq_len": 35},
    "still_for_blocks": {"steps": "still", "seq_len": 33, "rows": 1},
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(kernel, case):
    assert max(errors(kernel, inputs(**CASES[case])).values()) < 2e-6


@pytest.mark.parametrize("case", IN_BLOCKS)
def test_blocks_are_chained(kernel, blocks_of_16, case):
    assert max(errors(kernel, inputs(**IN_BLOCKS[case])).values()) < 2e-6


def test_blocks_as_they_are(kernel):
    assert max(errors(kernel, inputs(seq_len=67, rows=1)).values()) < 2e-6


@pytest.mark.parametrize("uses", [["y"], ["last"]])
def test_only_one_output_is_used(kernel, blocks_of_16, uses):
    tensors = inputs(seq_len=18, rows=1)
    found = differentiate(kernel, tensors, torch.float32, uses=uses)
    want = differentiate(ops_bmojo.selective_scan, tensors, uses=uses)
    if uses == ["last"]:  # which C has no part in; the definition then has no gradient for it or one of 0
        assert found.pop("C").eq(0).all()
        want.pop("C")
    assert max(rel_error(found[name], want[name]) for name in found) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_as_exact_as_torch(kernel, dtype):
    tensors = {name: x.to(dtype).double() for name, x in inputs(channels=20, state_size=7).items()}
    want = differentiate(ops_bmojo.selective_scan, tensors)
    plain = differentiate(ops_bmojo.selective_scan, tensors, dtype)
    fast = differentiate(kernel, tensors, dtype)
    for name, exact in want.items():
        assert fast[name].dtype is (torch.float32 if name in ("y", "last") else dtype)
        factor = 3 if dtype is torch.bfloat16 and DEVICE == "cpu" else 2  # the interpreter cuts bits off
        assert rel_error(fast[name], exact) <= factor * rel_error(plain[name], exact) + 1e-6, name


def test_dtypes_may_differ(kernel):
    """As under autocast: inputs in bfloat16, time steps and decays in float32."""
    tensors = inputs()
    dtypes = [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16, torch.bfloat16, torch.float32]
    leaves = [x.to(dtype).requires_grad_() for x, dtype in zip(tensors.values(), dtypes, strict=True)]
    sum(out.sum() for out in kernel(*leaves)).backward()
    exact = [x.detach().double().requires_grad_() for x in leaves]
    sum(out.sum() for out in ops_bmojo.selective_scan(*exact)).backward()
    for got, want, dtype in zip(leaves, exact, dtypes, strict=True):
        assert got.grad.dtype is dtype
        assert rel_error(got.grad, want.grad) < (1e-2 if dtype is torch.bfloat16 else 2e-6)


def test_too_many_states_are_refused(kernel):
    with pytest.raises(ValueError, match=r"state_size is 65.*BMOJO_KERNELS=torch"):
        kernel(*(x.float() for x in inputs(seq_len=1, state_size=65).values()))


@pytest.mark.parametrize("shape", [{"seq_len": 0}, {"rows": 0}])
def test_nothing(kernel, shape):
    tensors = {name: x.float().requires_grad_() for name, x in inputs(**shape).items()}
    y, last = kernel(*tensors.values())
    assert y.shape == tensors["x"].shape
    assert torch.equal(last, tensors["initial_state"])
    (y.sum() + last.sum()).backward()
    assert tensors["initial_state"].grad.eq(1).all()
    assert tensors["A"].grad.eq(0).all()


def test_any_layout(kernel):
    layouts = [lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), lambda x: torch.cat([x, x], -1)[..., :3]]
    tensors = inputs(channels=3)
    turned = {name: layouts[i % 2](x) for i, (name, x) in enumerate(tensors.items())}
    assert max(errors(kernel, turned).values()) < 2e-6
    expanded = {name: x if name == "A" else x[:1].expand_as(x) for name, x in tensors.items()}
    assert max(errors(kernel, expanded).values()) < 2e-6


def test_in_pieces(kernel, blocks_of_16):
    """The state at the end of one piece begins the next."""
    tensors = {name: x.float() for name, x in inputs(seq_len=40, rows=1).items()}
    y, last = kernel(*tensors.values())
    state, parts = tensors["initial_state"], []
    for cut in (slice(0, 21), slice(21, 22), slice(22, 40)):
        piece = [x[:, cut] if name in ("x", "dt", "B", "C") else x for name, x in tensors.items()]
        out, state = kernel(*piece[:-1], state)
        parts.append(out)
    assert rel_error(torch.cat(parts, 1), y) < 1e-6
    assert rel_error(state, last) < 1e-6


def test_as_an_operator_of_torch(kernel):
    """Its schema, fake and autograd are what torch.compile relies on; the graph stays whole."""
    module = sys.modules[kernel.__module__]
    tensors = inputs(1, 3)
    torch.library.opcheck(module._forward, [x.float().requires_grad_() for x in tensors.values()])
    want = differentiate(kernel, tensors, torch.float32)
    compiled = torch.compile(
        lambda *args, **kwargs: tuple(out * 1 for out in kernel(*args, **kwargs)), backend="aot_eager", fullgraph=True
    )
    got = differentiate(compiled, tensors, torch.float32)
    assert max(rel_error(got[name], want[name]) for name in want) == 0
    torch.compiler.reset()


def test_the_same_bits_every_time(kernel):
    tensors = inputs(channels=35, state_size=16, seq_len=5)
    first, second = (differentiate(kernel, tensors, torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_second_derivative_is_refused(kernel):
    leaves = [x.float().requires_grad_() for x in inputs(1, 3).values()]
    [first] = torch.autograd.grad(kernel(*leaves)[0].square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        first.square().sum().backward()


def test_no_file_hides_an_op():
    """Python binds a file of `kernels/` to its name in `kernels_bmojo` once it is imported."""
    files = {path.stem for path in (Path(kernels_bmojo.__file__).parent / "kernels").glob("*.py")}
    assert "selective" in files
    assert not files & (vars(ops_bmojo).keys() | vars(delta_ops_bmojo).keys())


# ---------------------------------------------------------------------------- the whole model

IDS = torch.randint(3, 97, (2, 13), generator=torch.Generator().manual_seed(0))


def test_the_model_is_the_same(tiny_model, monkeypatch):
    """Logits, all gradients, and a stream in pieces, with padding on the left."""
    model = tiny_model(ssm_type="mamba").to(DEVICE)
    ids, mask = IDS.to(DEVICE), torch.ones_like(IDS, device=DEVICE)
    mask[1, :4] = 0
    found = {}
    for mode in ("torch", "triton"):
        with monkeypatch.context() as patch:
            patch.setenv("BMOJO_KERNELS", mode)
            model.zero_grad()
            output = model(ids, attention_mask=mask, labels=ids)
            output.loss.backward()
            found[mode] = {"logits": output.logits.detach()[mask.bool()]}
            found[mode] |= {n: p.grad for n, p in model.named_parameters()}
            with torch.no_grad():
                cache, streamed = None, []
                for start, stop in ((0, 6), (6, 7), (7, 13)):
                    output = model(
                        ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True
                    )
                    cache, streamed = output.past_key_values, [*streamed, output.logits]
            found[mode]["streamed"] = torch.cat(streamed, 1)[mask.bool()]
    want, got = found["torch"], found["triton"]
    assert want.keys() == got.keys()
    for key in want:
        assert rel_error(got[key], want[key]) < 2e-5, key
    assert rel_error(got["streamed"], got["logits"]) < 2e-5
    assert {"selective_scan", "running_selection", "prediction_error"} <= set(kernels_bmojo._loaded)
