"""The cache: its size to the byte, its rows, storage and rollback, and that nothing in it is read before it is written."""

import copy
import json
import pickle
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from bmojo.cache_bmojo import GROWING, ROOM, BMojoCache, FadingRing, cache_bytes, memory_rings, memory_slots


WINDOW = 7  # of the tiny models; their chunks are of 3
MIXED = {
    "layers_block_type": ["mamba2", "full_attention", "sliding_attention", "mamba", "bmojo"],
    "num_hidden_layers": 5,
}
ONE_LAYER = {"num_hidden_layers": 1}
CONVOLVED = {
    "layers_block_type": ["hybrid", "full_attention", "sliding_attention"],
    "num_hidden_layers": 3,
    "attention_conv_kernel": 4,
}
SIZES = {  # every layer type, and every choice that adds or drops a tensor
    "bmojo": {},
    "bmojo-mamba": {"ssm_type": "mamba"},
    "bmojo-without-memory": {"eidetic_size": 0},
    "bmojo-without-fading": {"fading_span": False, "innovation_predictor": "recent"},
    "bmojo-control": {"innovation_predictor": "random"},
    "bmojo-learnable": {"innovation_predictor": "learnable", "innovation_kernel": 2, "n_groups": 2},
    "mamba2": ONE_LAYER | {"layers_block_type": ["mamba2"], "n_groups": 3},
    "mamba2-grouped": ONE_LAYER
    | {
        "layers_block_type": ["mamba2"],
        "mamba_num_key_value_heads": 2,
        "n_groups": 6,
        "mamba_d_mlp": 5,
        "D_has_hdim": True,
    },
    "mamba": ONE_LAYER | {"layers_block_type": ["mamba"], "conv_kernel": 2},
    "mamba-wide": ONE_LAYER | {"layers_block_type": ["mamba"], "mamba_intermediate_size": 31, "mixer_norm": "learned"},
    "deltanet": ONE_LAYER | {"layers_block_type": ["gated_deltanet"]},
    "deltanet-without-conv": {"ssm_type": "gated_deltanet", "use_short_conv": False},
    "kalmanet": ONE_LAYER | {"layers_block_type": ["gated_kalmanet"], "num_key_value_heads": 1},
    "kalmanet-without-v-conv": {"ssm_type": "gated_kalmanet", "use_v_conv": False, "conv_kernel": 2},
    "sliding_attention": ONE_LAYER | {"layers_block_type": ["sliding_attention"]},
    "full_attention": ONE_LAYER | {"layers_block_type": ["full_attention"]},
    "hybrid": ONE_LAYER | {"layers_block_type": ["hybrid"], "ssm_type": "mamba"},
    "bmojo_f": ONE_LAYER | {"layers_block_type": ["bmojo_f"]},
    "convolved": CONVOLVED,
    "mixed": MIXED,
}
STREAMED = {  # what rows, rollback and storage are tried on
    "bmojo": {},
    "bmojo-mamba": {"ssm_type": "mamba", "eidetic_position": "rank"},
    "wide-chunks": {"eidetic_chunk_size": 7, "sliding_window": 4, "innovation_predictor": "learnable"},
    "layer-input": {"innovation_signal": "layer_input"},
    "half-life": {"innovation_half_life": 12.0},
    "with-and-without-memory": {"layers_block_type": ["bmojo_f", "bmojo"]},
    "convolved": CONVOLVED,
    "mixed": MIXED,
    "state-expansion": {
        "mamba_num_key_value_heads": 3, "n_groups": 6, "state_size": 6, "mixer_norm": "learned", "mamba_use_pos_emb": True,
    },
    "deltas": {
        "layers_block_type": ["gated_deltanet", "bmojo"], "ssm_type": "gated_kalmanet", "tie_attn_weights": False,
        "fading_query": True,
    },
}  # fmt: skip


def by_name(cases: dict) -> dict:
    """The keyword arguments of `parametrize` for named cases."""
    return {"argvalues": list(cases.values()), "ids": list(cases)}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def random_ids(batch: int, seq_len: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 97, (batch, seq_len), generator=torch.Generator().manual_seed(seed))


def read(model, cache, ids, sizes=None, mask=None) -> torch.Tensor:
    """Logits of `ids`, read into the cache in calls of these sizes."""
    ends = torch.tensor(sizes or [ids.shape[1]]).cumsum(0).tolist()
    parts, start = [], 0
    for end in ends:
        part = None if mask is None else mask[:, start:end]
        parts.append(model(ids[:, start:end], attention_mask=part, cache=cache).logits)
        start = end
    assert start == ids.shape[1]
    return torch.cat(parts, 1)


def whole(model, ids, mask=None) -> torch.Tensor:
    return model(ids, attention_mask=mask, use_cache=False).logits


