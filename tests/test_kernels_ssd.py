"""The kernel of Mamba2's scan against the definition in float64; on a CPU under Triton's interpreter."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bmojo import kernels_bmojo, ops_bmojo
from bmojo_tests.kernel_checks import DEVICE, needs_triton, poisoned, rel_error


pytestmark = needs_triton


@pytest.fixture(scope="module")
def kernel():
    return kernels_bmojo.load("ssd_scan", "ssd")


@pytest.fixture
def small_blocks(kernel, monkeypatch):
    """Blocks of 16 in every direction, two of them to a chunk, two heads to a program: many of all in few tokens."""
    module = sys.modules[kernel.__module__]
    sizes = dict.fromkeys(("fwd", "inputs", "vectors", "state"), (16, 16, 16, 4))
    monkeypatch.setattr(module, "_BLOCKS", dict.fromkeys(module._BLOCKS, sizes))
    monkeypatch.setattr(module, "_CHUNK", 32)
    monkeypatch.setattr(module, "_BLOCK_H", 2)
    module.settings.cache_clear()
    yield
    module.settings.cache_clear()


def inputs(rows=2, seq_len=37, groups=1, per_group=2, head_dim=6, state=5, initial=True, decay=1.0, seed=0):
    """Arguments of the op in float64; decay scales A."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    heads = groups * per_group
    tensors = {
        "x": random(rows, seq_len, heads, head_dim),
        "dt": F.softplus(random(rows, seq_len, heads) - 2),
        "A": -random(heads).exp() * decay,
        "B": random(rows, seq_len, groups, state),
        "C": random(rows, seq_len, groups, state),
        "initial_state": random(rows, heads, head_dim, state) if initial else None,
    }
    return {name: x if x is None else x.to(DEVICE) for name, x in tensors.items()}


WIDE = ("dt", "A", "initial_state")  # never in 16 bits


