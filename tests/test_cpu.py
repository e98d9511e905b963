"""The forms for a CPU equal their definitions: values and all gradients, in any shape, precision, memory layout and mode."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from bmojo import cpu_bmojo, kernels_bmojo, linear_bmojo, ops_bmojo
from bmojo.cache_bmojo import BMojoCache
from bmojo.call_bmojo import Call


EXACT = 1e-12  # in float64, of the norm
OPS = {
    op.definition.__name__: op
    for op in (
        kernels_bmojo.ssd_scan,
        kernels_bmojo.selective_scan,
        kernels_bmojo.causal_conv,
        kernels_bmojo.prediction_error,
        kernels_bmojo.memory_attention,
        kernels_bmojo.rms_norm,
        kernels_bmojo.silu_gate,
    )
}
ROTATE = kernels_bmojo.rotate  # whose tables are constants: not among those whose every input is differentiated
WITH_GRADIENT = [name for name in OPS if name != "prediction_error"]  # whose form for a CPU has no backward pass
some = partial(settings, deadline=None, derandomize=True, database=None)


def rel_error(got, want):
    """Root mean square error relative to ``want``: one number, whatever the scale."""
    assert got.shape == want.shape
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-12)).item()


# ---------------------------------------------------------------------------- inputs of every op


def randoms(seed: int):
    """A function from a shape to normally distributed float64."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)


def time_steps(random, kind: str, *shape):
    """dt: as in training; with pauses, tokens of dt 0; with jumps that leave next to nothing of the state; or 0 throughout."""
    dt = F.softplus(random(*shape))
    if kind == "pauses":
        dt = dt * (random(*shape) > 0)
    elif kind == "jumps":
        dt = torch.where(random(*shape) > 1, 40, dt)
    return dt * 0 if kind == "still" else dt


def ssd_inputs(
    batch=2, seq_len=11, groups=2, per_group=2, channels=3, state=4, chunk_size=3, steps="usual", initial=True, seed=0
):
    random, heads = randoms(seed), groups * per_group
    tensors = {
        "x": random(batch, seq_len, heads, channels),
        "dt": time_steps(random, steps, batch, seq_len, heads),
        "A": -random(heads).exp(),
        "B": random(batch, seq_len, groups, state),
        "C": random(batch, seq_len, groups, state),
        "initial_state": random(batch, heads, channels, state) if initial else None,
    }
    return tensors, {"chunk_size": chunk_size}


def selective_inputs(batch=2, seq_len=11, channels=5, state=3, chunk_size=2, steps="usual", initial=True, seed=0):
    random = randoms(seed)
    tensors = {
        "x": random(batch, seq_len, channels),
        "dt": time_steps(random, steps, batch, seq_len, channels),
        "A": -random(channels, state).exp(),
        "B": random(batch, seq_len, state),
        "C": random(batch, seq_len, state),
        "initial_state": random(batch, channels, state) if initial else None,
    }
    return tensors, {"chunk_size": chunk_size}


def conv_inputs(batch=2, seq_len=11, channels=5, taps=4, bias=True, seed=0):
    random = randoms(seed)
    tensors = {
        "x": random(batch, taps - 1 + seq_len, channels),
        "weight": random(channels, taps),
        "bias": random(channels) if bias else None,
    }
    return tensors, {}


def error_inputs(batch=2, seq_len=11, channels=5, kernel=3, past=0, learned=False, seed=0):
    """`past` is how many outputs came before, of all rows or of each."""
    random = randoms(seed)
    past = torch.as_tensor(past).view(-1, 1)
    tensors = {
        "y": random(batch, seq_len, channels),
        "history": random(batch, kernel, channels),
        "positions": past + torch.arange(seq_len),
        "weights": random(kernel, channels) if learned else random(kernel).exp(),
    }
    return tensors, {}


def attention_inputs(
    rows=2,
    seq_len=11,
    kv_heads=2,
    group=2,
    head_dim=3,
    window=3,
    chunk_size=2,
    memory=3,
    filled="some",
    fading=True,
    past=None,
    scores="usual",
    asks_twice=False,
    seed=0,
):
    """`past`: None, or of every row; keys reach as far back as the model's. `filled`: which places of the memory are.

    `asks_twice`: fading keys have a query of their own.
    """
    random = randoms(seed)
    before, entries = 0 if past is None else window - 1, memory + seq_len
    chunks = -(-seq_len // chunk_size)

    def tokens(count, heads=kv_heads):
        return random(rows, count, heads, head_dim)

    query = tokens(seq_len, kv_heads * group) * {"usual": 1, "equal": 0, "large": 100}[scores]
    tensors = {"query": query, "window_key": tokens(before + seq_len), "window_value": tokens(before + seq_len)}
    before = 0 if past is None else 2 * window - 1
    for name in ("fading_key", "fading_value"):
        tensors[name] = tokens(before + seq_len) if fading else None
    tensors |= dict.fromkeys(("eidetic_query", "eidetic_key", "eidetic_value", "memory"))
    if memory:
        places = torch.randint(entries, (rows, chunks, memory), generator=torch.Generator().manual_seed(seed))
        empty = {"all": places < 0, "some": places % 3 == 0, "none": places >= 0}[filled]
        if filled == "some" and chunks > 1:
            empty[:, 0] = True  # as a memory begins
        tensors |= {
            "eidetic_query": query.flip(-1),
            "eidetic_key": tokens(entries),
            "eidetic_value": tokens(entries),
            "memory": places.masked_fill(empty, -1),
        }
    tensors["past"] = None if past is None else torch.tensor(past)
    tensors["fading_query"] = tokens(seq_len, kv_heads * group) if fading and asks_twice else None
    return tensors, {"window": window, "chunk_size": chunk_size, "scale": head_dim**-0.5}


def norm_inputs(shape=(2, 11, 12), n_groups=1, seed=0):
    random = randoms(seed)
    return {"x": random(*shape), "weight": random(shape[-1])}, {"eps": 1e-5, "n_groups": n_groups}


def gate_inputs(shape=(2, 11, 5), seed=0):
    random = randoms(seed)
    return {"gate": random(*shape), "x": random(*shape)}, {}


INPUTS = {
    "ssd_scan": ssd_inputs,
    "selective_scan": selective_inputs,
    "causal_conv": conv_inputs,
    "prediction_error": error_inputs,
    "memory_attention": attention_inputs,
    "rms_norm": norm_inputs,
    "silu_gate": gate_inputs,
}
TINY = {  # for derivatives by differences
    "ssd_scan": {"batch": 1, "seq_len": 5, "groups": 2, "per_group": 2, "channels": 2, "state": 2, "chunk_size": 2},
    "selective_scan": {"batch": 1, "seq_len": 9, "channels": 2, "state": 2},
    "causal_conv": {"batch": 1, "seq_len": 4, "channels": 2, "taps": 3},
    "memory_attention": {
        "seq_len": 5,
        "kv_heads": 1,
        "head_dim": 2,
        "window": 2,
        "memory": 2,
        "past": [1, 4],
        "asks_twice": True,
    },
    "rms_norm": {"shape": (3, 4), "n_groups": 2},
    "silu_gate": {"shape": (3, 2)},
}
LAYOUTS = {
    "contiguous": lambda x: x,
    "slice": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],  # of a projection
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "every_second": lambda x: x.repeat_interleave(2, 0)[::2],
    "repeated": lambda x: x[:1].expand_as(x),
}