def tensors_within(thing, path: str = "cache", seen: set | None = None):
    """Every tensor that can be reached from an object, with the way to it; weights of modules are no state."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, (nn.Module, type, str, int, float, bool, type(None))):
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        yield path, thing
    elif isinstance(thing, dict):
        for name, value in thing.items():
            yield from tensors_within(value, f"{path}[{name!r}]", seen)
    elif isinstance(thing, (list, tuple, set)):
        for i, value in enumerate(thing):
            yield from tensors_within(value, f"{path}[{i}]", seen)
    elif isinstance(thing, partial):
        yield from tensors_within((thing.args, thing.keywords), path, seen)
    elif hasattr(thing, "__dict__"):
        yield from tensors_within(vars(thing), path, seen)


def assert_close(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


# -- size --------------------------------------------------------------------------------------------------------------


def bytes_by_formula(config, rows: int, dtype: torch.dtype, columns: int) -> int:
    """The formula of BMojoCache's docstring."""
    s, wide = dtype.itemsize, max(4, dtype.itemsize)
    kv = config.num_key_value_heads * config.head_dim
    w, c, memory = config.sliding_window, config.eidetic_chunk_size, config.eidetic_size
    heads, head_dim, n = config.mamba_num_heads, config.mamba_head_dim, config.state_size
    channels = config.mamba_intermediate_size or config.expand * config.hidden_size
    convolved = heads * head_dim + 2 * config.n_groups * n
    if grouped := config.mamba_num_key_value_heads:
        convolved = grouped * (head_dim + n) + config.n_groups * n
    attention_heads, depth = config.num_attention_heads, config.head_dim
    taken = attention_heads + (2 if config.use_v_conv else 1) * config.num_key_value_heads
    history = (config.conv_kernel - 1) * taken * depth * s if config.use_short_conv else 0
    sizes = {
        "gated_deltanet": history + attention_heads * depth**2 * wide,
        "gated_kalmanet": history + 2 * attention_heads * depth**2 * wide,
        "mamba2": (config.conv_kernel - 1) * convolved * s + heads * head_dim * n * wide,
        "mamba": (config.conv_kernel - 1) * channels * s + channels * n * wide,
        "sliding_attention": 2 * kv * s * w,
        "full_attention": 2 * kv * s * columns,
    }
    sizes["hybrid"] = sizes["full_attention"] + sizes[config.ssm_type]
    for attention in ("sliding_attention", "full_attention", "hybrid"):
        taps, query = config.attention_conv_kernel, config.num_attention_heads * config.head_dim
        sizes[attention] += max(0, taps - 1) * (query + 2 * kv) * s
    sizes["bmojo"] = sizes[config.ssm_type]
    if config.fading_span:
        sizes["bmojo"] += 2 * kv * s * 2 * w
    sizes["bmojo_f"] = sizes["bmojo"] + 2 * kv * s * w
    if memory:
        sizes["bmojo"] += (2 * kv * s + wide) * (w + c) + memory * (2 * kv * s + wide + 8)
        if config.innovation_predictor in ("average", "exponential", "learnable"):
            sizes["bmojo"] += config.innovation_kernel * config.hidden_size * s
    else:
        sizes["bmojo"] = sizes["bmojo_f"]
    return rows * (8 + sum(sizes[layer_type] for layer_type in config.layers_block_type))


@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.float32), (2, torch.bfloat16), (7, torch.float64)])
@pytest.mark.parametrize("changes", **by_name(SIZES))
def test_bytes(tiny_model, changes, rows, dtype):
    model = tiny_model(dtype=dtype, **changes)
    config, cache = model.config, BMojoCache(model.config)
    assert cache.num_bytes() == 0
    grows = bool({"full_attention", "hybrid"} & set(config.layers_block_type))
    found, tables = [], []
    for calls in ([1], [1, WINDOW - 2], [WINDOW - 1, 1], [2 * WINDOW, 1, 16 * WINDOW - 2, 1]):
        read(model, cache, random_ids(rows, sum(calls)), calls)
        seen = cache.get_seq_length()
        steps = sum(tensor.numel() * tensor.element_size() for _, tensor in tensors_within(cache.steps))
        tables.append(steps)  # of the positions in a chunk: no state, and the same for all rows
        spare = [t[:, :, seen:] for layer in cache.layers for name, t in layer.state.items() if name in GROWING]
        assert max((t.shape[2] for t in spare), default=0) <= ROOM
        steps += sum(tensor.numel() * tensor.element_size() for tensor in spare)
        held = sum(tensor.numel() * tensor.element_size() for _, tensor in tensors_within(cache)) - steps
        assert (
            cache.num_bytes()
            == held
            == cache_bytes(config, rows, dtype, seen)
            == bytes_by_formula(config, rows, dtype, seen)
        )
        found.append((seen, held))
    assert [seen for seen, _ in found] == [1, WINDOW, 2 * WINDOW, 20 * WINDOW]
    assert len({held for _, held in found}) == (4 if grows else 1)
    assert tables[0] == tables[1] <= tables[2] == tables[3]  # smaller while nothing has left the window


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layers", [["full_attention", "bmojo"], ["mamba", "full_attention"]])
def test_reserved_columns_do_not_grow(tiny_model, layers, dtype):
    model = tiny_model(dtype=dtype, layers_block_type=layers)
    cache = BMojoCache(model.config, max_cache_len=40)
    want = bytes_by_formula(model.config, 2, dtype, 40)
    for calls in ([1], [4], [1, 14, 20]):
        read(model, cache, random_ids(2, sum(calls)), calls)
        assert cache.num_bytes() == want == cache_bytes(model.config, 2, dtype, 40)
    with pytest.raises(ValueError, match="max_cache_len is 40; 40 columns are in the cache and 1 more do not fit"):
        read(model, cache, random_ids(2, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtype_follows_the_model(tiny_model, dtype):
    model = tiny_model(dtype=dtype, **MIXED)
    cache = BMojoCache(model.config)
    assert read(model, cache, random_ids(1, 9), [4, 1, 4]).dtype == dtype
    wide = torch.promote_types(dtype, torch.float32)
    for name, tensor in cache.tensors().items():
        if name == "lengths" or name.endswith("position"):
            assert tensor.dtype == torch.int64, name
        else:
            assert tensor.dtype == (wide if name.endswith(("ssm", "innovation")) else dtype), name


# -- rows --------------------------------------------------------------------------------------------------------------

ROW_OPERATIONS = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0, 1])), [2, 0, 0, 1]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    "select-mask": (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(3), [0, 0, 0, 1, 1, 1, 2, 2, 2]),
}


