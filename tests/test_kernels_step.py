"""The kernels for one token against the definitions in float64; on a CPU under Triton's interpreter."""

import sys

import pytest
import torch

from bmojo import kernels_bmojo, ops_bmojo
from bmojo_tests.kernel_checks import DEVICE, needs_triton, poisoned, rel_error


pytestmark = needs_triton


def load(name: str):
    return kernels_bmojo.load(name, "step")


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


# ---------------------------------------------------------------------------- attention to the cache


def cache_inputs(
    rows=2,
    kv_heads=2,
    group=3,
    head_dim=20,
    spans=(9, 14, 5),
    own=("memory",),
    ranked=False,
    one_mask=False,
    seen=0.5,
    dtype=torch.float32,
):
    """Arguments of `cache_attention` and its options; spans: slots of window, fading tokens and memory. NaN where none is seen."""
    generator = torch.Generator().manual_seed(0)
    window, fading, memory = spans
    slots, heads = sum(spans), kv_heads * group

    def normal(*size):
        return torch.randn(size, generator=generator).to(DEVICE, dtype)

    joint = normal(rows, 1, 3 * heads, head_dim) * head_dim**-0.5  # queries are parts of one tensor
    query, eidetic_query, fading_query = joint.split(heads, 2)
    key, value = normal(rows, kv_heads, slots, head_dim), normal(rows, kv_heads, slots, head_dim)
    visible = torch.rand(1 if one_mask else rows, slots, generator=generator) < seen
    visible[:, window // 2] = True
    mask = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)[:, None].to(DEVICE)
    hidden = ~visible.to(DEVICE).expand(rows, -1)[:, None, :, None].expand_as(key)
    eidetic_key = normal(rows, memory, kv_heads, head_dim) if ranked else None
    tensors = [
        query,
        key.masked_fill(hidden, torch.nan),
        value.masked_fill(hidden, torch.nan),
        mask if one_mask else mask.repeat_interleave(kv_heads, 0),
        eidetic_query if "memory" in own else None,
        fading_query if "fading" in own else None,
        eidetic_key,
    ]
    return tensors, {"fading": window, "memory": window + fading}


CACHES = {
    "memory": {},
    "all_own": {"own": ("fading", "memory")},
    "own_fading_without_memory": {"own": ("fading",), "spans": (9, 14, 0)},
    "window_alone": {"own": (), "spans": (13, 0, 0)},
    "window_and_fading": {"own": (), "spans": (7, 14, 0)},
    "no_fading": {"spans": (11, 0, 3)},
    "ranked": {"ranked": True, "own": ("fading", "memory")},
    "ranked_one_row": {"ranked": True, "rows": 1},
    "one_mask": {"one_mask": True},
    "one_row": {"rows": 1, "one_mask": True},
    "one_head": {"kv_heads": 1, "group": 1},
    "one_key_for_all": {"kv_heads": 1, "group": 17},
    "one_slot": {"own": (), "spans": (1, 0, 0)},
    "one_seen": {"seen": 0.0},
    "all_seen": {"seen": 1.0},
    "many_blocks": {"spans": (301, 290, 77), "rows": 1, "own": ("fading", "memory")},
    "head_of_64": {"head_dim": 64, "rows": 1},
    "head_of_6": {"head_dim": 6},
    "head_of_192": {"head_dim": 192, "rows": 1},
}


def cache_reference(tensors, options):
    """In float64; slots that are not seen hold zeros there, which -inf does not let through."""
    tensors = [x if x is None else x.nan_to_num(nan=0.0, neginf=-torch.inf) for x in tensors]
    return ops_bmojo.cache_attention(*widened(tensors), **options)


@pytest.mark.parametrize("programs", [1, 1000], ids=["whole", "split"])
@pytest.mark.parametrize("case", CACHES)
def test_attention_to_the_cache(monkeypatch, case, programs):
    kernel = load("cache_attention")
    monkeypatch.setattr(sys.modules[kernel.__module__], "_PROGRAMS", programs)
    tensors, options = cache_inputs(**CACHES[case])
    with poisoned():
        found = kernel(*tensors, **options)
    assert rel_error(found, cache_reference(tensors, options)) < 2e-6