def lay_out(tensors, layouts):
    """Floating-point tensors in other layouts, one after the other."""
    return {
        name: LAYOUTS[layouts[i % len(layouts)]](x) if is_float(x) else x
        for i, (name, x) in enumerate(tensors.items())
    }


def is_float(x) -> bool:
    return x is not None and x.is_floating_point()


def differentiate(function, tensors, options, wanted=None, used=(0, 1), create_graph=False):
    """Outputs, and gradients of a random projection of those outputs that are used, for the inputs that are wanted."""
    wanted = [name for name, x in tensors.items() if is_float(x) and (wanted is None or name in wanted)]
    inputs = {name: x.detach().requires_grad_(name in wanted) if is_float(x) else x for name, x in tensors.items()}
    versions = {name: x._version for name, x in inputs.items() if x is not None}
    outputs = function(*inputs.values(), **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    random = randoms(7)
    weights = [random(*output.shape) for output in outputs]
    loss = sum((outputs[i].double() * weights[i]).sum() for i in used if i < len(outputs))
    leaves = [inputs[name] for name in wanted]
    if not loss.requires_grad:  # what is used depends on nothing that is wanted, and the function knows
        grads = tuple(map(torch.zeros_like, leaves))
    else:
        options = {"allow_unused": True, "materialize_grads": True, "create_graph": create_graph}
        grads = torch.autograd.grad(loss, leaves, **options)
    assert versions == {name: x._version for name, x in inputs.items() if x is not None}  # nothing was overwritten
    names = [f"output {i}" for i in range(len(outputs))] + [f"d {name}" for name in wanted]
    return dict(zip(names, outputs + grads, strict=True))


def assert_same(got, want, tolerance=EXACT):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].shape == tensor.shape, name
        assert got[name].dtype == tensor.dtype, name
        error = (got[name] - tensor).norm() / (1 + tensor.norm())  # a gradient may be 0
        assert error < tolerance, (name, error.item())


def assert_form_is_definition(name, tensors, options, tolerance=EXACT, **kwargs):
    got = differentiate(OPS[name].cpu, tensors, options, **kwargs)
    assert_same(got, differentiate(OPS[name].definition, tensors, options, **kwargs), tolerance)


# ---------------------------------------------------------------------------- any shape


SIZES = st.integers(1, 3)
LENGTHS = st.sampled_from([1, 2, 3, 4, 6, 7, 8, 9, 13, 21, 22, 65])
CHUNKS = st.sampled_from([1, 3, 7, 64, 100])
BLOCKS = st.sampled_from([64, 500, 2**12])
STEPS = st.sampled_from(["usual", "usual", "pauses", "jumps", "still"])


def subset(draw, tensors):
    """Names of the inputs that require a gradient: all, or a few."""
    names = [name for name, x in tensors.items() if is_float(x)]
    return draw(st.one_of(st.none(), st.lists(st.sampled_from(names), min_size=1, max_size=3)))


def test_scans_of_any_shape(cut):
    @some(max_examples=60)
    @given(st.data())
    def check(data):
        name = data.draw(st.sampled_from(["ssd_scan", "selective_scan"]))
        sizes = {"batch": SIZES, "seq_len": LENGTHS, "channels": st.integers(1, 5), "state": st.integers(1, 5)}
        sizes |= {"chunk_size": CHUNKS, "steps": STEPS, "initial": st.booleans()}
        if name == "ssd_scan":
            sizes |= {"groups": SIZES, "per_group": SIZES}
        tensors, options = INPUTS[name](**data.draw(st.fixed_dictionaries(sizes)))
        tensors = lay_out(tensors, data.draw(st.lists(st.sampled_from(list(LAYOUTS)), min_size=1, max_size=5)))
        used = data.draw(st.sampled_from([(0, 1), (0,), (1,)]))
        with cut(data.draw(BLOCKS)):
            assert_form_is_definition(name, tensors, options, 1e-11, wanted=subset(data.draw, tensors), used=used)

    check()


def test_convolutions_of_any_shape(cut):
    @some(max_examples=40)
    @given(st.data())
    def check(data):
        sizes = {"batch": SIZES, "seq_len": LENGTHS, "channels": st.integers(1, 9), "taps": st.integers(1, 6)}
        tensors, options = conv_inputs(**data.draw(st.fixed_dictionaries(sizes | {"bias": st.booleans()})))
        tensors = lay_out(tensors, data.draw(st.lists(st.sampled_from(list(LAYOUTS)), min_size=1, max_size=3)))
        with cut(data.draw(BLOCKS)):
            assert_form_is_definition("causal_conv", tensors, options, wanted=subset(data.draw, tensors))

    check()