@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize(("operation", "rows"), **by_name(ROW_OPERATIONS))
@pytest.mark.parametrize("changes", **by_name(STREAMED))
def test_rows_move_with_everything_they_have(tiny_model, changes, operation, rows, recording):
    model = tiny_model(dtype=torch.float64, **changes)
    ids, mask = random_ids(3, 22), torch.ones(3, 22, dtype=torch.int64)
    mask[1, :4], mask[2, 10:13] = 0, 0  # rows of different lengths
    want = whole(model, ids, mask)[rows, 14:]
    cache = BMojoCache(model.config)
    if recording:
        cache.activate_past_recording()
    read(model, cache, ids[:, :14], [9, 1, 4], mask[:, :14])
    assert all(tensor.shape[0] == 3 for path, tensor in tensors_within(cache) if "_log" not in path)
    operation(cache)
    batches = {path: tensor.shape[0] for path, tensor in tensors_within(cache)}
    assert len(batches) == len(cache.tensors()) > 5
    assert set(batches.values()) == {len(rows)} == {cache.batch_size}, batches
    assert_close(read(model, cache, ids[rows, 14:], [1, 1, 6], mask[rows, 14:]), want)


@pytest.mark.parametrize("operation", [operation for operation, _ in ROW_OPERATIONS.values()])
def test_rows_of_an_empty_cache(tiny_model, operation):
    model, ids = tiny_model(), random_ids(2, 8)
    cache = BMojoCache(model.config)
    operation(cache)
    assert torch.equal(read(model, cache, ids), whole(model, ids))


@pytest.mark.parametrize("batch", [2, 7])
def test_rows_do_not_know_each_other(tiny_model, batch):
    model, ids, sizes = tiny_model(dtype=torch.float64), random_ids(batch, 26), [8, 1, 1, 7, 9]
    together = read(model, BMojoCache(model.config), ids, sizes)
    alone = [read(model, BMojoCache(model.config), row[None], sizes) for row in ids]
    assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("sizes", [[40], [1] * 40, [10] + [1] * 30, [7, 1, 1, 12, 1, 1, 17]])
@pytest.mark.parametrize("changes", **by_name(STREAMED))
def test_padding_anywhere(tiny_model, changes, sizes):
    """Rows that pause while others go on, on a boundary of chunk or window too, and columns that are nobody's."""
    model, ids = tiny_model(dtype=torch.float64, **changes), random_ids(4, 40)
    mask = (torch.rand(4, 40, generator=torch.Generator().manual_seed(0)) < 0.6).long()
    mask[:, [0, 8, 23]] = 0
    cache = BMojoCache(model.config)
    got = read(model, cache, ids, sizes, mask)
    assert (cache.get_seq_length(), cache.lengths.tolist()) == (40, mask.sum(1).tolist())
    for row, kept, logits in zip(ids, mask.bool(), got, strict=True):
        assert_close(logits[kept], whole(model, row[kept][None])[0])


def test_another_batch_is_refused_until_reset(tiny_model):
    model = tiny_model()
    cache = BMojoCache(model.config)
    read(model, cache, random_ids(3, 17), [16, 1])
    with pytest.raises(ValueError, match="holds a batch of 3, the input is a batch of 2"):
        read(model, cache, random_ids(2, 1))
    cache.reset()
    assert (cache.get_seq_length(), cache.num_bytes(), list(tensors_within(cache))) == (0, 0, [])
    ids, sizes = random_ids(2, 19, seed=1), [11, 1, 7]
    assert torch.equal(read(model, cache, ids, sizes), read(model, BMojoCache(model.config), ids, sizes))


