"""The kernels of the innovation and of the selection against their definitions; on a CPU under Triton's interpreter."""

import sys

import pytest
import torch

from bmojo import kernels_bmojo, ops_bmojo
from bmojo_tests.kernel_checks import DEVICE, needs_triton, poisoned, rel_error


pytestmark = needs_triton


@pytest.fixture(scope="module")
def kernel():
    return kernels_bmojo.load("prediction_error", "innovation")


@pytest.fixture(scope="module")
def selection():
    return kernels_bmojo.load("running_selection", "innovation")


# ---------------------------------------------------------------------------- the error of the prediction


def outputs(rows=2, seq_len=19, size=7, taps=3, past=(0, 4), learned=False, dtype=torch.float32):
    """Arguments of the op: y, history, positions, weights."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    positions = (torch.tensor(past)[:, None] + torch.arange(seq_len)).to(DEVICE)
    weights = random(taps, size) if learned else random(taps).exp()
    return random(rows, seq_len, size), random(rows, taps, size), positions, weights


def wide(tensors):
    return [x.double() if x.is_floating_point() else x for x in tensors]


ERRORS = {
    "one_token": {"seq_len": 1},
    "from_the_start": {"past": (0,)},
    "one_past_for_all": {"past": (7,)},
    "learned": {"learned": True},
    "learned_from_the_start": {"learned": True, "past": (0, 0), "taps": 4},
    "one_tap": {"taps": 1},
    "more_taps_than_tokens": {"taps": 9, "seq_len": 5, "past": (0, 2)},
    "more_taps_than_a_block": {"taps": 21, "seq_len": 35, "past": (0, 100), "rows": 2},
    "wide": {"size": 147, "rows": 1, "past": (1,)},
    "no_token": {"seq_len": 0},
}


@pytest.mark.parametrize("case", ERRORS)
def test_error(kernel, case):
    tensors = outputs(**ERRORS[case])
    with poisoned():
        got = kernel(*tensors)
    assert got.dtype is torch.float32
    assert rel_error(got, ops_bmojo.prediction_error(*wide(tensors))) < 2e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_error_of_short_numbers_is_in_float32(kernel, dtype):
    tensors = outputs(dtype=dtype, size=33)
    got = kernel(*tensors)
    assert got.dtype is torch.float32
    assert rel_error(got, ops_bmojo.prediction_error(*wide(tensors))) < 2e-7
    mixed = outputs(dtype=dtype)[0], *outputs()[1:]
    assert rel_error(kernel(*mixed), ops_bmojo.prediction_error(*wide(mixed))) < 2e-7


def test_sums_of_a_channel_are_those_of_the_definition(kernel):
    """With one channel nothing is left to the order of sums: the same bits, but for the interpreter's last bit of a quotient."""
    tensors = outputs(size=1, seq_len=40, taps=4, past=(4, 9))
    if DEVICE == "cpu":
        tensors = *tensors[:3], torch.ones(4)
    assert torch.equal(kernel(*tensors), ops_bmojo.prediction_error(*tensors))


def test_history_that_does_not_exist_may_be_anything(kernel):
    y, history, positions, weights = outputs(past=(0, 1))
    clean = kernel(y, history, positions, weights)
    history[0] = torch.nan
    history[1, :2] = torch.nan
    assert torch.equal(kernel(y, history, positions, weights), clean)


def test_infinity_and_nan_give_what_they_give_in_torch(kernel):
    y, *others = outputs(rows=1, past=(0,))
    y[0, 3, 1], y[0, 12, 2] = torch.inf, torch.nan
    want = ops_bmojo.prediction_error(y, *others)
    got = kernel(y, *others)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())
    assert want.isinf().any()
    assert want.isnan().any()


def test_error_in_any_layout(kernel):
    y, history, positions, weights = outputs()
    turned = y.transpose(1, 2).contiguous().transpose(1, 2), history[:1].expand_as(history), positions, weights
    assert rel_error(kernel(*turned), ops_bmojo.prediction_error(*wide(turned))) < 2e-7