def test_attention_of_any_shape(cut):
    @some(max_examples=70)
    @given(st.data())
    def check(data):
        rows = data.draw(SIZES)
        sizes = {
            "seq_len": LENGTHS,
            "kv_heads": SIZES,
            "group": SIZES,
            "head_dim": st.integers(1, 5),
            "window": st.sampled_from([1, 2, 3, 8, 40]),
            "chunk_size": st.sampled_from([1, 2, 3, 5, 64, 100]),
            "memory": st.integers(0, 4),
            "filled": st.sampled_from(["some", "some", "all", "none"]),
            "fading": st.booleans(),
            "past": st.one_of(st.none(), st.lists(st.integers(0, 30), min_size=rows, max_size=rows)),
            "scores": st.sampled_from(["usual", "usual", "equal", "large"]),
            "asks_twice": st.booleans(),
        }
        tensors, options = attention_inputs(rows, **data.draw(st.fixed_dictionaries(sizes)))
        tensors = lay_out(tensors, data.draw(st.lists(st.sampled_from(list(LAYOUTS)), min_size=1, max_size=5)))
        with cut(queries=data.draw(st.sampled_from([3, 4, 64]))):
            assert_form_is_definition("memory_attention", tensors, options, 1e-11, wanted=subset(data.draw, tensors))

    check()