# -- storage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("max_cache_len", [None, 30])
@pytest.mark.parametrize("changes", **by_name(STREAMED))
def test_saved_and_loaded_goes_on_exactly(tiny_model, tmp_path, changes, max_cache_len, dtype):
    model, ids = tiny_model(dtype=dtype, **changes), random_ids(2, 26)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    cache = BMojoCache(model.config, max_cache_len=max_cache_len)
    read(model, cache, ids[:, :14], [13, 1], mask[:, :14])
    cache.save(tmp_path / "cache.safetensors")
    loaded = BMojoCache.load(tmp_path / "cache.safetensors", model.config)
    assert (loaded.max_cache_len, loaded.get_seq_length(), loaded.num_bytes()) == (
        max_cache_len,
        14,
        cache.num_bytes(),
    )
    want = read(model, cache, ids[:, 14:], [1, 1, 10])
    assert torch.equal(read(model, loaded, ids[:, 14:], [1, 1, 10]), want)


@pytest.mark.parametrize("sizes", [[1, 1, 10], [5, 7]])
def test_copies_go_their_own_ways(tiny_model, sizes):
    model, ids = tiny_model(dtype=torch.float64, **MIXED), random_ids(2, 26)
    cache = BMojoCache(model.config)
    read(model, cache, ids[:, :14])
    twin, kept = copy.deepcopy(cache), copy.deepcopy(cache.tensors())
    other = random_ids(2, 12, seed=1)
    assert_close(read(model, twin, other, sizes), whole(model, torch.cat([ids[:, :14], other], 1))[:, 14:])
    assert all(torch.equal(tensor, kept[name]) for name, tensor in cache.tensors().items())
    assert_close(read(model, cache, ids[:, 14:], sizes), whole(model, ids)[:, 14:])


def test_a_copy_does_not_take_the_model_along(tiny_model):
    """The record of the past refers to the layers; a copy goes on, and can be rolled back to where it was made."""
    model, ids = tiny_model(dtype=torch.float64, **MIXED), random_ids(1, 20)
    cache, memo = BMojoCache(model.config), {}
    cache.activate_past_recording()
    read(model, cache, ids[:, :12], [9, 3])
    twin = copy.deepcopy(cache, memo)
    assert not any(isinstance(thing, nn.Module) for thing in memo.values())
    read(model, twin, random_ids(1, 5, seed=1), [4, 1])
    twin.crop(-5)
    assert_close(read(model, twin, ids[:, 12:], [1, 7]), whole(model, ids)[:, 12:])
    with pytest.raises(ValueError, match="asked to remove 9 columns, the log holds the last 8"):
        twin.crop(-9)