@pytest.mark.parametrize("programs", [1, 1000], ids=["whole", "split"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attention_is_as_exact_as_torch(monkeypatch, dtype, programs):
    kernel = load("cache_attention")
    monkeypatch.setattr(sys.modules[kernel.__module__], "_PROGRAMS", programs)
    tensors, options = cache_inputs(head_dim=40, spans=(130, 140, 70), own=("fading", "memory"), dtype=dtype)
    want = cache_reference(tensors, options)
    clean = [x if x is None else x.nan_to_num(nan=0.0, neginf=-torch.inf) for x in tensors]
    plain, fast = ops_bmojo.cache_attention(*clean, **options), kernel(*tensors, **options)
    assert fast.dtype is dtype
    factor = (
        3 if dtype is torch.bfloat16 and DEVICE == "cpu" else 2
    )  # the interpreter cuts bits off instead of rounding
    assert rel_error(fast, want) <= factor * rel_error(plain, want)


def test_attention_with_a_cache_of_another_dtype():
    tensors, options = cache_inputs()
    tensors[1:3] = [x.half() for x in tensors[1:3]]
    assert rel_error(load("cache_attention")(*tensors, **options), cache_reference(tensors, options)) < 2e-6


def test_attention_with_heads_beyond_all_room_is_refused():
    tensors, options = cache_inputs(head_dim=260, rows=1)
    with pytest.raises(ValueError, match=r"head_dim is 260.*BMOJO_KERNELS=torch"):
        load("cache_attention")(*tensors, **options)


# ---------------------------------------------------------------------------- the memory after a chunk


def memory_inputs(
    rows=4,
    kv_heads=2,
    head_dim=6,
    window=5,
    chunk=3,
    size=4,
    past=None,
    boundary=None,
    held=None,
    width=None,
    fading=7,
    equal=False,
):
    """Arguments of `update_memory`. held: of every row how many places are taken; width: entries of a head that turn."""
    generator = torch.Generator().manual_seed(0)
    ring, slots, width = window + chunk, window + chunk + fading + size, width or head_dim
    past = torch.tensor([0, 6, 9, 30] if past is None else past)[:rows]
    boundary = torch.tensor([True, True, False, True] if boundary is None else boundary)[:rows, None]
    held = torch.tensor([0, 2, 4, 4] if held is None else held)[:rows, None]
    empty = torch.arange(size) < size - held
    key, value = torch.randn(2, rows, kv_heads, slots, head_dim, generator=generator)

    def scores(count):
        found = torch.rand(rows, count, generator=generator)
        return (found * 2).round() if equal else found

    positions = torch.arange(size).expand(rows, size)
    angles = torch.rand(rows, chunk, width // 2, generator=generator)
    cos = torch.cat([angles.cos(), angles.cos(), 1.5 * torch.ones(rows, chunk, head_dim - width)], -1)
    tensors = [
        key,
        value,
        scores(ring),
        scores(size).masked_fill(empty, -torch.inf),
        positions.masked_fill(empty, -1),
        past,
        boundary,
        cos,
        torch.cat([-angles.sin(), angles.sin()], -1),
    ]
    return [x.to(DEVICE) for x in tensors]


MEMORIES = {
    "few_and_many_tokens": {},
    "equal_scores": {"equal": True},
    "all_at_a_boundary": {"boundary": [True] * 4, "past": [30, 41, 52, 63], "held": [4] * 4},
    "none_at_a_boundary": {"boundary": [False] * 4},
    "empty": {"held": [0] * 4, "past": [0, 3, 6, 9], "boundary": [True] * 4},
    "memory_above_chunk": {"size": 70, "held": [0, 30, 70, 69], "boundary": [True] * 4, "rows": 2},
    "chunk_above_memory": {"size": 2, "chunk": 67, "window": 9, "held": [0, 1, 2, 2], "past": [5, 70, 134, 500]},
    "one_place": {"size": 1, "held": [0, 1, 1, 1]},
    "chunk_of_1": {"chunk": 1},
    "no_fading": {"fading": 0},
    "partly_turned": {"width": 4},
    "many_blocks": {
        "rows": 1,
        "kv_heads": 1,
        "size": 150,
        "chunk": 40,
        "window": 30,
        "head_dim": 70,
        "past": [300],
        "boundary": [True],
        "held": [150],
    },
    "far_on": {"past": [2**40, 2**40 + 3, 2**33, 2**31 - 1], "boundary": [True] * 4, "held": [4] * 4},
}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("case", MEMORIES)
def test_the_memory_after_a_chunk(case, in_place):
    tensors = memory_inputs(**MEMORIES[case])
    before = [x.clone() for x in tensors]
    want = ops_bmojo.update_memory(*widened(tensors))
    with poisoned():
        key, value, innovation, positions = load("update_memory")(*tensors, in_place=in_place)
    assert torch.equal(positions, want[3])
    assert torch.equal(innovation.double(), want[2])
    assert torch.equal(value.double(), want[1])
    assert rel_error(key, want[0]) < 1e-6
    assert (key is tensors[0], value is tensors[1]) == (in_place, in_place)
    assert all(map(torch.equal, tensors[2 * in_place :], before[2 * in_place :]))
    still = ~tensors[6][:, 0]
    assert torch.equal(key[still], before[0][still]), "rows in the middle of a chunk keep their bits"
    stays = key.shape[2] - positions.shape[1]
    assert torch.equal(key[:, :, :stays], before[0][:, :, :stays])


def test_the_definition_overwrites_in_place_alone():
    tensors = memory_inputs()
    before = [x.clone() for x in tensors]
    want = ops_bmojo.update_memory(*tensors)
    assert all(map(torch.equal, tensors, before))
    found = ops_bmojo.update_memory(*tensors, in_place=True)
    assert found[0] is tensors[0]
    assert all(map(torch.equal, found, want))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_keys_of_the_memory_are_rounded_once(dtype):
    tensors = memory_inputs(head_dim=16)
    tensors[:2] = [x.to(dtype) for x in tensors[:2]]
    want, plain = ops_bmojo.update_memory(*widened(tensors)), ops_bmojo.update_memory(*tensors)
    found = load("update_memory")(*tensors)
    assert (found[0].dtype, found[2].dtype) == (dtype, torch.float32)
    assert torch.equal(found[1], plain[1])
    factor = 3 if dtype is torch.bfloat16 and DEVICE == "cpu" else 1.1  # the interpreter cuts bits off
    assert rel_error(found[0], want[0]) <= factor * rel_error(plain[0], want[0])


def test_a_cache_of_another_layout():
    tensors = memory_inputs()
    want = ops_bmojo.update_memory(*widened(tensors))
    tensors[:2] = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors[:2]]
    found = load("update_memory")(*tensors, in_place=True)
    assert rel_error(tensors[0], want[0]) < 1e-6
    assert rel_error(found[1], want[1]) < 1e-6


def test_cache_and_memory_as_operators_of_torch():
    module = sys.modules[load("cache_attention").__module__]
    tensors, options = cache_inputs(seen=1.0, own=("fading", "memory"), rows=1)
    torch.library.opcheck(module._cache_attention, (*tensors, *options.values()))
    torch.library.opcheck(module._update_memory_, memory_inputs(rows=2))


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