def test_gradients_are_left_to_the_definition(kernel, monkeypatch):
    monkeypatch.setenv("BMOJO_KERNELS", "triton")
    tensors = outputs(learned=True)
    with torch.no_grad():
        assert torch.equal(kernels_bmojo.prediction_error(*tensors), kernel(*tensors))
    for place in (0, 3):
        leaves = list(tensors)
        leaves[place] = leaves[place].clone().requires_grad_()
        kernels_bmojo.prediction_error(*leaves).sum().backward()
        exact = wide(tensors)
        exact[place].requires_grad_()
        ops_bmojo.prediction_error(*exact).sum().backward()
        assert rel_error(leaves[place].grad, exact[place].grad) < 2e-6


# ---------------------------------------------------------------------------- the selection


def scored(rows=2, tokens=50, size=7, levels=4, first=0, chunk_size=6, chunks=8, absent=0.2, kept=0.5, seed=0):
    """Arguments of the op. Scores are of so many `levels`, and infinite some; `kept` of the memory holds a token."""
    generator = torch.Generator().manual_seed(seed)

    def scores(count, empty):
        drawn = torch.randint(levels, (rows, count), generator=generator).float()
        chance = torch.rand(rows, count, generator=generator)
        return drawn.masked_fill(chance > 0.97, torch.inf).masked_fill(chance < empty, -torch.inf).to(DEVICE)

    numbers = torch.arange(-size, 0, device=DEVICE).expand(rows, size)
    return scores(tokens, absent), scores(size, 1 - kept), numbers, first, chunk_size, chunks


SELECTIONS = {
    "usual": {},
    "from_the_start": {"first": -11, "kept": 0.0, "chunks": 12},
    "far_before_the_start": {"first": -100, "chunks": 20},
    "from_the_middle": {"first": 13, "chunks": 4},
    "chunks_behind_the_end": {"chunks": 15},
    "equal_scores": {"levels": 1, "absent": 0.0},
    "different_scores": {"levels": 10**6},
    "nothing_exists": {"absent": 1.0, "kept": 0.0},
    "full_memory": {"kept": 1.0},
    "one_place": {"size": 1},
    "fewer_tokens_than_places": {"size": 40, "tokens": 30, "chunks": 5},
    "chunk_above_a_block": {"chunk_size": 45, "tokens": 130, "chunks": 3, "rows": 1},
    "chunk_of_1": {"chunk_size": 1, "tokens": 9, "chunks": 9},
    "many_places": {"size": 131, "tokens": 150, "chunk_size": 50, "chunks": 3, "rows": 1},
    "no_chunk": {"chunks": 0},
    "no_token": {"tokens": 0, "chunks": 2},
    "segments": {"chunk_size": 2, "chunks": 25},
    "segments_of_equals": {"chunk_size": 2, "chunks": 25, "levels": 1, "kept": 0.0},
    "segments_of_rising_scores": {"chunk_size": 3, "chunks": 17, "levels": 10**6, "size": 2},
    "segments_around_the_end": {"chunk_size": 2, "chunks": 40, "first": -15, "rows": 1},
}


@pytest.mark.parametrize("case", SELECTIONS)
def test_selection_is_exact(selection, case):
    tensors = scored(**SELECTIONS[case])
    if case == "segments_of_rising_scores":
        tensors = tensors[0].sort(-1).values, *tensors[1:]
    with poisoned():
        got = selection(*tensors)
    assert torch.equal(got, ops_bmojo.running_selection(*tensors))