LOSSES = {  # and how the gradient that arrives lies in memory
    "one_number_repeated": lambda output: output.sum(),
    "one_row_repeated": lambda output: (output * torch.arange(output.shape[-1])).sum(),
    "transposed": lambda output: output.movedim(1, -1).contiguous().square().sum(),
    "last_token": lambda output: output[:, -1].square().sum(),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", WITH_GRADIENT)
@pytest.mark.parametrize("single", [False, True])
def test_gradients_that_arrive_in_any_layout(small_blocks, name, loss, single):
    sizes = {"ssd_scan": "per_group", "memory_attention": "group"}
    tensors, options = INPUTS[name](**({sizes[name]: 1} if single and name in sizes else {}))
    found = []
    for form in (OPS[name].cpu, OPS[name].definition):
        leaves = {n: x.detach().requires_grad_() if is_float(x) else x for n, x in tensors.items()}
        outputs = form(*leaves.values(), **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = {n: x for n, x in leaves.items() if is_float(x)}
        grads = torch.autograd.grad(sum(map(LOSSES[loss], outputs)), list(wanted.values()))
        found.append(dict(zip(wanted, grads, strict=True)))
    assert_same(*found)


@pytest.mark.parametrize("before", [0, 1, 4, 9])
@pytest.mark.parametrize("past", [None, [0, 3, 20]])
def test_attention_to_any_number_of_keys_before(small_blocks, before, past):
    """Fewer keys than window and fading memory reach back to, and more."""
    tensors, options = attention_inputs(3, past=past, window=3, seq_len=13)
    random = randoms(1)
    for name in ("window_key", "window_value"):
        tensors[name] = random(3, before + 13, 2, 3)
    for name in ("fading_key", "fading_value"):
        tensors[name] = random(3, 9 - before + 13, 2, 3)
    assert_form_is_definition("memory_attention", tensors, options)


@pytest.mark.parametrize("past", [None, [0, 3]])
def test_attention_with_a_query_of_its_own_for_fading_keys(small_blocks, past):
    tensors, options = attention_inputs(asks_twice=True, past=past, seq_len=23)
    assert_form_is_definition("memory_attention", tensors, options)
    same = tensors | {"fading_query": tensors["query"]}
    shared = OPS["memory_attention"].cpu(*(tensors | {"fading_query": None}).values(), **options)
    assert torch.equal(OPS["memory_attention"].cpu(*same.values(), **options), shared)
    assert not torch.equal(OPS["memory_attention"].cpu(*tensors.values(), **options), shared)


@pytest.mark.parametrize("kind", ["all", "none"])
def test_attention_to_one_row_of_empty_memories(small_blocks, kind):
    tensors, options = attention_inputs(filled=kind)
    tensors["memory"][1] = -1 if kind == "all" else 2
    assert_form_is_definition("memory_attention", tensors, options)


def test_errors_of_any_shape(cut):
    @some(max_examples=60)
    @given(st.data())
    def check(data):
        batch = data.draw(SIZES)
        sizes = {"seq_len": LENGTHS, "channels": st.integers(1, 9), "kernel": st.integers(1, 6)}
        sizes |= {"learned": st.booleans()}
        sizes |= {"past": st.one_of(st.integers(0, 9), st.lists(st.integers(0, 9), min_size=batch, max_size=batch))}
        tensors, options = error_inputs(batch, **data.draw(st.fixed_dictionaries(sizes)))
        first = tensors["positions"][:, 0].expand(batch)
        for row, seen in enumerate(first.tolist()):  # where no output has been may be anything
            tensors["history"][row, : max(0, tensors["history"].shape[1] - seen)] = torch.nan
        layouts = st.sampled_from([layout for layout in LAYOUTS if layout != "repeated"])
        tensors = lay_out(tensors, data.draw(st.lists(layouts, min_size=1, max_size=3)))
        op = OPS["prediction_error"]
        with cut(data.draw(BLOCKS)), torch.no_grad():
            got, want = (form(*tensors.values(), **options) for form in (op.cpu, op.definition))
        assert_same({"errors": got}, {"errors": want})

    check()


@pytest.mark.parametrize("wanted", [["y"], ["history"], ["weights"], ["y", "history", "weights"]])
@pytest.mark.parametrize("learned", [False, True])
def test_errors_have_the_gradients_of_the_definition(small_blocks, wanted, learned):
    tensors, options = error_inputs(seq_len=29, learned=learned, past=[2, 5])
    assert_form_is_definition("prediction_error", tensors, options, wanted=wanted)


@pytest.mark.parametrize("shape", [(1,), (6,), (1, 1, 6), (3, 6), (2, 5, 12), (2, 2, 3, 18), (40, 30)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_norms_and_gates_of_any_shape(small_blocks, shape, layout):
    for n_groups in (1, 2, 3) if shape[-1] > 1 else (1,):
        tensors, options = norm_inputs(shape, n_groups)
        assert_form_is_definition("rms_norm", lay_out(tensors, [layout]), options)
    for wanted in (None, ["x"], ["gate"]):
        tensors, options = gate_inputs(shape)
        assert_form_is_definition("silu_gate", lay_out(tensors, [layout]), options, wanted=wanted)


def test_norm_of_zeros_and_of_large_numbers(small_blocks):
    tensors, options = norm_inputs()
    tensors["x"][0] = 0
    tensors["x"][1, :4] *= 1e100
    assert_form_is_definition("rms_norm", tensors, options)


@pytest.mark.parametrize("tables", ["shared", "of every row", "of one position"])
@pytest.mark.parametrize("seq_len", [1, 2, 37])
@pytest.mark.parametrize("layout", ["contiguous", "heads first", "part of a projection"])
def test_rotations_of_any_shape(small_blocks, tables, seq_len, layout):
    random, shape = randoms(0), (2, seq_len, 3, 6)
    table_shape = {"shared": (1, seq_len, 6), "of every row": (2, seq_len, 6), "of one position": (1, 1, 6)}[tables]
    cos, sin = random(*table_shape), random(*table_shape)
    sin[..., :3] = -sin[..., 3:]
    cos[..., :3] = cos[..., 3:]
    x = {
        "contiguous": lambda: random(*shape),
        "heads first": lambda: random(2, 3, seq_len, 6).transpose(1, 2),
        "part of a projection": lambda: random(2, seq_len, 3, 12)[..., :6],
    }[layout]().requires_grad_()
    weight, found = random(*shape), []
    for form in (ROTATE.cpu, ROTATE.definition):
        out = form(x, cos, sin)
        (first,) = torch.autograd.grad((out.sin() * weight).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        found.append({"output": out, "gradient": first, "second derivative": second})
    assert_same(*found)
    batched = [
        torch.autograd.grad(form(x, cos, sin), x, torch.stack([weight, weight * 2]), is_grads_batched=True)[0]
        for form in (ROTATE.cpu, ROTATE.definition)
    ]
    assert rel_error(*batched) < EXACT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rotations_in_any_precision(small_blocks, dtype):
    random = randoms(1)
    x = random(2, 37, 3, 6).to(dtype)
    cos, sin = random(1, 37, 6).float(), random(1, 37, 6).float()
    got = ROTATE.cpu(x, cos, sin)
    assert got.dtype == dtype
    assert torch.equal(got, ROTATE.definition(x, cos, sin))


# ---------------------------------------------------------------------------- precision


def as_in_the_model(name, dtype):
    """Inputs in the dtypes that the layers give them for activations of this one; parameters and steps of scans are wide."""
    options = {"seq_len": 70} if "seq_len" in INPUTS[name].__code__.co_varnames else {}
    tensors, options = INPUTS[name](**options)
    wide = {"dt", "A", "initial_state", "weights"}
    kept = {x: (torch.promote_types(dtype, torch.float32) if x in wide else dtype) for x in tensors}
    return {n: x.to(kept[n]) if is_float(x) else x for n, x in tensors.items()}, options


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_precision_is_that_of_the_definition(small_blocks, name, dtype):
    tensors, options = as_in_the_model(name, dtype)
    wanted = [] if name == "prediction_error" else None
    exact = {n: x.double() if is_float(x) else x for n, x in tensors.items()}
    got, plain, want = (
        run(function, inputs, options, wanted)
        for function, inputs in (
            (OPS[name].cpu, tensors),
            (OPS[name].definition, tensors),
            (OPS[name].definition, exact),
        )
    )
    resolution = torch.finfo(dtype).eps
    for n in want:
        assert got[n].dtype == plain[n].dtype, n
        assert rel_error(got[n], want[n]) <= 2 * rel_error(plain[n], want[n]) + resolution / 8, n


def run(function, tensors, options, wanted):
    """As `differentiate`, without gradients where none is wanted."""
    if wanted == []:
        with torch.no_grad():
            return {"output 0": function(*tensors.values(), **options)}
    return differentiate(function, tensors, options, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_autocast_changes_nothing(small_blocks, name, dtype):
    """In the forward and in the backward pass."""
    tensors, options = as_in_the_model(name, dtype)
    want = differentiate(OPS[name].cpu, tensors, options)
    with torch.autocast("cpu", torch.bfloat16):
        got = differentiate(OPS[name].cpu, tensors, options)
    for n, tensor in want.items():
        assert torch.equal(got[n], tensor), n


@pytest.mark.parametrize("name", ["ssd_scan", "selective_scan"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [64, 2**18])
def test_scans_at_saturation(cut, name, dtype, block):
    """All is finite where decays underflow, token after token, and as exact as the definition; dt 0 leaves the state alone."""
    tensors, options = INPUTS[name](seq_len=60, steps="jumps", chunk_size=16)
    tensors["dt"][:, 15:18] = 1e4  # across the edges of chunks and blocks
    tensors = {n: x.to(dtype) for n, x in tensors.items()}
    exact = {n: x.double() for n, x in tensors.items()}
    with cut(block):
        got = differentiate(OPS[name].cpu, tensors, options)
        still, state = OPS[name].cpu(*(tensors | {"dt": 0 * tensors["dt"]}).values(), **options)
    plain = differentiate(OPS[name].definition, tensors, options)
    want = differentiate(OPS[name].definition, exact, {"chunk_size": 1})  # no difference of large sums is taken
    for n, tensor in got.items():
        assert tensor.isfinite().all(), n
        assert rel_error(tensor, want[n]) <= 3 * rel_error(plain[n], want[n]) + 4 * torch.finfo(dtype).eps, n
    assert still.isfinite().all()
    assert torch.equal(state, tensors["initial_state"].to(state.dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_attention_at_saturation_is_finite(small_blocks, dtype):
    tensors, options = attention_inputs(past=[0, 9])
    tensors["query"] *= 1e4
    tensors["eidetic_query"] *= 1e4
    tensors = {n: x.to(dtype) if is_float(x) else x for n, x in tensors.items()}
    assert all(x.isfinite().all() for x in differentiate(OPS["memory_attention"].cpu, tensors, options).values())


# ---------------------------------------------------------------------------- modes of autograd


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_values_without_a_graph_are_those_with_one(small_blocks, name, mode):
    tensors, options = INPUTS[name]()
    want = OPS[name].cpu(*(x.detach().requires_grad_() if is_float(x) else x for x in tensors.values()), **options)
    with mode():
        got = OPS[name].cpu(*tensors.values(), **options)
    pairs = zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]
    for a, b in pairs:
        assert not a.requires_grad
        assert (a - b).norm() < EXACT if name == "prediction_error" else torch.equal(a, b)


def derivable(name, **changes):
    """The op as a function of its floating-point inputs, and these."""
    tensors, options = INPUTS[name](**TINY[name] | changes)
    names = [n for n, x in tensors.items() if is_float(x)]

    def function(*inputs, form=OPS[name].cpu):
        return form(*(tensors | dict(zip(names, inputs, strict=True))).values(), **options)

    return function, [tensors[n].requires_grad_() for n in names]


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_gradcheck(cut, name):
    function, inputs = derivable(name)
    with cut(32, 2):
        assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_gradgradcheck(cut, name):
    function, inputs = derivable(name)
    with cut(32, 2):
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("name", WITH_GRADIENT)
@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)], ids=str)
def test_a_gradient_with_a_graph_is_the_gradient(small_blocks, name, used):
    tensors, options = INPUTS[name]()
    used = used if name.endswith("scan") else (0,)
    got = differentiate(OPS[name].cpu, tensors, options, used=used, create_graph=True)
    assert_same(got, differentiate(OPS[name].definition, tensors, options, used=used))


def test_second_derivatives_of_inputs_that_depend_on_each_other(small_blocks):
    """As the model's do: the eidetic values are the window's; and one tensor may be passed twice."""
    tensors, options = attention_inputs(memory=3, filled="none")

    def attention(value, form):
        eidetic = torch.cat([value[:, :3] * 2, value], 1)
        inputs = tensors | {"window_value": value, "fading_value": value, "eidetic_value": eidetic}
        return form(*inputs.values(), **options)

    scan_tensors, scan_options = ssd_inputs(state=3)

    def scan(B, form):
        return form(*(scan_tensors | {"B": B, "C": B}).values(), **scan_options)[0]

    for name, function, x in (
        ("memory_attention", attention, tensors["window_value"]),
        ("ssd_scan", scan, scan_tensors["B"]),
    ):
        found = []
        for form in (OPS[name].cpu, OPS[name].definition):
            x = x.detach().requires_grad_()
            [first] = torch.autograd.grad(function(x, form).pow(3).sum(), x, create_graph=True)
            [second] = torch.autograd.grad(first.square().sum(), x)
            found.append({"first": first, "second": second})
        assert_same(*found)


def test_no_gradient_arrives(small_blocks):
    """Of an output whose use is cut off further on."""

    class CutOff(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    for name in WITH_GRADIENT:
        for create_graph in (False, True):
            tensors, options = INPUTS[name]()
            x = tensors["x" if "x" in tensors else "query"].requires_grad_()
            outputs = OPS[name].cpu(*tensors.values(), **options)
            output = outputs[0] if isinstance(outputs, tuple) else outputs
            grads = torch.autograd.grad(CutOff.apply(output).sum(), x, allow_unused=True, create_graph=create_graph)
            assert grads[0] is None or not grads[0].any()


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_checkpointed(small_blocks, name):
    tensors, options = INPUTS[name]()

    def again(*inputs, **options):
        return checkpoint(partial(OPS[name].cpu, **options), *inputs, use_reentrant=False)

    got, want = (differentiate(function, tensors, options) for function in (again, OPS[name].cpu))
    for n, tensor in want.items():
        assert torch.equal(got[n], tensor), n


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_backward_twice(small_blocks, name):
    tensors, options = INPUTS[name]()
    leaves = [x.requires_grad_() for x in tensors.values() if is_float(x)]
    outputs = OPS[name].cpu(*tensors.values(), **options)
    loss = (outputs[0] if isinstance(outputs, tuple) else outputs).square().sum()
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True) for _ in range(2))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---------------------------------------------------------------------------- which form runs


def recorded(name):
    """The op anew, and the list in which its forms say that they ran."""
    ran = []

    def record(form, function):
        def recording(*args, **kwargs):
            ran.append(form)
            return function(*args, **kwargs)

        recording.__name__ = name
        return recording

    op = OPS[name]
    return kernels_bmojo.dispatch(record("definition", op.definition), record("cpu", op.cpu)), ran


class Subclass(torch.Tensor):
    pass


def under_autocast(function, x):
    with torch.autocast("cpu", torch.bfloat16):
        return function(x)


def in_forward_mode(function, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def without(mode):
    def run(function, x):
        with mode():
            return function(x)

    return run


CONTEXTS = {
    "plain": (lambda f, x: f(x), "cpu"),
    "parameter": (lambda f, x: f(torch.nn.Parameter(x)), "cpu"),
    "backward": (lambda f, x: torch.autograd.grad(f(x.requires_grad_()).sum(), x), "cpu"),
    "no_grad": (without(torch.no_grad), "cpu"),
    "inference_mode": (without(torch.inference_mode), "cpu"),
    "autocast": (under_autocast, "cpu"),
    "grad": (lambda f, x: torch.func.grad(lambda x: f(x).sum())(x), "definition"),
    "vmap": (lambda f, x: torch.func.vmap(f)(torch.stack([x, 2 * x])), "definition"),
    "jvp": (lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)), "definition"),
    "forward_ad": (in_forward_mode, "definition"),
    "compile": (lambda f, x: torch.compile(f, backend="eager", fullgraph=True)(x), "definition"),
    "subclass": (lambda f, x: f(x.as_subclass(Subclass)), "definition"),
    "meta": (lambda f, x: f(x.to("meta")), "definition"),
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_which_form_runs(context):
    call, wanted = CONTEXTS[context]
    op, ran = recorded("causal_conv")
    tensors, _ = conv_inputs()
    rest = [tensors["weight"], tensors["bias"]]
    if context == "meta":
        rest = [x.to("meta") for x in rest]
    call(lambda x: op(x, *rest), tensors["x"])
    assert ran == [wanted]


@pytest.mark.parametrize("mode", kernels_bmojo.MODES)
def test_which_form_the_environment_asks_for(monkeypatch, mode):
    op, ran = recorded("causal_conv")
    tensors, _ = conv_inputs()
    monkeypatch.setenv("BMOJO_KERNELS", mode)
    op(*tensors.values())
    assert ran == ["definition" if mode == "definition" else "cpu"]


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_functional_transforms(name):
    """They give what the definition gives."""
    function, inputs = derivable(name, **({"seq_len": 8} if name == "selective_scan" else {}))  # no checkpoint in it
    inputs = [x.detach() for x in inputs]

    def loss(*inputs, form):
        outputs = function(*inputs, form=form)
        return sum(output.sin().sum() for output in (outputs if isinstance(outputs, tuple) else (outputs,)))

    every = tuple(range(len(inputs)))
    transforms = {
        "grad": lambda f: torch.func.grad(f, every)(*inputs),
        "hessian": lambda f: torch.func.hessian(f)(*inputs),
        "vmap": lambda f: torch.func.vmap(f)(*(torch.stack([x, x / 2]) for x in inputs)),
        "jvp": lambda f: torch.func.jvp(f, tuple(inputs), tuple(x.cos() for x in inputs)),
    }
    for transform in transforms.values():
        got, want = (transform(partial(loss, form=form)) for form in (OPS[name], OPS[name].definition))
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_batched_gradients(small_blocks, name):
    """Under vmap over the backward pass of a plain forward pass: `jacobian(vectorize=True)`."""
    function, inputs = derivable(name)
    found = []
    for form in (OPS[name], OPS[name].definition):
        outputs = function(*inputs, form=form)
        output = outputs[0] if isinstance(outputs, tuple) else outputs
        grads = torch.stack([output.detach().cos(), output.detach().sin()])
        found.append(torch.autograd.grad(output, inputs, grads, is_grads_batched=True, allow_unused=True))
    for got, want in zip(*found, strict=True):
        assert got is want is None or (got - want).norm() < EXACT * (1 + want.norm())


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_compiled(name):
    """In one graph, with its backward pass; it is the definition's."""
    tensors, options = INPUTS[name](**TINY[name])
    torch.compiler.reset()
    compiled = torch.compile(OPS[name], backend="eager", fullgraph=True)
    got = differentiate(compiled, tensors, options)
    assert_same(got, differentiate(OPS[name].definition, tensors, options))


# ---------------------------------------------------------------------------- memory


def kept_for_backward(name, seq_len) -> list[int]:
    """Elements of every tensor that the graph of one call keeps, counting each storage once."""
    options = {"seq_len": seq_len}
    if name == "memory_attention":
        options |= {"window": 32, "chunk_size": 8}
    elif "shape" in INPUTS[name].__code__.co_varnames:
        options = {"shape": (2, seq_len, 6)}
    tensors, options = INPUTS[name](**options)
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    for x in tensors.values():
        if is_float(x):
            x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = OPS[name].cpu(*tensors.values(), **options)
    assert (outputs[0] if isinstance(outputs, tuple) else outputs).requires_grad
    return list(sizes.values())


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_a_graph_keeps_little_and_in_proportion_to_the_length(small_blocks, name):
    """Not the states of all tokens, and no score: a few times what goes in."""
    one, two, three = (kept_for_backward(name, seq_len) for seq_len in (192, 384, 576))
    assert sum(three) - sum(two) == sum(two) - sum(one)
    tensors, _ = INPUTS[name]()
    given = sum(x.numel() for x in tensors.values() if is_float(x) and x.dim() > 2)
    assert sum(two) - sum(one) < 3 * 192 * given / (11 if name != "causal_conv" else 14)


# ---------------------------------------------------------------------------- the whole model


MODELS = {
    "mamba2": {},
    "mamba": {"ssm_type": "mamba"},
    "rank": {"eidetic_position": "rank"},
    "untied": {"tie_attn_weights": False, "n_groups": 2},
    "no_memory": {"eidetic_size": 0},
    "no_fading": {"fading_span": False, "innovation_predictor": "recent"},
    "every_layer": {
        "layers_block_type": ["bmojo", "mamba2", "sliding_attention", "mamba", "full_attention"],
        "num_hidden_layers": 5,
        "innovation_predictor": "learnable",
    },
}
MODELS["short_window"] = MODELS["every_layer"] | {"sliding_window": 5}
STEPS_OF_TRAINING = [
    *((name, "plain") for name in MODELS),
    *((name, kind) for name in ("mamba2", "mamba", "every_layer") for kind in ("padded", "packed", "checkpointed")),
    *((name, "penalty") for name in ("mamba2", "rank")),  # on the gradient
]


@pytest.fixture(scope="module")
def models(tiny_model):
    """Tiny models by name, in which no parameter is as initialised."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = tiny_model(dtype=torch.float64, **MODELS[name])
            random = randoms(0)
            for parameter in made[name].parameters():
                parameter.data += 0.3 * random(*parameter.shape)
        return copy.deepcopy(made[name])

    return make


def in_both_forms(cut, monkeypatch, function):
    """What a function gives with the forms for a CPU, in small blocks, and with the definitions."""
    found = []
    for mode in ("auto", "definition"):
        monkeypatch.setenv("BMOJO_KERNELS", mode)
        with cut(256, 8):
            found.append(function())
    return found


@pytest.mark.parametrize(("name", "kind"), STEPS_OF_TRAINING)
def test_training_is_the_definitions_training(cut, models, monkeypatch, name, kind):
    """Logits and the gradients of all parameters, beyond 8 windows."""
    ids = torch.randint(3, 97, (2, 43), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids}
    if kind == "padded":
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][0, :9] = inputs["attention_mask"][1, 31:] = 0
    elif kind == "packed":
        inputs["seq_idx"] = torch.tensor([0] * 3 + [1] * 29 + [2] * 11).expand(2, -1)

    def step():
        model = models(name).train()
        if kind == "checkpointed":
            model.activation_checkpointing_enable({"use_reentrant": False})
        logits = model(**inputs, use_cache=False).logits
        parameters = dict(model.named_parameters())
        loss = (logits * randoms(2)(*logits.shape)).mean()
        grads = torch.autograd.grad(
            loss, list(parameters.values()), create_graph=kind == "penalty", allow_unused=True, materialize_grads=True
        )
        if kind == "penalty":
            penalty = sum(grad.square().sum() for grad in grads)
            grads = torch.autograd.grad(penalty, list(parameters.values()), allow_unused=True, materialize_grads=True)
        return {"logits": logits} | dict(zip(parameters, grads, strict=True))

    got, want = in_both_forms(cut, monkeypatch, step)
    assert_same(got, want, 1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_a_stream_is_the_definitions_stream(cut, models, monkeypatch, name):
    """Logits of calls of any length and all that the cache then holds, of rows of different lengths."""
    ids = torch.randint(3, 97, (3, 60), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :8] = mask[1, 20:25] = 0

    @torch.no_grad()
    def read():
        model = models(name)
        cache, logits = BMojoCache(model.config), []
        for part, kept in zip(*(x.split([13, 1, 20, 1, 1, 24], 1) for x in (ids, mask)), strict=True):
            logits.append(model(part, attention_mask=kept, cache=cache).logits)
        return {"logits": torch.cat(logits, 1)} | cache.tensors()

    got, want = in_both_forms(cut, monkeypatch, read)
    for name, tensor in want.items():
        finite = tensor.isfinite()
        assert torch.equal(got[name].isfinite(), finite), name
        assert rel_error(got[name][finite], tensor[finite]) < 1e-10, name


# ----------------------------------------------------------------------------------------------------------------------
# One row: projections and norms of a single token
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["own products", "torch's products"])
def own_products(request, monkeypatch):
    """The machine as one on which torch's products of few rows are slow, or not; every weight large enough to choose."""
    limits = {torch.float32: (1, 768, 0), torch.bfloat16: (2, math.inf, 0)} if request.param else {}
    for module in (cpu_bmojo, linear_bmojo):
        monkeypatch.setattr(module, "ROW_PRODUCTS", limits)
    return request.param


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(dtype, shape) for dtype in (torch.float32, torch.bfloat16) for shape in ((1, 1, 48), (1, 48), (48,))]
    + [(torch.bfloat16, (1, 2, 48))],
    ids=str,
)
@pytest.mark.parametrize("rows", [1, 97, 20_011])  # the last in more than one part
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("strided", [True, False])
def test_projection_of_few_rows_is_as_exact_as_torch(own_products, dtype, shape, rows, bias, strided):
    random = randoms(0)
    x, weight, bias = (part if part is None else part.to(dtype) for part in (random(*shape), random(rows, 48), random(rows) if bias else None))  # fmt: skip
    want = F.linear(*(part if part is None else part.double() for part in (x, weight, bias)))
    if strided:
        x, weight = torch.stack([x, x], -1)[..., 0], torch.cat([weight, weight], 1)[:, 48:]
    with torch.no_grad():
        got, plain = cpu_bmojo.linear_of_row(x, weight, bias), F.linear(x, weight, bias)
    assert got.shape == want.shape
    assert got.dtype is dtype
    assert rel_error(got, want) <= 2 * rel_error(plain, want) + 1e-7


def test_projections_keep_what_they_returned(own_products):
    """The memory that products are written to is used again; results are not in it."""
    random = randoms(0)
    x, weight = random(1, 1, 48).float(), random(97, 48).float()
    with torch.inference_mode():
        first = cpu_bmojo.linear_of_row(x, weight)
        kept = first.clone()
        cpu_bmojo.linear_of_row(-2 * x, weight)
    with torch.no_grad():  # memory made in inference mode could not be written now
        cpu_bmojo.linear_of_row(3 * x, weight)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_projections_in_other_dtypes_and_under_autocast_are_torch_s(own_products, dtype):
    random = randoms(0)
    x, weight = random(1, 1, 48).to(dtype), random(97, 48).to(dtype)
    with torch.no_grad():
        assert torch.equal(cpu_bmojo.linear_of_row(x, weight), F.linear(x, weight))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            want = F.linear(x.float(), weight.float())
            got = cpu_bmojo.linear_of_row(x.float(), weight.float())
    assert got.dtype is want.dtype is torch.bfloat16
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation_on_either_kind_of_processor(models, own_products, monkeypatch, dtype):
    """Whole model, token by token, with every projection free to choose."""
    calls = []
    chosen = linear_bmojo.linear_of_row
    monkeypatch.setattr(linear_bmojo, "linear_of_row", lambda *args: calls.append(args) or chosen(*args))
    model = copy.deepcopy(models("short_window")).to(dtype)
    ids = torch.randint(3, 97, (1, 30), generator=torch.Generator().manual_seed(1))
    cache = BMojoCache(model.config)
    with torch.no_grad():
        want = model(ids).logits
        got = torch.cat([model(token, cache=cache).logits for token in ids.split(1, 1)], 1)
    assert rel_error(got.float(), want.float()) < (1e-5 if dtype is torch.float32 else 0.05)
    assert bool(calls) == own_products


@pytest.mark.parametrize("change", ["pre-hook", "hook", "global hook", "forward", "subclass"])
def test_a_projection_that_is_more_than_a_product_is_called(own_products, monkeypatch, change):
    """Hooks, what accelerate puts in place of forward, LoRA and quantized layers see every token."""
    layer, x, seen, handles = torch.nn.Linear(48, 7), torch.ones(1, 1, 48), [], []
    if change == "pre-hook":
        handles.append(layer.register_forward_pre_hook(lambda *_: seen.append(1)))
    elif change == "hook":
        handles.append(layer.register_forward_hook(lambda *_: seen.append(1)))
    elif change == "global hook":
        handles.append(torch.nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1)))
    elif change == "forward":
        layer.forward = lambda x: seen.append(1) or F.linear(x, layer.weight, layer.bias)
    else:
        layer.__class__ = type("Other", (torch.nn.Linear,), {"forward": lambda self, x: seen.append(1)})
    with torch.no_grad():
        linear_bmojo.project(layer, x)
        assert seen == [1]
        for handle in handles:
            handle.remove()
        calls = []
        monkeypatch.setattr(linear_bmojo, "linear_of_row", lambda *args: calls.append(args))
        linear_bmojo.project(torch.nn.Linear(48, 7), x)
    assert bool(calls) == own_products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [None, [1, 0]])