def differentiate(function, tensors, dtype=torch.float64, used=(True, True)):
    """y, the last state, and the gradients of all tensors; `used`: which of the two outputs enters the loss."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = {
        name: None if x is None else x.detach().to(wide if name in WIDE else dtype).requires_grad_()
        for name, x in tensors.items()
    }
    outputs = function(*leaves.values(), 4)
    generator = torch.Generator().manual_seed(1)
    loss = 0
    for out, wanted in zip(outputs, used, strict=True):
        weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        loss = loss + (out * weight.to(out)).sum() * wanted if wanted else loss
    loss.backward()
    grads = {name: x.grad for name, x in leaves.items() if x is not None and x.grad is not None}
    return {"y": outputs[0].detach(), "state": outputs[1].detach()} | grads


def check(kernel, tensors, **options):
    """All outputs and gradients are written, finite, and as near to the definition in float64 as that in float32 is.

    Gradients of dt and A are differences of sums: what rounding leaves of them depends on the numbers. That of A, which
    with one head is a single number, sums over all tokens what may cancel: its error is one of the size of these terms.
    """
    want = differentiate(ops_bmojo.ssd_scan, tensors, **options)
    plain = differentiate(ops_bmojo.ssd_scan, tensors, torch.float32, **options)
    with poisoned():
        got = differentiate(kernel, tensors, torch.float32, **options)
    assert got.keys() >= want.keys()
    assert all(got[name].eq(0).all() for name in got.keys() - want.keys())  # of what the loss does not depend on
    for name, exact in want.items():
        assert got[name].isfinite().all(), name
        allowed = 3e-6
        if name == "A" and exact.norm() > 0:
            terms = ((tensors["dt"] * want["dt"]).abs().sum((0, 1)) / tensors["A"].abs()).nan_to_num(0, posinf=0)
            allowed += 3e-7 * (terms.norm() / exact.norm()).item()
        assert rel_error(got[name], exact) <= 3 * rel_error(plain[name], exact) + allowed, name


CASES = {
    "one_token": {"seq_len": 1},
    "below_a_block": {"seq_len": 15, "rows": 1},
    "one_block": {"seq_len": 16, "rows": 1},
    "two_rows": {"seq_len": 35},
    "one_chunk": {"seq_len": 32, "rows": 1},
    "many_chunks": {"seq_len": 101, "rows": 1, "per_group": 1, "decay": 0.1},
    "from_zeros": {"initial": False, "rows": 1},
    "one_chunk_from_zeros": {"initial": False, "seq_len": 23},
    "groups": {"groups": 2, "per_group": 3, "rows": 1, "seq_len": 18},
    "a_group_per_head": {"groups": 3, "per_group": 1, "rows": 1},
    "sizes_of_no_block": {"head_dim": 21, "state": 35, "rows": 1, "seq_len": 18, "per_group": 1},
    "sizes_of_blocks": {"head_dim": 32, "state": 16, "rows": 1, "seq_len": 33, "per_group": 1},
    "size_of_1": {"head_dim": 1, "state": 1, "rows": 1},
    "no_rows": {"rows": 0},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("small_blocks")
def test_values_and_gradients(kernel, case):
    check(kernel, inputs(**CASES[case]))


@pytest.mark.parametrize("decay", [0, 30, 3e3, 1e30])
@pytest.mark.usefixtures("small_blocks")
def test_decays_from_none_to_all(kernel, decay):
    """Logs of hundreds and more: what a state leaves behind is 0, and no gap to the future becomes infinite."""
    check(kernel, inputs(1, decay=decay))


@pytest.mark.usefixtures("small_blocks")
def test_ragged_rows(kernel):
    """Steps of 0 behind the last token of a row: the state is that of the row alone, whatever x, B and C are there."""
    tensors, lengths = inputs(3, 35), (35, 17, 0)
    for row, length in enumerate(lengths):
        tensors["dt"][row, length:] = 0
    check(kernel, tensors)
    narrow = {name: x.float() for name, x in tensors.items()}
    _, states = kernel(**narrow)
    for row, length in enumerate(lengths):
        alone = {name: x if name == "A" else x[row : row + 1] for name, x in tensors.items()}
        alone |= {name: x[:, : max(1, length)] for name, x in alone.items() if name in ("x", "dt", "B", "C")}
        assert rel_error(states[row : row + 1], ops_bmojo.ssd_scan(**alone)[1]) < 1e-6


@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=["y", "state"])
@pytest.mark.usefixtures("small_blocks")
def test_one_output_enters_the_loss(kernel, used):
    check(kernel, inputs(1, per_group=1), used=used)


def test_no_token(kernel):
    """Which the definition does not take: the state stays."""
    tensors = inputs(1, 0)
    y, state = kernel(**{name: x.float() for name, x in tensors.items()})
    assert y.shape == (1, 0, 2, 6)
    assert torch.equal(state, tensors["initial_state"].float())


@pytest.mark.parametrize(("head_dim", "state"), [(16, 16), (40, 96), (64, 128), (128, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_size_in_blocks_of_its_own(kernel, head_dim, state, dtype):
    """Results of 16 bits err by less than two steps of these, those of float32 as the definition's."""
    tensors = inputs(1, 19, 1, 1, head_dim, state)
    tensors = {name: x if name in WIDE else x.to(dtype).double() for name, x in tensors.items()}
    if dtype is torch.float32:
        check(kernel, tensors)
        return
    want = differentiate(ops_bmojo.ssd_scan, tensors)
    with poisoned():
        got = differentiate(kernel, tensors, dtype)
    for name, exact in want.items():
        assert got[name].dtype is (dtype if name in ("x", "B", "C") else torch.float32), name
        assert rel_error(got[name], exact) < 2 * torch.finfo(dtype).eps, name


def test_a_state_of_256(kernel):
    check(kernel, inputs(1, 5, 1, 1, 16, 256))


def test_several_dtypes(kernel):
    """The widest of x, B and C; gradients as the tensors."""
    tensors = {name: x.float() for name, x in inputs(1, 9).items()}
    tensors["x"], tensors["dt"] = tensors["x"].bfloat16(), tensors["dt"].bfloat16()
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    wide = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    for got, want in zip(kernel(**leaves), ops_bmojo.ssd_scan(**wide), strict=True):
        assert got.dtype is torch.float32
        assert rel_error(got, want) < 1e-6
        (got.sum() * 2).backward(retain_graph=True)
        (want.sum() * 2).backward(retain_graph=True)
    for name, x in leaves.items():
        assert x.grad.dtype is x.dtype
        assert rel_error(x.grad, wide[name].grad) < (8e-3 if x.dtype is torch.bfloat16 else 2e-5), name


@pytest.mark.usefixtures("small_blocks")
def test_any_layout(kernel):
    """Parts of one projection, as the model has them; axes out of order; one row for all."""
    tensors = {name: x.float() for name, x in inputs(2, 18).items()}
    parts = torch.cat([tensors[name].flatten(2) for name in ("x", "B", "C")], -1)
    x, B, C = parts.split([12, 5, 5], -1)
    projected = {"x": x.unflatten(2, (2, 6)), "B": B.unflatten(2, (1, 5)), "C": C.unflatten(2, (1, 5))}
    turned = {name: x.movedim(0, -1).contiguous().movedim(-1, 0) for name, x in tensors.items()}
    spread = {name: x if name == "A" else x[:1].expand_as(x) for name, x in tensors.items()}
    for layout in (tensors | projected, turned, spread):
        want = ops_bmojo.ssd_scan(**{name: x.double() for name, x in layout.items()})
        for out, exact in zip(kernel(**layout), want, strict=True):
            assert rel_error(out, exact) < 1e-6