@pytest.mark.parametrize("seed", range(4))
def test_any_selection_is_exact(selection, seed):
    generator = torch.Generator().manual_seed(seed)
    size, chunk_size, levels, tokens = (
        int(torch.randint(*bounds, (1,), generator=generator)) for bounds in ((1, 20), (1, 12), (1, 6), (1, 90))
    )
    tensors = scored(1, tokens, size, levels, 1 - chunk_size, chunk_size, tokens // chunk_size + 2, seed=seed)
    assert torch.equal(selection(*tensors), ops_bmojo.running_selection(*tensors))


@pytest.mark.parametrize("chunk_size", [2, 20])
def test_nan_is_the_last(selection, chunk_size):
    """NaN counts as no token, here and in the memory before."""
    scores, kept_scores, *others = scored(chunk_size=chunk_size, chunks=40 // chunk_size, kept=1.0)[:4]
    others += [chunk_size, 40 // chunk_size]
    want = ops_bmojo.running_selection(
        scores.index_fill(1, torch.tensor([3, 30], device=DEVICE), -torch.inf),
        kept_scores.index_fill(1, torch.tensor([2], device=DEVICE), -torch.inf),
        *others,
    )
    scores[:, [3, 30]] = torch.nan
    kept_scores[:, 2] = torch.nan
    assert torch.equal(selection(scores, kept_scores, *others), want)
    scores[:] = torch.nan
    kept_scores[:] = torch.nan
    found = selection(scores, kept_scores, *others)
    assert torch.equal(found, others[0][:, None].expand_as(found))


def test_too_many_places_are_refused(selection):
    with pytest.raises(ValueError, match=r"eidetic_size is 1025.*BMOJO_KERNELS=torch"):
        selection(*scored(1, 3, 1025))


def test_as_operators_of_torch(kernel, selection):
    module = sys.modules[kernel.__module__]
    errors, chosen = outputs(), scored(1)
    torch.library.opcheck(module._prediction_error, errors)
    torch.library.opcheck(module._running_selection, chosen)
    for function, tensors in ((kernel, errors), (selection, chosen)):
        compiled = torch.compile(lambda *args, f=function: f(*args) + 0, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(*tensors), function(*tensors))
    torch.compiler.reset()


# ---------------------------------------------------------------------------- the whole model

MODELS = {
    "average": {},
    "exponential": {"innovation_predictor": "exponential", "eidetic_chunk_size": 1},
    "learnable": {"innovation_predictor": "learnable", "eidetic_size": 7},
    "oldest": {"innovation_predictor": "oldest"},  # all scores are equal
}
IDS = torch.randint(3, 97, (2, 26), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_the_model_remembers_the_same(tiny_model, monkeypatch, name):
    """The memories of all chunks, in one call and in a stream, with padding on the left; and the logits."""
    model = tiny_model(**MODELS[name]).to(DEVICE)
    ids, mask = IDS.to(DEVICE), torch.ones_like(IDS, device=DEVICE)
    mask[1, :5] = 0
    found = {}
    for mode in ("torch", "triton"):
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setenv("BMOJO_KERNELS", mode)
            patch.setattr(kernels_bmojo, "_loaded", {})
            output, cache, streamed = model(ids, attention_mask=mask, output_eidetic=True), None, []
            found[mode] = {f"positions_{i}": x for i, x in enumerate(output.eidetic_positions)}
            found[mode]["logits"] = output.logits[mask.bool()]
            for start, stop in ((0, 11), (11, 12), (12, 26)):
                output = model(
                    ids[:, start:stop],
                    attention_mask=mask[:, :stop],
                    past_key_values=cache,
                    use_cache=True,
                    output_eidetic=True,
                )
                cache, streamed = output.past_key_values, [*streamed, output.logits]
                found[mode] |= {f"positions_{i}_{stop}": x for i, x in enumerate(output.eidetic_positions)}
            found[mode]["streamed"] = torch.cat(streamed, 1)[mask.bool()]
            if mode == "triton":
                assert "running_selection" in kernels_bmojo._loaded
    want, got = found["torch"], found["triton"]
    assert want.keys() == got.keys()
    for key, exact in want.items():
        if exact.is_floating_point():
            assert rel_error(got[key], exact) < 2e-5, key
        else:
            assert torch.equal(got[key], exact), key
    assert got["positions_0"].max() > 0
