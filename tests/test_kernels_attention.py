"""The attention kernel against the definition in float64; on a CPU under Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from bmojo import kernels_bmojo, ops_bmojo
from bmojo_tests.kernel_checks import DEVICE, needs_triton, poisoned, rel_error


ROOT = Path(__file__).resolve().parent.parent
pytestmark = needs_triton


@pytest.fixture(scope="module")
def kernel():
    return kernels_bmojo.load("memory_attention", "attention")


def is_float(x) -> bool:
    return x is not None and x.is_floating_point()


def inputs(
    rows=2,
    seq_len=15,
    kv_heads=2,
    group=2,
    head_dim=20,
    window=7,
    chunk_size=5,
    memory=3,
    filled=0.7,
    fading=True,
    own_query=False,
    past=None,
    before=None,
    seed=0,
):
    """Arguments of the op in float64. `past`: None, or of every row; `before`: keys of window and fading span before the call."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count, heads=kv_heads):
        return torch.randn(rows, count, heads, head_dim, generator=generator, dtype=torch.float64)

    if before is None:
        before = (0, 0) if past is None else (window - 1, 2 * window - 1)
    heads, (near, far), entries = kv_heads * group, before, memory + seq_len
    tensors = {"query": tokens(seq_len, heads)}
    tensors |= {name: tokens(near + seq_len) for name in ("window_key", "window_value")}
    tensors |= {name: tokens(far + seq_len) if fading else None for name in ("fading_key", "fading_value")}
    tensors |= dict.fromkeys(("eidetic_query", "eidetic_key", "eidetic_value", "memory"))
    if memory:
        places = torch.randint(entries, (rows, -(-seq_len // chunk_size), memory), generator=generator)
        empty = torch.rand(places.shape, generator=generator) >= filled
        tensors["eidetic_query"] = tokens(seq_len, heads)
        tensors |= {name: tokens(entries) for name in ("eidetic_key", "eidetic_value")}
        tensors["memory"] = places.masked_fill(empty, -1)
    tensors["past"] = None if past is None else torch.tensor(past)
    tensors["fading_query"] = tokens(seq_len, heads) if own_query else None
    tensors = {name: x if x is None else x.to(DEVICE) for name, x in tensors.items()}
    return tensors, {"window": window, "chunk_size": chunk_size, "scale": head_dim**-0.5}


def differentiate(function, tensors, options, dtype=torch.float64):
    """The output and the gradients of all floating-point tensors."""
    leaves = {name: x.detach().to(dtype).requires_grad_() if is_float(x) else x for name, x in tensors.items()}
    out = function(*leaves.values(), **options)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out.backward(d_out.to(out))
    return {"out": out.detach()} | {name: x.grad for name, x in leaves.items() if is_float(x)}


def errors(kernel, tensors, options, dtype=torch.float32):
    """Of the kernel's output and gradients, which are all written, against the definition in float64."""
    want = differentiate(ops_bmojo.memory_attention, tensors, options)
    with poisoned():
        got = differentiate(kernel, tensors, options, dtype)
    assert all(x.isfinite().all() for x in got.values())
    return {name: rel_error(got[name], want[name]) for name in want}


CASES = {
    "one_token": {"seq_len": 1},
    "within_a_window": {"seq_len": 6},
    "many_blocks": {
        "seq_len": 67,
        "rows": 1,
        "kv_heads": 1,
        "group": 3,
        "head_dim": 16,
        "window": 37,
        "chunk_size": 33,
    },
    "wide_window": {"window": 50},
    "window_of_1": {"window": 1},
    "chunk_of_1": {"chunk_size": 1},
    "chunk_above_length": {"chunk_size": 40},
    "many_places": {"memory": 41, "rows": 1, "seq_len": 11, "chunk_size": 9},
    "one_place": {"memory": 1},
    "a_head_per_key": {"group": 1},
    "one_key_for_all": {"kv_heads": 1, "group": 5},
    "group_above_block": {"kv_heads": 1, "group": 71, "seq_len": 4, "rows": 1, "window": 2, "chunk_size": 3},
    "head_dim_6": {"head_dim": 6},
    "no_fading": {"fading": False},
    "no_memory": {"memory": 0},
    "window_alone": {"fading": False, "memory": 0},
    "memory_empty": {"filled": 0.0},
    "memory_full": {"filled": 1.0},
    "own_query": {"own_query": True},
    "own_query_alone": {"own_query": True, "memory": 0},
    "past": {"past": [0, 3]},
    "far_past": {"past": [2**40, 17]},
    "past_and_own_query": {"past": [5, 0], "own_query": True, "seq_len": 9},
    "keys_before_without_past": {"before": (4, 11)},
    "few_keys_before": {"past": [9, 2], "before": (2, 1)},
    "more_keys_before_than_seen": {"past": [60, 31], "before": (45, 40), "seq_len": 3},
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(kernel, case):
    tensors, options = inputs(**CASES[case])
    assert max(errors(kernel, tensors, options).values()) < 2e-6


@pytest.mark.parametrize("head_dim", [16, 40, 64, 96, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_head_size_is_as_exact_as_torch(kernel, head_dim, dtype):
    tensors, options = inputs(1, 19, 1, 2, head_dim, own_query=True)
    tensors = {name: x.to(dtype).double() if is_float(x) else x for name, x in tensors.items()}
    want = differentiate(ops_bmojo.memory_attention, tensors, options)
    plain = differentiate(ops_bmojo.memory_attention, tensors, options, dtype)
    fast = differentiate(kernel, tensors, options, dtype)
    factor = (
        3 if dtype is torch.bfloat16 and DEVICE == "cpu" else 2
    )  # the interpreter cuts bits off instead of rounding
    for name, exact in want.items():
        assert fast[name].dtype is dtype
        assert rel_error(fast[name], exact) <= factor * rel_error(plain[name], exact) + 1e-6, name


@pytest.mark.parametrize("head_dim", [192, 256])
def test_large_heads(kernel, head_dim):
    tensors, options = inputs(1, 19, 1, 2, head_dim)
    assert max(errors(kernel, tensors, options).values()) < 2e-6


def test_heads_beyond_all_room_are_refused(kernel):
    tensors, options = inputs(1, 2, 1, 1, 260)
    with pytest.raises(ValueError, match=r"head_dim is 260.*BMOJO_KERNELS=torch"):
        kernel(*tensors.values(), **options)


def test_an_entry_in_the_memory_of_every_chunk_and_twice_in_each(kernel):
    tensors, options = inputs(seq_len=41, chunk_size=2, memory=4, filled=1.0)
    tensors["memory"][..., 1:3] = 5
    assert max(errors(kernel, tensors, options).values()) < 2e-6


def test_a_query_for_fading_tokens_that_are_not_there(kernel):
    tensors, options = inputs(own_query=True, fading=False, memory=0)
    tensors |= {name: x if x is None or not is_float(x) else x.float() for name, x in tensors.items()}
    grads = {}
    for function in (kernel, ops_bmojo.memory_attention):
        query = tensors["query"].clone().requires_grad_()
        with poisoned():
            function(**tensors | {"query": query}, **options).square().sum().backward()
        grads[function] = query.grad
    assert rel_error(grads[kernel], grads[ops_bmojo.memory_attention]) < 2e-6


@pytest.mark.parametrize("chunks", [0, 2, 9])
def test_memories_of_fewer_or_more_chunks_than_there_are(kernel, chunks):
    tensors, options = inputs()
    places = torch.full((2, chunks, 3), -1, device=DEVICE)
    known = min(chunks, tensors["memory"].shape[1])
    places[:, :known] = tensors["memory"][:, :known]
    tensors["memory"] = places
    assert max(errors(kernel, tensors, options).values()) < 2e-6


@pytest.mark.parametrize(("factor", "tolerance"), [(0, 2e-6), (100, 1e-4)])
def test_equal_and_far_apart_scores(kernel, factor, tolerance):
    """Gradients come from weights that are made anew from the log sums: of hundreds, whose last digit is 3e-5."""
    tensors, options = inputs(own_query=True)
    for name in ("query", "eidetic_query", "fading_query"):
        tensors[name] *= factor
    found = errors(kernel, tensors, options)
    assert found["out"] < 2e-6
    assert (
        max(found[name] for name in found if factor or "key" not in name) < tolerance
    )  # keys' are 0 where queries are


def test_what_does_not_exist_may_be_anything(kernel):
    """NaN at positions below 0 and in entries that no memory holds."""
    tensors, options = inputs(past=[2, 0])
    for row, past in enumerate(tensors["past"].tolist()):
        for name, reach in (("window", 6), ("fading", 13)):
            for kind in ("key", "value"):
                tensors[f"{name}_{kind}"][row, : reach - past] = torch.nan
    tensors["memory"][tensors["memory"] == 3] = -1
    for name in ("eidetic_key", "eidetic_value"):
        tensors[name][:, 3] = torch.nan
    clean = {name: x.nan_to_num() if is_float(x) else x for name, x in tensors.items()}
    want = differentiate(ops_bmojo.memory_attention, clean, options)
    with poisoned():
        got = differentiate(kernel, tensors, options, torch.float32)
    assert max(rel_error(got[name], want[name]) for name in want) < 2e-6


def test_queries_that_see_nothing(kernel):
    """Positions below 0: their output is 0, and they leave no gradient."""
    tensors, options = inputs(1, 9, past=[-4], before=(0, 0), memory=0)
    with poisoned():
        got = differentiate(kernel, tensors, options, torch.float32)
    assert got["out"][:, :4].eq(0).all()
    assert got["query"][:, :4].eq(0).all()
    assert all(x.isfinite().all() for x in got.values())


def test_any_layout(kernel):
    tensors, options = inputs(own_query=True, past=[3, 1])
    turned = {}
    for i, (name, x) in enumerate(tensors.items()):
        strided = [lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: torch.cat([x, x], -1)[..., :20]]
        turned[name] = strided[i % 2](x) if is_float(x) else x
    assert max(errors(kernel, turned, options).values()) < 2e-6
    expanded = {name: x[:1].expand_as(x) if is_float(x) else x for name, x in tensors.items()}
    assert max(errors(kernel, expanded, options).values()) < 2e-6


def test_as_an_operator_of_torch(kernel):
    """Its schema, fake and autograd are what torch.compile relies on; the graph stays whole."""
    module = sys.modules[kernel.__module__]
    tensors, options = inputs(1, 7, own_query=True)
    leaves = [x.float().requires_grad_() if is_float(x) else x for x in tensors.values()]
    torch.library.opcheck(module._forward, (*leaves, *options.values()))
    want = differentiate(kernel, tensors, options, torch.float32)
    compiled = torch.compile(lambda *args, **kwargs: kernel(*args, **kwargs) * 1, backend="aot_eager", fullgraph=True)
    got = differentiate(compiled, tensors, options, torch.float32)
    assert max(rel_error(got[name], want[name]) for name in want) == 0
    torch.compiler.reset()


def test_no_gradient_arrives(kernel):
    """Of an output whose use is cut off further on."""

    class CutOff(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    tensors, options = inputs(1, 3)
    leaves = {name: x.float().requires_grad_() if is_float(x) else x for name, x in tensors.items()}
    (CutOff.apply(kernel(*leaves.values(), **options)).sum() + leaves["query"].sum()).backward()
    assert leaves["query"].grad.eq(1).all()
    assert leaves["window_key"].grad is None


def test_the_same_bits_every_time(kernel):
    tensors, options = inputs(filled=1.0, chunk_size=2)
    first, second = (differentiate(kernel, tensors, options, torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_second_derivative_is_refused(kernel):
    tensors, options = inputs(1, 3, memory=0)
    leaves = [x.float().requires_grad_() if is_float(x) else x for x in tensors.values()]
    [first] = torch.autograd.grad(kernel(*leaves, **options).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        first.square().sum().backward()


def test_log_sums(kernel):
    """Of the first token, which sees itself alone: its score."""
    tensors, options = inputs(fading=False, memory=0, group=1)
    leaves = [x.float().requires_grad_() if is_float(x) else x for x in tensors.values()]
    _, log_sum = sys.modules[kernel.__module__]._forward(*leaves, *options.values())
    score = (tensors["query"][:, 0] * tensors["window_key"][:, 0]).sum(-1) * options["scale"]
    assert rel_error(log_sum[:, 0], score) < 1e-6
    assert not log_sum.requires_grad


# ---------------------------------------------------------------------------- the whole model

MODELS = {
    "plain": {},
    "own_query": {"tie_attn_weights": False, "fading_query": True},
    "rank": {"eidetic_position": "rank", "num_key_value_heads": 1},
    "no_memory": {"eidetic_size": 0},
    "window": {"layers_block_type": ["sliding_attention", "bmojo"]},
}
IDS = torch.randint(3, 97, (2, 26), generator=torch.Generator().manual_seed(0))


@contextmanager
def forced(monkeypatch, mode: str):
    with monkeypatch.context() as patch:
        patch.setenv("BMOJO_KERNELS", mode)
        yield


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_the_same(tiny_model, monkeypatch, name):
    """Logits, all gradients, and a stream in pieces, with padding on the left."""
    model = tiny_model(**MODELS[name]).to(DEVICE)
    ids, mask = IDS.to(DEVICE), torch.ones_like(IDS, device=DEVICE)
    mask[1, :5] = 0
    found = {}
    for mode in ("torch", "triton"):
        with forced(monkeypatch, mode):
            model.zero_grad()
            output = model(ids, attention_mask=mask, labels=ids)
            output.loss.backward()
            found[mode] = {"logits": output.logits.detach()[mask.bool()]}
            found[mode] |= {n: p.grad for n, p in model.named_parameters()}
            with torch.no_grad():
                cache, streamed = None, []
                for start, stop in ((0, 11), (11, 12), (12, 25), (25, 26)):
                    output = model(ids[:, start:stop], attention_mask=mask[:, :stop], cache=cache, use_cache=True)
                    cache, streamed = output.cache, [*streamed, output.logits]
            found[mode]["streamed"] = torch.cat(streamed, 1)[mask.bool()]
    want, got = found["torch"], found["triton"]
    assert want.keys() == got.keys()
    for key in want:
        assert rel_error(got[key], want[key]) < 2e-5, key
    assert rel_error(got["streamed"], got["logits"]) < 2e-5


def test_packed_documents_are_the_same(tiny_model, monkeypatch):
    model, ids = tiny_model().to(DEVICE), IDS[:1].to(DEVICE)
    positions = torch.cat([torch.arange(3), torch.arange(14), torch.arange(9)])[None].to(DEVICE)
    found = []
    for mode in ("torch", "triton"):
        with forced(monkeypatch, mode), torch.no_grad():
            found.append(model(ids, position_ids=positions, use_cache=False).logits)
    assert rel_error(found[1], found[0]) < 2e-6


# ---------------------------------------------------------------------------- the report

REPORT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("compile_report", "kernels/compile_report.py")
report = sys.modules["compile_report"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report)
chosen = ["--dtypes", "bf16", "--kernels", "fwd_kernel 16", "--targets"]
fits = report.main([*chosen, "sm_80", "gfx942"])
report.TARGETS["sm_80"] = report.TARGETS["sm_80"]._replace(shared_memory=1000)
does_not = report.main([*chosen, "sm_80"])
assert (fits, does_not) == (0, 1), (fits, does_not)
"""


def run_report(*command):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_the_report_compiles_and_counts():
    done = run_report("-c", REPORT)
    assert done.returncode == 0, done.stdout + done.stderr
    fits, gfx, does_not = [line for line in done.stdout.splitlines() if line.startswith("_attention_fwd_kernel 16")]
    assert ("sm_80" in fits, "gfx942" in gfx, does_not.endswith("DOES NOT FIT")) == (True, True, True)
    registers = int(fits.split()[4])
    assert 16 < registers < 256


def test_ci_compiles_every_kernel():
    spec = importlib.util.spec_from_file_location("compile_report", ROOT / "kernels" / "compile_report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    for file in report.FILES:
        launches = list(importlib.import_module(f"{kernels_bmojo.__name__}.{file}").launches(2, "ampere"))
        chosen = [launches[i] for i in report.defaults(launches)]
        assert {x.kernel.__name__ for x in chosen} == {x.kernel.__name__ for x in launches}
        marked = [launch for launch in launches if launch.default]
        assert all(launch in chosen for launch in marked)


@pytest.mark.slow
def test_every_kernel_fits():
    done = run_report("kernels/compile_report.py", "--jobs", "4")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