def test_as_an_operator_of_torch(kernel):
    """Its schema, fake and autograd are what torch.compile relies on; the graph stays whole."""
    module = sys.modules[kernel.__module__]
    tensors = inputs(1, 7, per_group=1)
    torch.library.opcheck(module._forward, [x.float().requires_grad_() for x in tensors.values()])
    want = differentiate(kernel, tensors, torch.float32)

    def scan(*args):
        y, state = kernel(*args)
        return y * 1, state * 1

    compiled = torch.compile(scan, backend="aot_eager", fullgraph=True)
    got = differentiate(compiled, tensors, torch.float32)
    assert all(torch.equal(got[name], want[name]) for name in want)
    torch.compiler.reset()


def test_no_gradient_arrives(kernel):
    """Of outputs whose use is cut off further on."""

    class CutOff(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    leaves = {name: x.float().requires_grad_() for name, x in inputs(1, 3).items()}
    loss = sum(CutOff.apply(out).sum() for out in kernel(**leaves))
    (loss + leaves["x"].sum()).backward()
    assert leaves["x"].grad.eq(1).all()
    assert leaves["B"].grad is None


@pytest.mark.usefixtures("small_blocks")
def test_a_decay_that_is_no_number_is_not_hidden(kernel):
    tensors = inputs(1, initial=False)
    tensors["A"][0] = torch.nan
    got, want = (differentiate(function, tensors, torch.float32) for function in (kernel, ops_bmojo.ssd_scan))
    assert want["y"].isnan().any()
    assert not want["y"].isnan().all()
    for name in ("y", "state", "A"):
        assert torch.equal(got[name].isnan(), want[name].isnan()), name


@pytest.mark.usefixtures("small_blocks")
def test_the_same_bits_every_time(kernel):
    first, second = (differentiate(kernel, inputs(1, per_group=3), torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_second_derivative_is_refused(kernel):
    leaves = {name: x.float().requires_grad_() for name, x in inputs(1, 3, per_group=1).items()}
    [first] = torch.autograd.grad(kernel(**leaves)[0].square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        first.square().sum().backward()


# ---------------------------------------------------------------------------- the whole model

MODELS = {
    "alone": {"layers_block_type": ["mamba2", "mamba2"], "n_groups": 2},
    "beside_attention": {"layers_block_type": ["mamba2", "bmojo"]},
}
IDS = torch.randint(3, 97, (2, 21), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_the_same(tiny_model, monkeypatch, name):
    """Logits, all gradients, and a stream in pieces, with padding on the left."""
    model = tiny_model(**MODELS[name]).to(DEVICE)
    ids, mask = IDS.to(DEVICE), torch.ones_like(IDS, device=DEVICE)
    mask[1, :5] = 0
    found = {}
    for mode in ("torch", "triton"):
        monkeypatch.setenv("BMOJO_KERNELS", mode)
        model.zero_grad()
        output = model(ids, attention_mask=mask, labels=ids)
        output.loss.backward()
        found[mode] = {"logits": output.logits.detach()[mask.bool()]}
        found[mode] |= {n: p.grad for n, p in model.named_parameters()}
        with torch.no_grad():
            cache, streamed = None, []
            for start, stop in ((0, 11), (11, 12), (12, 20), (20, 21)):
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


def test_packed_documents_are_the_same(tiny_model, monkeypatch):
    model, ids = tiny_model(**MODELS["alone"]).to(DEVICE), IDS[:1].to(DEVICE)
    positions = torch.cat([torch.arange(3), torch.arange(11), torch.arange(7)])[None].to(DEVICE)
    found = []
    for mode in ("torch", "triton"):
        monkeypatch.setenv("BMOJO_KERNELS", mode)
        with torch.no_grad():
            found.append(model(ids, position_ids=positions, use_cache=False).logits)
    assert rel_error(found[1], found[0]) < 2e-6


def test_kernels_that_no_gpu_ran_are_asked_for(monkeypatch):
    """As long as the scan's has run on none; whoever runs one on a GPU takes it out of the set, here and there."""
    files = {file.stem for folder in kernels_bmojo.__path__ for file in Path(folder).glob("*.py")}
    assert files - {"compile_report", "shared"} == kernels_bmojo.UNPROVEN
    monkeypatch.delenv("BMOJO_KERNELS", raising=False)
    assert ("ssd" in kernels_bmojo.UNPROVEN) == (
        "has not run on a GPU" in str(kernels_bmojo._obstacle("ssd_scan", "ssd", "cuda", torch.float32, "auto"))
    )
