"""The kernel of the short convolution against the definition in float64; on a CPU under Triton's interpreter."""

import sys

import pytest
import torch

from bmojo import kernels_bmojo, ops_bmojo
from bmojo_tests.kernel_checks import DEVICE, needs_triton, poisoned, rel_error


pytestmark = needs_triton


@pytest.fixture(scope="module")
def kernel():
    return kernels_bmojo.load("causal_conv", "conv")


def inputs(rows=2, seq_len=11, channels=5, taps=4, bias=True):
    """Arguments of the op in float64."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)

    return {
        "x": random(rows, taps - 1 + seq_len, channels),
        "weight": random(channels, taps),
        "bias": random(channels) if bias else None,
    }


def differentiate(function, tensors, dtype=torch.float64):
    """The output and the gradients of all that there are."""
    leaves = {name: x if x is None else x.detach().to(dtype).requires_grad_() for name, x in tensors.items()}
    y = function(*leaves.values())
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y))
    return {"y": y.detach()} | {name: x.grad for name, x in leaves.items() if x is not None}


CASES = {
    "one_token": {"seq_len": 1},
    "shorter_than_the_taps": {"seq_len": 2},
    "one_tap": {"taps": 1},
    "no_bias": {"bias": False},
    "a_block": {"seq_len": 32, "rows": 1, "channels": 64},
    "a_block_and_its_edge": {"seq_len": 33, "rows": 3, "channels": 67, "taps": 3},
    "last_inputs_in_a_block_of_their_own": {"seq_len": 62, "taps": 4, "channels": 3},
    "more_taps_than_a_block": {"seq_len": 40, "taps": 35, "channels": 2, "rows": 1},
}


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients(kernel, case):
    tensors = inputs(**CASES[case])
    want = differentiate(ops_bmojo.causal_conv, tensors)
    with poisoned():
        got = differentiate(kernel, tensors, torch.float32)
    assert got.keys() == want.keys()
    assert all(x.isfinite().all() for x in got.values())
    assert max(rel_error(got[name], want[name]) for name in want) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_rounded_once(kernel, dtype):
    """Of sums in float32; Triton's interpreter cuts bits off where a GPU rounds."""
    tensors = inputs(seq_len=45, channels=9)
    want = differentiate(ops_bmojo.causal_conv, {name: x.to(dtype).double() for name, x in tensors.items()})
    got = differentiate(kernel, tensors, dtype)
    for name in want:
        assert got[name].dtype is dtype
        assert rel_error(got[name], want[name]) < torch.finfo(dtype).eps


@pytest.mark.parametrize("layout", ["channels first", "every second channel", "gradient of a slice"])
def test_layouts_of_memory(kernel, layout):
    tensors = inputs()
    want = differentiate(ops_bmojo.causal_conv, tensors)
    x = tensors["x"]
    if layout == "channels first":
        tensors["x"] = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "every second channel":
        tensors["x"] = torch.stack([x, x], -1)[..., 0]
    else:
        wide = differentiate(lambda *args: ops_bmojo.causal_conv(*args)[:, 1:], tensors)
        got = differentiate(lambda *args: kernel(*args)[:, 1:], tensors, torch.float32)
        assert max(rel_error(got[name], wide[name]) for name in wide) < 1e-6
        return
    got = differentiate(kernel, tensors, torch.float32)
    assert max(rel_error(got[name], want[name]) for name in want) < 1e-6


def test_registered_op(kernel):
    """Its schema, fake and autograd are what torch.compile relies on; the graph stays whole."""
    module = sys.modules[kernel.__module__]
    arguments = [x.float().requires_grad_() for x in inputs().values()]
    torch.library.opcheck(module._forward, arguments)
    compiled = torch.compile(lambda *args: kernel(*args) * 1, backend="aot_eager", fullgraph=True)
    want, got = (differentiate(form, inputs(), torch.float32) for form in (kernel, compiled))
    assert max(rel_error(got[name], want[name]) for name in want) == 0
    torch.compiler.reset()


@pytest.mark.parametrize("ssm_type", ["mamba", "mamba2"])
def test_the_model_is_the_same(tiny_model, monkeypatch, ssm_type):
    """Logits and gradients with every kernel, this one among them, and without any."""
    model = tiny_model(ssm_type=ssm_type, num_hidden_layers=1).to(DEVICE)
    ids = torch.randint(3, 97, (2, 13), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = {}
    calls = []
    plain = kernels_bmojo.load("causal_conv", "conv")
    monkeypatch.setitem(kernels_bmojo._loaded, "causal_conv", lambda *args: calls.append(args) or plain(*args))
    for mode in ("torch", "triton"):
        monkeypatch.setenv("BMOJO_KERNELS", mode)
        model.zero_grad()
        output = model(ids, labels=ids)
        output.loss.backward()
        found[mode] = {"logits": output.logits.detach()} | {n: p.grad for n, p in model.named_parameters()}
        assert bool(calls) == (mode == "triton")
    for name, want in found["torch"].items():
        assert rel_error(found["triton"][name], want) < 2e-5, name