@torch.no_grad()
def test_a_cache_is_written_in_place_bit_by_bit(dtype, lengths):
    """16-bit floats go in as integers, NaN and all; a row without a token stays as it is."""
    random = randoms(0)
    state, new = random(2, 3, 7, 4).to(dtype), random(2, 3, 2, 4).to(dtype)
    new[0, 0, 0, :2] = torch.tensor([math.nan, -0.0])
    index = torch.tensor([[1, 5], [0, 6]])[:, None, :, None].expand(2, 3, 2, 4)
    want = state.clone()
    for row, slots in enumerate(index[:, 0, :, 0].tolist()):
        if lengths is None or lengths[row]:
            want[row, :, slots] = new[row]
    lengths = None if lengths is None else torch.tensor(lengths)
    call = Call(None, lengths, torch.zeros(1, 1), None, None, None, 1.0, True, True, False, None, 0, None)
    elsewhere = call.but(in_place=False).put(state, 2, index, new)
    got = call.put(state, 2, index, new.transpose(0, 1).contiguous().transpose(0, 1))
    assert got is state is not elsewhere
    bits = {2: torch.int16, 4: torch.int32}[state.element_size()]
    for tensor in (got, elsewhere):
        assert torch.equal(tensor.view(bits), want.view(bits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory", [None, 9])
def test_attention_to_a_16_bit_cache_rounds_its_result_alone(dtype, memory):
    random = randoms(0)
    query, key, value = (random(*shape).to(dtype) for shape in ((2, 1, 4, 8), (2, 2, 13, 8), (2, 2, 13, 8)))
    others = [None if memory is None else random(2, 1, 4, 8).to(dtype)]
    mask = torch.zeros(1, 1, 13).masked_fill(torch.arange(13) == 3, -torch.inf)
    with torch.no_grad():
        got = ops_bmojo.cache_attention(query, key, value, mask, *others, memory=memory)
        wide = [None if x is None else x.double() for x in (query, key, value, mask, *others)]
        want = ops_bmojo.cache_attention(*wide, memory=memory)
    assert got.dtype is dtype
    assert (got.double() - want).abs().max() <= want.abs().max() * torch.finfo(dtype).eps / 2 + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 48), (1, 48), (48,)], ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1, 1e15])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_norm_of_one_row_is_as_exact_as_the_definition(dtype, shape, size, mode):
    random = randoms(0)
    x, weight = (size * random(*shape)).to(dtype), torch.nn.Parameter(random(48).to(dtype))
    want = ops_bmojo.rms_norm(x.double(), weight.double(), 1e-6)
    with mode():
        got, plain = cpu_bmojo.rms_norm_of_row(x, weight, 1e-6), ops_bmojo.rms_norm(x, weight, 1e-6)
    assert got.shape == want.shape
    assert got.dtype is dtype
    assert got.requires_grad == (mode is torch.enable_grad)
    assert rel_error(got, want) <= 2 * rel_error(plain, want) + 1e-7