def test_load_refuses_another_model(tiny_model, tiny_config, tmp_path):
    model = tiny_model()
    cache = BMojoCache(model.config)
    read(model, cache, random_ids(1, 4))
    cache.save(tmp_path / "cache.safetensors")
    other = tiny_config(sliding_window=6, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    with pytest.raises(
        ValueError, match=r"another configuration: sliding_window \(7 there, 6 here\), rope_parameters"
    ):
        BMojoCache.load(tmp_path / "cache.safetensors", other)


def test_load_knows_files_from_before_a_field(tiny_model, tmp_path):
    """A field that a file does not name had its default when the file was written."""
    model = tiny_model()
    cache = BMojoCache(model.config)
    read(model, cache, random_ids(1, 4))
    cache.save(path := tmp_path / "cache.safetensors")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    fields = json.loads(metadata["config"])
    del fields["mamba_use_pos_emb"], fields["mamba_num_key_value_heads"]
    save_file(load_file(path), path, metadata | {"config": json.dumps(fields)})
    BMojoCache.load(path, model.config)
    del fields["sliding_window"]  # 512 by default, 7 here
    save_file(load_file(path), path, metadata | {"config": json.dumps(fields)})
    with pytest.raises(ValueError, match=r"another configuration: sliding_window \(512 there, 7 here\)"):
        BMojoCache.load(path, model.config)


@pytest.mark.parametrize(
    "other",
    [
        {"innovation_half_life": 7.0},
        {"innovation_signal": "layer_input"},
        {"innovation_kernel": 4},
        {"key_multiplier": 2.0},
        {"softmax_scale": 0.2},
    ],
)
def test_load_refuses_a_model_that_would_go_on_in_another_way(tiny_config, tmp_path, other):
    """Tensors of the same shapes, that mean something else."""
    cache = BMojoCache(tiny_config())
    cache.begin(torch.zeros(1, 1))
    cache.save(tmp_path / "cache.safetensors")
    with pytest.raises(ValueError, match=f"another configuration: {next(iter(other))}"):
        BMojoCache.load(tmp_path / "cache.safetensors", tiny_config(**other))


def test_load_refuses_other_files(tiny_config, tmp_path):
    save_file({"weight": torch.ones(2)}, tmp_path / "weights.safetensors")
    (tmp_path / "notes.safetensors").write_text("no tensors at all")
    cache = BMojoCache(tiny_config())
    cache.begin(torch.zeros(1, 1))
    cache.save(tmp_path / "cache.safetensors")
    tensors = load_file(tmp_path / "cache.safetensors")
    save_file(tensors, tmp_path / "older.safetensors", {"format": "bmojo-cache-1"})  # laid out in another way
    for name in ("weights.safetensors", "notes.safetensors"):
        with pytest.raises(ValueError, match=f"{name} was not written by BMojoCache.save"):
            BMojoCache.load(tmp_path / name, tiny_config())
    with pytest.raises(
        ValueError, match=r"another version \(bmojo-cache-1, not bmojo-cache-\d\): read its text again"
    ):
        BMojoCache.load(tmp_path / "older.safetensors", tiny_config())


def test_a_pickled_cache_goes_on(tiny_model):
    """As other processes get it: without the tables of its chunk, which are many views of a few tensors."""
    model, ids = tiny_model(**MIXED), random_ids(1, 12)
    cache = BMojoCache(model.config)
    read(model, cache, ids[:, :9], [7, 1, 1])
    taken = pickle.loads(pickle.dumps(cache))
    assert len(pickle.dumps(cache)) == len(pickle.dumps(copy.deepcopy(cache)))  # which has none
    assert_close(read(model, taken, ids[:, 9:], [1, 2]), read(model, cache, ids[:, 9:], [1, 2]))


def test_an_empty_cache_is_not_saved(tiny_config, tmp_path):
    with pytest.raises(ValueError, match="cache is empty: run the model with cache=cache before save"):
        BMojoCache(tiny_config()).save(tmp_path / "cache.safetensors")
    assert not list(tmp_path.iterdir())


# -- rollback ----------------------------------------------------------------------------------------------------------

CALLS = {  # window 5, chunk 3: ends of calls on, before and behind the boundaries of both
    "decoding": [6, 1, 1, 1, 1, 1, 1],
    "blocks": [3, 5, 2, 7],
    "mixed": [1, 4, 1, 1, 9, 2],
    "one": [16],
}


def cropped(model, ids, sizes, remove, mask=None, max_cache_len=None) -> BMojoCache:
    cache = BMojoCache(model.config, max_cache_len=max_cache_len)
    cache.activate_past_recording()
    read(model, cache, ids, sizes, mask)
    cache.crop(-remove)
    return cache


@pytest.mark.parametrize("sizes", **by_name(CALLS))
@pytest.mark.parametrize("changes", **by_name(STREAMED))
@pytest.mark.parametrize("max_cache_len", [None, 25])
def test_crop_is_never_having_seen(tiny_model, changes, sizes, max_cache_len):
    model, total = tiny_model(dtype=torch.float64, **changes), sum(sizes)
    ids, after = random_ids(2, total), random_ids(2, 7, seed=1)
    for remove in range(0, total + 1, 1 if max_cache_len is None else 4):
        cache = cropped(model, ids, sizes, remove, max_cache_len=max_cache_len)
        kept = total - remove
        assert cache.get_seq_length() == kept
        assert cache.lengths.tolist() == [kept, kept]
        want = whole(model, torch.cat([ids[:, :kept], after], 1))[:, kept:]
        assert_close(read(model, cache, after, [2, 1, 4] if remove % 2 else [1, 6]), want)


@pytest.mark.parametrize("sizes", **by_name(CALLS))
@pytest.mark.parametrize("changes", **by_name(STREAMED))
def test_crop_of_padded_rows(tiny_model, changes, sizes):
    model, total = tiny_model(dtype=torch.float64, **changes), sum(sizes)
    ids, after = random_ids(3, total), random_ids(3, 7, seed=1)
    mask = torch.ones(3, total + 7, dtype=torch.int64)
    mask[0, :4] = mask[1, 5:9] = mask[1, -3] = mask[2, total - 3 : total] = 0
    for remove in range(0, total + 1, 3):
        cache = cropped(model, ids, sizes, remove, mask[:, :total])
        kept = total - remove
        assert cache.lengths.tolist() == mask[:, :kept].sum(1).tolist()
        columns = torch.cat([mask[:, :kept], mask[:, total:]], 1)
        want = whole(model, torch.cat([ids[:, :kept], after], 1), columns)[:, kept:]
        assert_close(read(model, cache, after, [1, 2, 4], mask[:, total:]), want)


def test_crop_again_and_again(tiny_model):
    """As assisted decoding does: read some, take back some, many times on one cache."""
    model = tiny_model(dtype=torch.float64, **MIXED)
    cache, kept = BMojoCache(model.config), random_ids(1, 8)
    read(model, cache, kept)
    cache.activate_past_recording()
    for step in range(12):
        new, accepted = random_ids(1, 5, seed=step), step % 6
        got = read(model, cache, new)
        assert_close(got, whole(model, torch.cat([kept, new], 1))[:, -5:])
        cache.crop(accepted - 5)
        kept = torch.cat([kept, new[:, :accepted]], 1)
    assert cache.get_seq_length() == kept.shape[1] == 38


def test_crop_gives_back_the_bytes(tiny_model):
    model = tiny_model(**MIXED)
    cache = cropped(model, random_ids(1, 20), [9, 11], 4)
    assert cache.num_bytes() == cache_bytes(model.config, 1, torch.float32, 16)


def test_crop_of_nothing(tiny_model):
    model, ids = tiny_model(), random_ids(1, 12)
    cache = BMojoCache(model.config)
    read(model, cache, ids[:, :9])
    cache.crop(0)  # without a record too
    assert torch.equal(read(model, cache, ids[:, 9:]), read(model, cropped(model, ids[:, :9], [9], 0), ids[:, 9:]))
    assert cache.get_seq_length() == 12


def test_crop_refuses(tiny_model):
    model, ids = tiny_model(), random_ids(1, 12)
    cache = BMojoCache(model.config)
    read(model, cache, ids)
    with pytest.raises(RuntimeError, match=r"call activate_past_recording\(\) before"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="negative number of columns to remove, got 3"):
        cache.crop(3)
    cache.activate_past_recording()
    read(model, cache, ids, [8, 4])
    with pytest.raises(ValueError, match="asked to remove 13 columns, the log holds the last 12"):
        cache.crop(-13)
    cache.crop(-12)
    assert cache.get_seq_length() == 12
    with pytest.raises(ValueError, match="asked to remove 1 columns, the log holds the last 0"):
        cache.crop(-1)


def test_the_log_is_bounded(tiny_model):
    model, ids = tiny_model(dtype=torch.float64, num_hidden_layers=1), random_ids(1, 1500)
    cache = BMojoCache(model.config)
    cache.activate_past_recording()
    read(model, cache, ids, [100] * 15)
    with pytest.raises(ValueError, match="log holds the last 1000"):
        cache.crop(-1001)
    cache.crop(-1000)
    assert_close(read(model, cache, ids[:, 500:520]), whole(model, ids[:, :520])[:, 500:])


@pytest.mark.parametrize(
    ("window", "chunk"), [(7, 3), (6, 3), (17, 2), (4, 1), (2, 1), (8, 4), (5, 3), (4, 9), (1, 1)]
)
def test_fading_tokens_lie_where_the_ring_says(window, chunk):
    """Against tokens that are put and exchanged one by one, as a list would be."""
    exchanged = 2 * chunk <= window
    front = window + (chunk if exchanged else window)
    ring = FadingRing(2 * window, front)
    held = [-1] * 2 * window  # the position in every slot
    for t in range(9 * window):
        if exchanged and t % chunk == 0:
            for p in range(max(0, t - chunk), t):
                fresh, ripe = held.index(p), front + p % ring.waiting
                held[fresh], held[ripe] = held[ripe], held[fresh]
        held[(t - 2 * window) % front] = t
        last, recent = torch.tensor([[t]]), torch.arange(max(0, t - 2 * window + 1), t + 1)[None]
        found = ring.positions(last)[0]
        assert torch.where(found < 0, -1, found).tolist() == held
        assert found[ring.slots(recent, last)[0]].tolist() == recent[0].tolist()
        begun = t - t % chunk
        seen = [p for p in recent[0].tolist() if any(window <= s - p < 2 * window for s in range(begun, t + 1))]
        assert set(seen) <= set(held[:front])


# -- what was never written --------------------------------------------------------------------------------------------


def poison(cache: BMojoCache, value: float) -> int:
    """Overwrite every slot of rings, memories and reserved columns that holds no token; returns how many there are."""
    count = 0
    for layer, layer_type in zip(cache.layers, cache.config.layers_block_type, strict=True):
        parts, rings = [], memory_rings(cache.config, layer_type)
        fading = rings["fading"].positions(cache.lengths[:, None] - 1) if "fading" in rings else None
        for (
            name,
            tensor,
        ) in layer.state.items():  # conv, ssm: zero is their content; eidetic_position says what is empty
            if name in ("key", "value"):
                slots = memory_slots(cache.config, layer_type).items()
                parts += [(span, tensor[:, :, part].transpose(1, 2)) for span, part in slots]
            elif name in ("full_key", "full_value", "waiting_key", "waiting_value"):
                parts.append((name, tensor.transpose(1, 2)))
            elif name in ("history", "window_innovation"):
                parts.append((name, tensor))
        for span, part in parts:
            slots = torch.arange(part.shape[1])
            if span == "eidetic":
                empty = layer.state["eidetic_position"] < 0
            elif span == "fading":
                empty = fading[:, : len(slots)] < 0
            elif span.startswith("waiting"):
                empty = fading[:, -len(slots) :] < 0
            else:  # the token at position p is in slot p % size
                empty = slots >= cache.lengths[:, None]
            part[empty] = value
            count += int(empty.sum())
    return count


@pytest.mark.parametrize("content", [1e4, -1e20])  # no NaN: slots are zeros at first, and a weight of 0 is multiplied
@pytest.mark.parametrize("seen", [1, 4, 7, 11])
@pytest.mark.parametrize(
    ("form", "sizes"),
    [("auto", [1, 1, 1, 1, 1, 1]), ("auto", [6]), ("auto", [1, 4, 1]), ("blocks", [6]), ("definition", [6])],
    indirect=["form"],
)
@pytest.mark.parametrize("changes", **by_name(STREAMED))
def test_empty_slots_do_not_count(tiny_model, form, changes, sizes, seen, content):
    model, ids = tiny_model(dtype=torch.float64, **changes), random_ids(2, seen + 6)
    mask = torch.ones_like(ids)
    mask[1, : seen // 2] = 0
    clean, poisoned = BMojoCache(model.config, max_cache_len=20), BMojoCache(model.config, max_cache_len=20)
    for cache in (clean, poisoned):
        read(model, cache, ids[:, :seen], mask=mask[:, :seen])
    assert poison(poisoned, content) > 10
    want = read(model, clean, ids[:, seen:], sizes)
    assert torch.equal(read(model, poisoned, ids[:, seen:], sizes), want)


def test_poison_shows_where_tokens_are(tiny_model):
    """The same numbers in slots that do hold tokens change the logits: the test above looks at the right places."""
    model, ids = tiny_model(dtype=torch.float64), random_ids(1, 22)
    want = whole(model, ids)[:, 20:]
    for name in ("key", "value"):
        for span, slots in memory_slots(model.config, "bmojo").items():
            cache = BMojoCache(model.config)
            read(model, cache, ids[:, :20])
            cache.layers[0].state[name][:, :, slots] = 1e4
            assert (read(model, cache, ids[:, 20:]) - want).abs().max() > 1e-6, (name, span)
        cache = BMojoCache(model.config)
        read(model, cache, ids[:, :20])
        cache.layers[0].state[f"waiting_{name}"].fill_(1e4)
        assert_close(read(model, cache, ids[:, 20:21]), want[:, :1])  # the last of its chunk: what waits is not seen
        assert (read(model, cache, ids[:, 21:]) - want[:, 1:]).abs().max() > 1e-6


# -- gradients ---------------------------------------------------------------------------------------------------------


def gradients(model, ids, sizes) -> dict[str, torch.Tensor]:
    """Of a random projection of all logits."""
    model.zero_grad(set_to_none=True)
    with torch.enable_grad():
        logits = read(model, BMojoCache(model.config), ids, sizes) if sizes else whole(model, ids)
        (
            logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=logits.dtype)
        ).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("sizes", [[11, 10], [7, 1, 1, 1, 1, 4, 6], [1] * 21])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("changes", **by_name(STREAMED))
def test_gradients_flow_through_the_cache(tiny_model, changes, training, sizes):
    model, ids = tiny_model(dtype=torch.float64, **changes).train(training), random_ids(2, 21)
    got, want = gradients(model, ids, sizes), gradients(model, ids, None)
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(
            got[name], gradient, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [
        (torch.no_grad, torch.enable_grad),
        (torch.enable_grad, torch.no_grad),
        (torch.no_grad, torch.inference_mode),
        (torch.inference_mode, torch.no_grad),  # generate() on a prompt that was read in inference mode
    ],
)
def test_a_cache_crosses_modes(tiny_model, prefill, decode):
    model, ids = tiny_model(dtype=torch.float64, **MIXED), random_ids(1, 20)
    want, cache = whole(model, ids), BMojoCache(model.config)
    with prefill():
        read(model, cache, ids[:, :12], [11, 1])
    with decode():
        got = read(model, cache, ids[:, 12:], [1, 1, 6])
    assert_close(got.detach().clone(), want[:, 12:])


def test_decoding_without_gradients_leaves_an_open_graph_alone(tiny_model):
    """A loss of cached calls, text generated from the same cache before its backward pass: the gradient is not touched."""
    model, ids = tiny_model(dtype=torch.float64), random_ids(1, 16)

    def loss(and_generate: bool):
        cache = BMojoCache(model.config)
        with torch.enable_grad():
            total = read(model, cache, ids[:, :14], [12, 1, 1]).pow(2).sum()
        if and_generate:
            read(model, cache, ids[:, 14:], [1, 1])
        return torch.autograd.grad(total, model.model.embed_tokens.weight)[0]

    assert torch.equal(loss(True), loss(False))


def test_gradients_flow_after_single_tokens_without_any(tiny_model):
    """The layers of a single token run in inference mode: no state that they leave is of the kind that autograd refuses."""
    model, ids = tiny_model(dtype=torch.float64, **MIXED), random_ids(1, 20)

    def gradients(sizes):
        cache = BMojoCache(model.config)
        read(model, cache, ids[:, :11], sizes)
        assert not any(tensor.is_inference() for tensor in cache.tensors().values())
        with torch.enable_grad():
            loss = model(ids[:, 11:], cache=cache, use_cache=True).logits.pow(2).mean()
        return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    want, got = gradients([11]), gradients([1, 8, 1, 1])
    assert any(gradient is not None and gradient.any() for gradient in want)
    for a, b in zip(want, got, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_outputs_of_a_single_token_are_of_the_usual_kind(tiny_model):
    model, ids = tiny_model(**MIXED), random_ids(1, 8)
    out = model(ids[:, :1], use_cache=True)
    out = model(ids[:, 1:2], use_cache=True, cache=out.cache, output_hidden_states=True, output_eidetic=True)
    given = [out.logits, *out.hidden_states, *(x for x in (*out.innovations, *out.eidetic_positions) if x is not None)]
    given.append(model(ids[:, 2:3], use_cache=True, cache=out.cache).logits)
    given.append(model.model(ids[:, 3:4], use_cache=True, cache=out.cache).last_hidden_state)
    assert not any(tensor.is_inference() for tensor in given)


@torch.no_grad()
def test_full_attention_reads_a_long_prompt_into_a_cache(tiny_model):
    """Longer than its mask is cut into."""
    model, ids = tiny_model(dtype=torch.float64, layers_block_type=["full_attention", "hybrid"]), random_ids(1, 1090)
    assert_close(model(ids, cache=BMojoCache(model.config)).logits, whole(model, ids))


@torch.no_grad()
@pytest.mark.parametrize("operation", ["repeat", "select"])
def test_rows_without_padding_move_within_a_chunk(tiny_model, operation):
    model, ids = tiny_model(dtype=torch.float64), random_ids(3, 22)
    cache = BMojoCache(model.config)
    read(model, cache, ids[:, :14], [9, 1, 1, 1, 1, 1])
    rows = [0, 0, 1, 1, 2, 2] if operation == "repeat" else [1]
    if operation == "repeat":
        cache.batch_repeat_interleave(2)
    else:
        cache.batch_select_indices(torch.tensor(rows))
    got = read(model, cache, ids[rows, 14:], [1, 1, 6])
    assert_close(got, whole(model, ids)[rows, 14:])


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_with_padding_goes_on(tiny_model, copied):
    model, ids = tiny_model(dtype=torch.float64), random_ids(2, 26)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    cache = BMojoCache(model.config)
    read(model, cache, ids[:, :14], [14], mask[:, :14])
    got = read(model, copied(cache), ids[:, 14:], [1, 1, 10], mask[:, 14:])
    assert_close(got, whole(model, ids, mask)[:, 14:])


@torch.no_grad()
def test_loss_of_a_part_behind_padding_in_the_cache(tiny_model):
    model, ids = tiny_model(dtype=torch.float64), random_ids(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    cache = BMojoCache(model.config)
    read(model, cache, ids[:, :12], [12], mask[:, :12])
    loss = model(ids[:, 12:], attention_mask=mask, labels=ids[:, 12:], cache=cache).loss
    logits = whole(model, ids, mask)[:, 12:-1]
    assert abs(loss - nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 13:].flatten())) < 1e-5


@pytest.mark.parametrize("padded", [False, True])
def test_a_record_of_the_past_copies_no_keys_of_full_attention(tiny_model, padded):
    """What was there stays as it is, so that one buffer serves every state of the log, and what comes back is right."""
    model = tiny_model(layers_block_type=["full_attention", "bmojo"], dtype=torch.float64)
    ids, cache = random_ids(2, 40), BMojoCache(model.config)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :5] = mask[1, 22:25] = 0
    with torch.no_grad():
        model(ids[:, :20], attention_mask=mask[:, :20], cache=cache)
        cache.activate_past_recording()
        places = set()
        for at in range(20, 40):
            model(ids[:, at : at + 1], attention_mask=mask[:, at : at + 1], cache=cache)
            places.add(cache.layers[0].state["full_key"].data_ptr())
        assert places == {cache.layers[0].state["full_key"].data_ptr()}
        cache.crop(-9)
        got = model(ids[:, 31:], attention_mask=mask[:, 31:], cache=cache).logits
        want = model(ids, attention_mask=mask, use_cache=False).logits[:, 31:]
    real = mask[:, 31:].bool()
    torch.testing.assert_close(got[real], want[real], rtol=1e-10, atol=1e-10)