@pytest.mark.parametrize("entry", [torch.nan, torch.inf, 0.0])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_norm_of_one_row_shows_what_is_not_finite(entry, eps):
    x, weight = torch.full((1, 1, 8), entry), torch.ones(8)
    with torch.no_grad():
        got, want = cpu_bmojo.rms_norm_of_row(x, weight, eps), ops_bmojo.rms_norm(x, weight, eps)
    assert torch.equal(got.isfinite(), want.isfinite())
    assert got.isfinite().all() == (entry == 0 and eps > 0)


@pytest.mark.parametrize(
    "dtypes", [(torch.float16, torch.float16), (torch.float64,) * 2, (torch.float32, torch.bfloat16)]
)
def test_norm_of_one_row_in_other_dtypes_is_the_definition(dtypes):
    random = randoms(0)
    x, weight = random(1, 1, 48).to(dtypes[0]), random(48).to(dtypes[1])
    with torch.no_grad():
        got, want = cpu_bmojo.rms_norm_of_row(x, weight, 1e-6), ops_bmojo.rms_norm(x, weight, 1e-6)
    assert got.dtype is want.dtype
    assert torch.equal(got, want)


def test_forms_of_one_row_stand_back_where_something_looks_through():
    """torch.func and subclasses of tensors see operations that they know."""
    x, weight = randoms(0)(1, 48).float(), torch.ones(48)

    class Named(torch.Tensor):
        pass

    with torch.no_grad():
        want = ops_bmojo.rms_norm(x, weight, 1e-6)
        batched = torch.func.vmap(lambda row: cpu_bmojo.rms_norm_of_row(row[None], weight, 1e-6))(x)
        torch.testing.assert_close(batched[0], want)
        named = cpu_bmojo.rms_norm_of_row(x, weight.as_subclass(Named), 1e-6)
        assert type(named) is Named
        torch.testing.assert_close(named.as_subclass(torch.Tensor), want)
