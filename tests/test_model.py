"""The model against the reference, and what every change keeps true: streaming, causality, padding, packing, selection."""

import math
from collections import defaultdict
from itertools import pairwise
from types import SimpleNamespace

import mpmath
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bmojo.cache_bmojo import BMojoCache, memory_slots
from bmojo.kernels_bmojo import selective_scan, ssd_scan
from bmojo.layout_bmojo import read_layout
from bmojo.modeling_bmojo import BMojoForCausalLM, rotary_frequencies
from bmojo.ops_bmojo import hash_scores, rotary_table, rotate, select
from bmojo_tests.reference import reference_forward
from bmojo_tests.reference import select as select_by_definition


LOSS_TOLERANCE = 1e-6  # transformers' loss function computes in float32, whatever the logits are
W, C = 7, 3  # sliding_window and eidetic_chunk_size of the tiny model
EVERY_LAYER = ["bmojo", "mamba2", "sliding_attention", "mamba", "full_attention", "bmojo"]
PARTIAL = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.6}
FALCON_H1 = {
    "layers_block_type": ["hybrid"] * 2, "n_groups": 2, "key_multiplier": 0.6, "use_bias": True, "projectors_bias": False,
    "embedding_multiplier": 1.5, "lm_head_multiplier": 0.7, "mlp_multipliers": [0.8, 1.2],
    "attention_in_multiplier": 1.1, "attention_out_multiplier": 0.9, "ssm_in_multiplier": 1.3, "ssm_out_multiplier": 0.75,
    "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7],
}  # fmt: skip
VARIANTS = {
    "plain": {},
    "mamba": {"ssm_type": "mamba", "chunk_size": 2},
    "every_layer": {"layers_block_type": EVERY_LAYER, "num_hidden_layers": 6},
    "rank": {"eidetic_position": "rank"},
    "rank_mamba_untied": {"eidetic_position": "rank", "ssm_type": "mamba", "tie_attn_weights": False},
    "exponential": {"innovation_predictor": "exponential"},
    "learnable": {"innovation_predictor": "learnable"},
    "layer_input": {"innovation_signal": "layer_input"},
    "half_life": {"innovation_half_life": 12.0},
    "half_life_random": {"innovation_half_life": 12, "innovation_predictor": "random"},
    "layer_input_learnable": {"innovation_signal": "layer_input", "innovation_predictor": "learnable"},
    "random": {"innovation_predictor": "random"},
    "recent": {"innovation_predictor": "recent"},
    "oldest": {"innovation_predictor": "oldest"},
    "kernel_1": {"innovation_predictor": "exponential", "innovation_kernel": 1, "conv_kernel": 1},
    "untied": {"tie_attn_weights": False},
    "qk_norm": {"use_qk_norm": True, "tie_attn_weights": False},
    "one_kv_head": {"num_key_value_heads": 1},
    "all_kv_heads": {"num_key_value_heads": 4},
    "no_memory": {"eidetic_size": 0},
    "no_memory_mamba": {"eidetic_size": 0, "ssm_type": "mamba", "tie_attn_weights": False},
    "memory_1": {"eidetic_size": 1, "eidetic_chunk_size": 1, "sliding_window": 1},
    "memory_for_all": {"eidetic_size": 50, "eidetic_position": "rank"},
    "chunk_above_window": {"eidetic_chunk_size": 7, "sliding_window": 4},
    "chunks_in_window": {"eidetic_chunk_size": 2, "sliding_window": 17, "eidetic_size": 3},
    "long_convolution": {"conv_kernel": 9, "chunk_size": 64},
    "no_mlp": {"intermediate_size": None, "tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True, "use_bias": True, "use_conv_bias": False},
    "groups_and_limit": {"n_groups": 2, "time_step_limit": (0.01, 0.3)},
    "nope": {"position_embedding_type": "nope", "eidetic_position": "rank"},
    "partial": {"rope_parameters": PARTIAL, "head_dim": 10, "softmax_scale": 0.7, "key_multiplier": 0.6},
    "partial_rank": {
        "rope_parameters": PARTIAL, "head_dim": 10, "rope_interleave": True, "eidetic_position": "rank",
        "use_qk_norm": True, "key_multiplier": 0.6, "attention_bias": True, "attention_out_bias": False,
    },
    "attention_conv": {
        "layers_block_type": ["full_attention", "sliding_attention", "hybrid"], "num_hidden_layers": 3,
        "attention_conv_kernel": 4, "rope_interleave": True, "attention_out_bias": True,
    },
    "with_and_without_memory": {"layers_block_type": ["bmojo_f", "bmojo"]},
    "with_and_without_memory_untied": {
        "layers_block_type": ["bmojo", "bmojo_f"], "tie_attn_weights": False, "fading_query": True, "use_qk_norm": True,
        "innovation_predictor": "learnable", "eidetic_position": "rank", "rope_parameters": PARTIAL, "head_dim": 10,
    },
    "hybrid": FALCON_H1,
    "hybrid_kalmanet": {"layers_block_type": ["hybrid"] * 2, "ssm_type": "gated_kalmanet", "ssm_out_multiplier": 0.7},
    "hybrid_mamba": {"layers_block_type": ["hybrid", "bmojo"], "ssm_type": "mamba", "projectors_bias": True},
    "layernorm": {"rms_norm": False, "residual_in_fp32": True, "layers_block_type": ["bmojo", "full_attention"]},
    "fading_query": {"tie_attn_weights": False, "fading_query": True},
    "fading_query_norms": {
        "tie_attn_weights": False, "fading_query": True, "use_qk_norm": True, "eidetic_position": "rank",
    },
    "fading_query_factors": {
        "tie_attn_weights": False, "fading_query": True, "use_qk_norm": True, "key_multiplier": 0.6, "softmax_scale": 0.7,
        "rope_interleave": True, "rope_parameters": PARTIAL, "head_dim": 10,
    },
    "fading_query_alone": {
        "tie_attn_weights": False, "fading_query": True, "use_qk_norm": True, "eidetic_size": 0,
    },
    "deltanet": {"ssm_type": "gated_deltanet", "mamba_norm_eps": 1e-3},
    "deltanet_options": {
        "ssm_type": "gated_deltanet", "allow_neg_eigval": True, "use_gate": False, "kv_proj_rank": 3,
        "kv_learnable_residual": True, "use_conv_bias": False, "use_bias": True,
    },
    "deltanet_no_conv": {"ssm_type": "gated_deltanet", "use_short_conv": False, "num_key_value_heads": 1},
    "kalmanet": {"ssm_type": "gated_kalmanet", "eidetic_size": 0},
    "kalmanet_options": {
        "ssm_type": "gated_kalmanet", "use_v_conv": False, "use_beta_gate": False, "use_alpha_connection": False,
        "use_forgetting_gate_kk": False, "gla_rescale": False, "num_iter": 4, "ridge_strength": 0.3, "kv_proj_rank": 5,
    },
    "kalmanet_no_solution": {"ssm_type": "gated_kalmanet", "num_iter": 0, "use_forgetting_gate": False},
    "delta_layers": {
        "layers_block_type": ["gated_kalmanet", "sliding_attention", "gated_deltanet", "bmojo"], "num_hidden_layers": 4,
    },
    "state_expansion": {  # Mamba2 as the authors' checkpoints have it
        "mamba_num_key_value_heads": 3, "mamba_num_heads": 6, "n_groups": 6, "state_size": 6, "mixer_norm": "learned",
        "mixer_rms_eps": 1e-2, "mamba_use_pos_emb": True, "mamba_norm_eps": 1e-1,
    },
    "mamba2_options": {
        "mamba_d_mlp": 10, "D_has_hdim": True, "mamba_norm_before_gate": True, "n_groups": 3, "mixer_norm": "weightless",
        "time_step_limit": (0.1, math.inf), "mamba_hidden_act": "gelu", "layers_block_type": ["mamba2", "bmojo"],
    },
    "mamba2_without_norm": {"mamba_rms_norm": False, "mamba_d_mlp": 3, "mamba_num_heads": 2, "conv_kernel": 2},
    "jamba": {
        "layers_block_type": ["mamba", "full_attention"], "mixer_norm": "learned", "mamba_hidden_act": "relu",
        "mamba_intermediate_size": 35,
    },
    "falcon_mamba": {"ssm_type": "mamba", "mixer_norm": "weightless", "mixer_rms_eps": 1e-2, "intermediate_size": None},
}  # fmt: skip
SOME = ["every_layer", "rank_mamba_untied", "learnable", "chunk_above_window", "no_memory", "random"]
SOME += ["delta_layers", "fading_query_norms", "with_and_without_memory"]
SOME_SSM = ["state_expansion", "mamba2_options", "jamba"]
SOME_ATTENTION = ["partial_rank", "attention_conv", "hybrid"]
FEW = SOME[:2]
NO_REFERENCE = {  # what the reference does not have
    "no_fading": {"fading_span": False, "innovation_predictor": "recent", "eidetic_position": "rank"},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16,
        },
        "layers_block_type": ["bmojo", "full_attention"],
    },
}  # fmt: skip


def rel_error(got, want):
    """Root mean square error relative to ``want``: one number, whatever the scale."""
    assert got.shape == want.shape
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-12)).item()


def in_forms(variants, others=FEW):
    """Every variant in the form that is chosen by itself, and these others in each form: see the fixture `form`."""
    cases = [("auto", variant) for variant in variants]
    cases += [(form, variant) for form in ("blocks", "definition") for variant in others]
    return pytest.mark.parametrize(("form", "variant"), cases, indirect=["form"])


def tokens(*shape, seed=1, low=3):
    return torch.randint(low, 97, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def make(tiny_model):
    """A tiny model (of a variant, or of overrides) in which nothing hides behind a 0 or a 1 of the initialisation."""
    made = {}

    def make(variant="plain", dtype=torch.float64, **overrides):
        key = str((variant, dtype, overrides))
        if key not in made:
            model = tiny_model(dtype=torch.float64, **((VARIANTS | NO_REFERENCE)[variant] | overrides))
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            made[key] = model.to(dtype)
        return made[key].eval().requires_grad_(True)

    return make


def reference(model, ids):
    return reference_forward(
        model.config,
        model.state_dict(),
        ids,
        lambda layer_idx, seq_len: hash_scores(torch.arange(seq_len), layer_idx).tolist(),
    )


@torch.no_grad()
def stream(model, ids, sizes, **kwargs):
    """Feed (batch, seq_len) ids in calls of these sizes, the rest in a last one. Logits, memory by layer and chunk, cache."""
    cache = BMojoCache(model.config)
    logits, memories, start = [], defaultdict(dict), 0
    for size in [*sizes, ids.shape[1]]:
        part = ids[:, start : start + size]
        out = model(part, cache=cache, output_eidetic=True, **kwargs)
        assert out.cache is cache
        logits.append(out.logits)
        first = start // model.config.eidetic_chunk_size
        for layer, positions in enumerate(out.eidetic_positions):
            for chunk in range(0 if positions is None else positions.shape[1]):
                seen = positions[:, chunk]
                assert torch.equal(memories[layer].setdefault(first + chunk, seen), seen)  # one memory per chunk
        start += part.shape[1]
    return torch.cat(logits, 1), memories, cache


def cache_of_row(cache, row):
    """The tensors of one row of a cache, as those of the row alone: without columns that `full_attention` never filled."""
    length = int(cache.lengths[row])
    rows = {name: tensor[row].clone() for name, tensor in cache.tensors().items()}  # decoding writes in place
    return {name: tensor[:, :length] if ".full_" in name else tensor for name, tensor in rows.items()}


def assert_same_state(got, want, tolerance=1e-9):
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        assert tensor.dtype == want[name].dtype
        finite = want[name].isfinite()
        assert torch.equal(tensor.isfinite(), finite), name
        assert rel_error(tensor[finite], want[name][finite]) < tolerance, name
        if not tensor.is_floating_point():
            assert torch.equal(tensor, want[name]), name


# ---------------------------------------------------------------------------- model = reference


@in_forms(VARIANTS, [*SOME, *SOME_SSM])
def test_model_is_the_reference(make, form, variant):
    model = make(variant)
    w = model.config.sliding_window
    lengths = {1, 2, w - 1, w, w + 1, 2 * w - 1, 2 * w, 2 * w + 1, 3 * w + 8} - {0}
    ids = tokens(max(lengths))
    want = reference(model, ids)  # of the longest: it is a function of the prefix
    for seq_len in sorted(lengths):
        with torch.no_grad():
            got = model(ids[None, :seq_len], use_cache=False, output_eidetic=True, output_hidden_states=True)
        assert rel_error(got.logits[0], want.logits[:seq_len]) < 1e-9
        assert len(got.hidden_states) == len(want.hidden_states)
        for states, wanted in zip(got.hidden_states[:-1], want.hidden_states, strict=False):
            assert rel_error(states[0], wanted[:seq_len]) < 1e-9
        for layer, kind in enumerate(model.config.layers_block_type):
            if kind != "bmojo" or not model.config.eidetic_size:
                assert got.innovations[layer] is None
                assert got.eidetic_positions[layer] is None
                continue
            errors = torch.tensor(want.innovations[layer][:seq_len], dtype=torch.float64)
            assert rel_error(got.innovations[layer][0].double(), errors) < 1e-9
            memory = want.memory[layer][: seq_len : model.config.eidetic_chunk_size]
            filled = [[-1] * (model.config.eidetic_size - len(chosen)) + chosen for chosen in memory]
            assert got.eidetic_positions[layer].tolist() == [filled]


def test_reference_tells_variants_apart(make):
    """The comparison above has teeth: the reference of one choice is not the model of another."""
    ids = tokens(24)
    for variant in ("rank", "random", "recent", "oldest", "exponential", "no_memory"):
        other = make("plain")
        model = make(variant)
        with torch.no_grad():
            assert rel_error(model(ids[None]).logits[0], reference(other, ids).logits) > 1e-3, variant


@torch.no_grad()
def test_bmojo_f_layers_are_bmojo_layers_without_memory(tiny_model):
    """The same weights and answers, bit for bit, read at once and token by token."""
    ids, found = tokens(2, 40), []
    models = tiny_model(eidetic_size=0), tiny_model(layers_block_type=["bmojo_f"] * 2)
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        cache = BMojoCache(model.config)
        steps = [model(ids[:, t : t + 1], cache=cache).logits for t in range(40)]
        found.append((model(ids, use_cache=False).logits, torch.cat(steps, 1), cache.num_bytes()))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]


def test_whole_memory_in_window_is_full_attention(make):
    """A bmojo layer within its window is a full_attention layer, for scaled rotary embeddings too (the reference has none)."""
    yarn = make("yarn", layers_block_type=["bmojo"] * 2, sliding_window=30)
    full = make("yarn", layers_block_type=["full_attention"] * 2)
    full.load_state_dict(yarn.state_dict(), strict=False)
    ids = tokens(1, 30)
    with torch.no_grad():
        assert rel_error(yarn(ids).logits, full(ids).logits) < 1e-9
    assert rotary_frequencies(yarn.config)[1] != 1.0


def test_model_runs_on_a_config_of_another_class(make):
    """Remote code loads one class per commit; the model reads attributes and asks for no type."""
    model = make()
    other_class = type("BMojoConfig", (type(model.config),), {"__module__": "transformers_modules.elsewhere"})
    other = BMojoForCausalLM(other_class(**model.config.to_dict())).double().eval()
    other.load_state_dict(model.state_dict())
    ids = tokens(1, 20)
    with torch.no_grad():
        assert torch.equal(other(ids).logits, model(ids).logits)


# ---------------------------------------------------------------------------- streaming = parallel


@in_forms([*VARIANTS, *NO_REFERENCE], [*SOME, *SOME_SSM])
def test_streaming_is_parallel(make, form, variant):
    assert_streaming_is_parallel(make(variant), 1e-9)


@pytest.mark.parametrize("variant", SOME + SOME_SSM)
def test_streaming_is_parallel_in_single_precision(make, variant):
    assert_streaming_is_parallel(make(variant, torch.float32), 1e-4)


def assert_streaming_is_parallel(model, tolerance):
    ids = tokens(2, 5 * W + 1)
    with torch.no_grad():
        whole = model(ids, use_cache=False, output_eidetic=True)
    _, _, want = stream(model, ids, [])

    @settings(max_examples=5, deadline=None, derandomize=True, database=None)
    @given(st.lists(st.sampled_from([0, 1, 1, 1, 2, 3, 4, 5, 7, 11]), max_size=20))
    def check(sizes):
        logits, memories, cache = stream(model, ids, sizes)
        assert rel_error(logits, whole.logits) < tolerance
        assert cache.get_seq_length() == ids.shape[1]
        assert_same_state(cache.tensors(), want.tensors(), tolerance)
        for layer, chunks in memories.items():
            assert torch.equal(torch.stack([chunks[i] for i in range(len(chunks))], 1), whole.eidetic_positions[layer])

    check()


@pytest.mark.parametrize("sizes", [[1] * 31, [0, 0, 1, 0, 30, 0], [31, 0], [2 * W] * 3], ids=str)
def test_streaming_at_the_extremes(make, sizes):
    model = make("every_layer")
    ids = tokens(1, 31)
    logits, _, _ = stream(model, ids, sizes)
    with torch.no_grad():
        assert rel_error(logits, model(ids, use_cache=False).logits) < 1e-9


def test_gradients_flow_through_cached_calls(make, form):
    model = make("every_layer")
    ids = tokens(1, 20)
    whole = torch.autograd.grad(model(ids, use_cache=False).logits.square().sum(), model.model.embed_tokens.weight)[0]
    cache = BMojoCache(model.config)
    logits = [model(part, cache=cache).logits for part in ids.split([7, 1, 1, 11], 1)]
    parts = torch.autograd.grad(torch.cat(logits, 1).square().sum(), model.model.embed_tokens.weight)[0]
    assert rel_error(parts, whole) < 1e-9


# ---------------------------------------------------------------------------- causality


@in_forms([*SOME, *SOME_SSM, *SOME_ATTENTION], FEW)
@pytest.mark.parametrize("cached", [False, True])
@torch.no_grad()
def test_the_past_does_not_see_the_future(make, form, variant, cached):
    """For every t, around the edges of chunks and windows too: bit for bit."""
    model = make(variant, torch.float32)
    ids = tokens(1, 5 * W)
    want = model(ids, use_cache=cached, output_eidetic=True)
    for t in range(ids.shape[1]):
        changed = ids.clone()
        changed[0, t] = 3 + (ids[0, t] - 2) % 94
        got = model(changed, use_cache=cached, output_eidetic=True)
        assert torch.equal(got.logits[:, :t], want.logits[:, :t]), t
        assert not torch.equal(got.logits[:, t], want.logits[:, t]), t
        chunks = t // model.config.eidetic_chunk_size + 1  # the memory of t's own chunk is older than t
        for positions, wanted in zip(got.eidetic_positions, want.eidetic_positions, strict=True):
            assert positions is None or torch.equal(positions[:, :chunks], wanted[:, :chunks]), t


@pytest.mark.parametrize("variant", ["plain", "every_layer", "rank_mamba_untied"])
@torch.no_grad()
def test_appended_tokens_change_nothing(make, variant):
    model = make(variant)
    ids = tokens(1, 40)
    want = model(ids, use_cache=False).logits
    for seq_len in range(1, 40, 2):
        assert rel_error(model(ids[:, :seq_len], use_cache=False).logits, want[:, :seq_len]) < 1e-9


@in_forms([*SOME, *SOME_SSM, *SOME_ATTENTION], FEW)
def test_gradients_reach_only_the_past(make, form, variant):
    model = make(variant)
    embeds = model.model.embed_tokens(tokens(1, 4 * W)).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, use_cache=False).logits[0]
    for s in range(logits.shape[0]):
        reached = torch.autograd.grad(logits[s].sum(), embeds, retain_graph=True)[0][0].abs().sum(-1)
        assert not reached[s + 1 :].any()
        assert (reached[: s + 1] > 0).all()  # through the SSM, everything older


# ---------------------------------------------------------------------------- padding


LENGTHS = [1, C, W - 1, W, W + 1, 2 * W, 2 * W + 1, 21, 0]  # 0: a row of nothing but padding


def padded(side, lengths=LENGTHS, width=24, seed=2):
    """Random ids, also under the padding, and a mask with that many tokens per row."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.arange(width).expand(len(lengths), -1)
    order = {"left": -columns, "right": columns, "holes": torch.rand(columns.shape, generator=generator)}[side]
    rank = order.argsort(1).argsort(1)
    return tokens(len(lengths), width, seed=seed), (rank < torch.tensor(lengths)[:, None]).long()


@pytest.mark.parametrize("side", ["left", "right", "holes"])
@pytest.mark.parametrize("variant", [*SOME, *SOME_SSM, *SOME_ATTENTION])
@torch.no_grad()
def test_padded_rows_are_rows_alone(make, variant, side):
    """Logits, every cache tensor after them, and 30 steps of decoding from there."""
    model = make(variant)
    ids, mask = padded(side)
    steps = tokens(len(ids), 30, seed=3)
    cache = BMojoCache(model.config)
    batch = model(ids, attention_mask=mask, cache=cache, output_eidetic=True)
    states = [cache_of_row(cache, row) for row in range(len(ids))]
    assert torch.equal(cache.lengths, mask.sum(1))
    decoded = []
    for step in range(30):
        mask = F.pad(mask, (0, 1), value=1)
        decoded.append(model(steps[:, step : step + 1], attention_mask=mask, cache=cache).logits)
    decoded = torch.cat(decoded, 1)
    for row, length in enumerate(LENGTHS):
        kept = mask[row, :24].bool()
        own = BMojoCache(model.config)
        alone = model(ids[row : row + 1, kept], cache=own, output_eidetic=True)
        if length:
            assert rel_error(batch.logits[row, kept], alone.logits[0]) < 1e-9
            assert_same_state(states[row], cache_of_row(own, 0))
            for layer, positions in enumerate(alone.eidetic_positions):
                if positions is not None:
                    chunks = positions.shape[1]
                    assert torch.equal(batch.eidetic_positions[layer][row, :chunks], positions[0])
                    assert (batch.eidetic_positions[layer][row, chunks:] == -1).all()
                    assert rel_error(batch.innovations[layer][row, kept], alone.innovations[layer][0]) < 1e-9
        assert rel_error(decoded[row], model(steps[row : row + 1], cache=own).logits[0]) < 1e-9
        assert_same_state(cache_of_row(cache, row), cache_of_row(own, 0))


@in_forms(["every_layer", "chunk_above_window", "attention_conv"])
@torch.no_grad()
def test_padded_rows_in_several_calls(make, form, variant):
    """Padding anywhere in calls of any size, single columns of a mixed batch among them."""
    model = make(variant)
    ids, mask = padded("holes", width=40, lengths=[1, 7, 20, 33, 40, 0])
    cache = BMojoCache(model.config)
    logits, start = [], 0
    for number, size in enumerate([3, 1, 1, 0, 8, 1, 2, 1, 1, 1, 13, 1, 1, 6]):
        end = start + size
        seen = mask[:, start:end] if number % 2 else mask[:, :end]  # the mask of the call, or with its past
        logits.append(model(ids[:, start:end], attention_mask=seen, cache=cache).logits)
        start = end
    logits = torch.cat(logits, 1)
    for row in range(len(ids) - 1):
        kept = mask[row].bool()
        own = BMojoCache(model.config)
        assert rel_error(logits[row, kept], model(ids[row : row + 1, kept], cache=own).logits[0]) < 1e-9
        assert_same_state(cache_of_row(cache, row), cache_of_row(own, 0))


@pytest.mark.parametrize("side", ["left", "right", "holes"])
@pytest.mark.parametrize("variant", ["plain", "every_layer"])
def test_padded_loss_is_that_of_the_rows(make, variant, side):
    """The labels are the ids, under the padding too: what padding predicts, or would be predicted, does not count."""
    model = make(variant)
    ids, mask = padded(side)
    loss = model(ids, attention_mask=mask, labels=ids).loss
    want, targets = 0.0, sum(max(0, length - 1) for length in LENGTHS)
    for row, length in enumerate(LENGTHS):
        if length > 1:
            kept = ids[row : row + 1, mask[row].bool()]
            want = want + (length - 1) / targets * model(kept, labels=kept).loss
    assert rel_error(loss, want) < LOSS_TOLERANCE
    gradients = (torch.autograd.grad(value, list(model.parameters())) for value in (loss, want))
    assert max(map(rel_error, *gradients)) < LOSS_TOLERANCE


# ---------------------------------------------------------------------------- packing


DOCUMENTS = [1, 2, C, 7, 2 * W + 1, 1, 18, W]  # shorter than the convolution (4), the window and a chunk, and longer
OFFSETS = [sum(DOCUMENTS[:i]) for i in range(len(DOCUMENTS) + 1)]


def boundaries(how):
    """One way to say where the documents begin."""
    sizes = torch.tensor(DOCUMENTS)
    return {
        "seq_idx": {"seq_idx": torch.arange(len(sizes)).repeat_interleave(sizes)[None]},
        "cu_seq_lens": {"cu_seq_lens_q": torch.tensor(OFFSETS, dtype=torch.int32)},
        "both_cu_seq_lens": {f"cu_seq_lens_{x}": torch.tensor(OFFSETS, dtype=torch.int32) for x in "qk"},
        "position_ids": {"position_ids": torch.cat([torch.arange(size) for size in DOCUMENTS])[None]},
        "falling_position_ids": {
            "position_ids": torch.cat([torch.arange(size) + 40 - 4 * i for i, size in enumerate(DOCUMENTS)])[None]
        },
    }[how]


@pytest.mark.parametrize("how", ["seq_idx", "cu_seq_lens", "both_cu_seq_lens", "position_ids", "falling_position_ids"])
@pytest.mark.parametrize(
    "variant", ["every_layer", "mamba", "learnable", "chunk_above_window", *SOME_SSM, *SOME_ATTENTION]
)
def test_packed_is_separate(make, variant, how):
    """Logits, memory, loss and gradients. In training mode: the learnable predictor's own loss counts too."""
    model = make(variant).train()
    ids = tokens(1, sum(DOCUMENTS))
    packed = model(ids, labels=ids, output_eidetic=True, **boundaries(how))

    logits, loss, predictor_loss, targets = [], 0.0, 0.0, ids.shape[1] - len(DOCUMENTS)
    for number, document in enumerate(ids.split(DOCUMENTS, 1)):
        alone = model.model(document, output_eidetic=True)
        logits.append(model.lm_head_multiplier * model.lm_head(alone.last_hidden_state))
        loss = loss + F.cross_entropy(logits[-1][0, :-1], document[0, 1:], reduction="sum") / targets
        if alone.predictor_loss is not None:
            predictor_loss = predictor_loss + document.shape[1] * alone.predictor_loss / ids.shape[1]
        for got, want in zip(packed.eidetic_positions, alone.eidetic_positions, strict=True):
            assert want is None or torch.equal(got[number, : want.shape[1]], want[0])
    loss = loss + model.config.innovation_loss_coef * predictor_loss
    assert (variant == "learnable") == bool(predictor_loss)
    assert rel_error(packed.logits, torch.cat(logits, 1)) < 1e-9
    assert rel_error(packed.loss, loss) < LOSS_TOLERANCE
    got, want = (torch.autograd.grad(value, list(model.parameters())) for value in (packed.loss, loss))
    for (name, _), a, b in zip(model.named_parameters(), got, want, strict=True):
        assert rel_error(a, b) < LOSS_TOLERANCE, name


@torch.no_grad()
def test_packed_batches_with_padding(make, form):
    """Every row packs documents of its own, and ends or begins with padding."""
    model = make("every_layer")
    ids, documents = tokens(2, 26), torch.full((2, 26), -1)
    cuts = {0: [0, 4, 16, 22], 1: [2, 3, 23, 26]}  # of each row, where its documents begin and the last one ends
    for row, edges in cuts.items():
        for number, (start, end) in enumerate(pairwise(edges)):
            documents[row, start:end] = number
    positions = (documents[:, :, None] == documents[:, None]).tril().sum(-1) - 1
    said = {"seq_idx": documents, "position_ids": positions}
    for how in (["seq_idx"], ["position_ids"], ["seq_idx", "position_ids"]):
        packed = model(ids, attention_mask=(documents >= 0).long(), **{name: said[name] for name in how}).logits
        for row, edges in cuts.items():
            for start, end in pairwise(edges):
                alone = model(ids[row : row + 1, start:end], use_cache=False).logits
                assert rel_error(packed[row, start:end], alone[0]) < 1e-9


@torch.no_grad()
def test_positions_that_start_late_are_no_boundary(make):
    model = make("every_layer")
    ids = tokens(2, 20)
    want = model(ids, labels=ids, use_cache=False)
    for positions in (torch.arange(20)[None] + 7, torch.stack([torch.arange(20) + 10**6, torch.arange(20)])):
        got = model(ids, labels=ids, position_ids=positions, use_cache=False)
        assert torch.equal(got.logits, want.logits)
        assert torch.equal(got.loss, want.loss)


@torch.no_grad()
def test_labels_at_document_starts_are_ignored(make):
    model = make()
    ids = tokens(1, sum(DOCUMENTS))
    loss = model(ids, labels=ids, **boundaries("seq_idx")).loss
    starts = torch.tensor(OFFSETS[:-1])
    for t in range(1, ids.shape[1]):
        labels = ids.clone()
        labels[0, t] = (ids[0, t] + 1) % 97
        assert torch.equal(model(ids, labels=labels, **boundaries("seq_idx")).loss, loss) == (t in starts)


# ---------------------------------------------------------------------------- selection


def periodic(period, seq_len=33):
    return tokens(period, seed=4).repeat(-(-seq_len // period))[:seq_len]


def memories_of(model, ids, **kwargs):
    """Per bmojo layer the memory of every chunk, for the first row."""
    with torch.no_grad():
        out = model(ids, output_eidetic=True, **kwargs)
    return [positions[0].tolist() for positions in out.eidetic_positions if positions is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["32", "64"])
@pytest.mark.parametrize("variant", ["plain", "rank_mamba_untied", "learnable", "chunk_above_window"])
@pytest.mark.parametrize(
    "sequence", [tokens(33, seed=5), periodic(1), periodic(2), periodic(7)], ids=["any", "1", "2", "7"]
)
def test_selection_is_a_function_of_the_prefix(make, variant, dtype, sequence):
    model = make(variant, dtype)
    others = tokens(7, 33, seed=6)
    want = memories_of(model, sequence[None], use_cache=False)
    assert want == memories_of(model, torch.cat([sequence[None], others]), use_cache=False)
    for side in ("left", "right"):
        ids = torch.cat([tokens(8, 9, seed=7), torch.cat([sequence[None], others])], 1)
        mask = (torch.arange(42) >= 9).long().repeat(8, 1)
        if side == "right":
            ids, mask = ids.roll(-9, 1), mask.roll(-9, 1)
        ids[1:], mask[1:, 12:16] = ids[1:].flip(1), 0  # ragged neighbours
        assert [layer[: len(want[0])] for layer in memories_of(model, ids, attention_mask=mask)] == want
    for sizes in ([1] * 33, [4, 1, 0, 9]):
        _, memories, _ = stream(model, sequence[None], sizes)
        assert [[chunks[i][0].tolist() for i in range(len(chunks))] for chunks in memories.values()] == want
    for seq_len in (7, 20, 32):
        part = memories_of(model, sequence[None, :seq_len], use_cache=False)
        assert part == [layer[: -(-seq_len // model.config.eidetic_chunk_size)] for layer in want]


@pytest.mark.parametrize("half_life", [None, 3])
@pytest.mark.parametrize("sizes", [[], [1] * 33, [2, 9, 0, 1, 1, 5]], ids=str)
def test_equal_innovations_keep_the_earliest(tiny_model, sizes, half_life):
    """An SSM that says nothing: all innovations are exactly 0, at every chunk the oldest tokens stay."""
    model = tiny_model(eidetic_size=6, innovation_half_life=half_life)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.mixer.fading.out_proj.weight)
    _, memories, _ = stream(model, tokens(2, 33), sizes)
    for chunks in memories.values():
        for chunk, positions in chunks.items():
            left = max(0, min(6, chunk * C - W + 1))
            assert positions.tolist() == [[-1] * (6 - left) + list(range(left))] * 2


@pytest.mark.parametrize("half_life", [None, 0.05])
@pytest.mark.parametrize("sizes", [[], [1] * 33, [13, 1, 4]], ids=str)
def test_nan_innovations_rank_last(make, sizes, half_life):
    """From token 9 on the SSM's state is NaN; older tokens keep their places, then the earliest NaN fills up."""
    model = make("plain", eidetic_size=12, innovation_half_life=half_life)
    embeds = model.model.embed_tokens(tokens(1, 33)).detach()
    embeds[0, 9] = torch.nan
    cache, seen = BMojoCache(model.config), {}
    with torch.no_grad():
        for part in embeds.split([*sizes, 33 - sum(sizes)], 1):
            first = cache.get_seq_length() // C
            if part.shape[1]:
                out = model(inputs_embeds=part, cache=cache, output_eidetic=True)
                seen |= {first + i: positions for i, positions in enumerate(out.eidetic_positions[0][0].tolist())}
    errors = reference(model, tokens(33)).innovations[0][:9] + [math.nan] * 24
    for chunk in range(11):
        chosen = select_by_definition(model.config, chunk, errors)
        assert seen[chunk] == [-1] * (12 - len(chosen)) + chosen


@pytest.mark.parametrize("start", [0, 10**6, 10**7])
@pytest.mark.parametrize("half_life", [256, 16384])
def test_scores_of_fading_innovations_hold_far_into_a_stream(make, start, half_life):
    """Of 4,000 tokens float32 chooses the 64 that what is left of their innovations says, whatever their positions."""
    mixer = make("plain", innovation_half_life=half_life).model.layers[0].mixer
    innovations = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0)).exp()
    positions = start + torch.arange(4000)[None]
    call = SimpleNamespace(positions=positions, real=lambda: None)
    left = innovations[0].double() * 0.5 ** ((positions[0, -1] - positions[0]) / half_life)
    assert set(select(mixer.score(innovations, call), 64)[0].tolist()) == set(left.topk(64).indices.tolist())


@pytest.mark.parametrize("levels", [1, 2, 5, 1000])
@pytest.mark.parametrize(("entries", "size"), [(1, 1), (7, 4), (40, 17), (300, 128), (1000, 1000)])
def test_select_is_a_stable_sort(levels, entries, size):
    generator = torch.Generator().manual_seed(entries + levels)
    scores = torch.randint(levels, (5, entries), generator=generator).float() / 8
    scores[1, ::3] = -torch.inf
    scores[2] = -torch.inf
    scores[3, 0] = torch.inf
    want = [sorted(sorted(range(entries), key=lambda i, row=row: (-row[i], i))[:size]) for row in scores.tolist()]
    assert select(scores, size).tolist() == want
    assert select(scores.double(), size).tolist() == want


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 8), st.integers(1, 9))
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_select_in_pieces_is_select_at_once(levels, size, piece):
    """Merging in chunks of any size keeps the set: what a running memory rests on."""
    scores = torch.tensor([[-torch.inf] * size + [float(level) for level in levels]])
    kept = torch.arange(size)
    for start in range(size, scores.shape[1], piece):
        entries = torch.cat([kept, torch.arange(start, min(start + piece, scores.shape[1]))])
        kept = entries[select(scores[:, entries], size)[0]]
    best = sorted(range(len(levels)), key=lambda i: (-levels[i], i))[:size]
    assert [i - size for i in kept.tolist() if i >= size] == sorted(best)


def test_random_scores_spread():
    """The hash is uniform enough for a control, and layers do not repeat each other."""
    scores = torch.stack([hash_scores(torch.arange(10_000), salt) for salt in range(4)])
    assert scores.min() >= 0
    assert scores.max() < 1
    assert (scores.mean(1) - 0.5).abs().max() < 0.02
    assert (torch.corrcoef(scores) - torch.eye(4)).abs().max() < 0.05
    assert torch.corrcoef(torch.stack([scores[0, 1:], scores[0, :-1]]))[0, 1].abs() < 0.05


# ---------------------------------------------------------------------------- positions


@pytest.mark.parametrize("variant", ["plain", "rank", "learnable", "chunk_above_window", "no_memory"])
@pytest.mark.parametrize("far", [10**6, 10**9])
@pytest.mark.parametrize("even", [False, True])  # whether all rows are known to be as far as the columns
@torch.no_grad()
def test_a_stream_may_be_anywhere(make, variant, far, even):
    """A cache moved far along in position answers as before: only distances count, and they stay exact in float32."""
    model = make(variant, torch.float32)
    config = model.config
    ids = tokens(2, 60)
    _, _, cache = stream(model, ids[:, :31], [])
    _, _, moved = stream(model, ids[:, :31], [])
    slots = memory_slots(config, "bmojo")
    fading = slots["fading"].stop - slots["fading"].start
    rings = slots["window"].stop, fading, 2 * config.sliding_window - fading, config.eidetic_chunk_size
    rings = *filter(None, rings), config.innovation_kernel
    shift = far // math.lcm(*rings) * math.lcm(*rings)
    turn = rotary_table(torch.tensor([[shift]]), *rotary_frequencies(config), torch.float32)
    moved.lengths += shift
    moved.even = even
    if even:
        moved.seen_tokens += shift
    for layer in moved.layers:
        for name in ("window", "fading"):
            layer.state["key"][:, :, slots[name]] = rotate(layer.state["key"][:, :, slots[name]], *turn)
        if "waiting_key" in layer.state:
            layer.state["waiting_key"] = rotate(layer.state["waiting_key"], *turn)
        if config.eidetic_size:
            positions = layer.state["eidetic_position"]
            layer.state["eidetic_position"] = torch.where(positions >= 0, positions + shift, -1)
    for part in ids[:, 31:].split([1, 1, 1, 1, 9, 1, 15], 1):
        want, got = (model(part, cache=c, output_eidetic=True) for c in (cache, moved))
        assert rel_error(got.logits, want.logits) < 1e-4
        for a, b in zip(got.eidetic_positions, want.eidetic_positions, strict=True):
            assert a is None or torch.equal(a, torch.where(b >= 0, b + shift, -1))


@pytest.mark.parametrize(("position", "tolerance"), [(10**6, 1e-9), (10**8, 1e-7), (10**9, 1e-6)])
def test_rotary_table_is_exact_far_out(tiny_config, position, tolerance):
    config = tiny_config(head_dim=64)
    inv_freq, scaling = rotary_frequencies(config)
    cos, sin = rotary_table(torch.tensor([position]), inv_freq, scaling, torch.float64)
    single = rotary_table(torch.tensor([position]), inv_freq, scaling, torch.float32)
    with mpmath.workdps(50):
        angles = [position * mpmath.mpf(10000) ** (-mpmath.mpf(2 * i) / 64) for i in range(32)] * 2
        for got, rounded, function in ((cos, single[0], mpmath.cos), (sin, single[1], mpmath.sin)):
            want = torch.tensor([[float(function(angle)) for angle in angles]], dtype=torch.float64)
            if function is mpmath.sin:
                want[:, :32] *= -1  # as `rotate` wants it
            assert (got - want).abs().max() < tolerance
            assert (rounded - want).abs().max() < tolerance + 2e-7


def table_in_use(model, seq_len=40):
    """The cosines and sines that reach the layers."""
    calls = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda _, args: calls.append(args[1]))
    with torch.no_grad():
        model(tokens(1, seq_len))
    hook.remove()
    return calls[0].cos, calls[0].sin


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_leaves_the_rotary_table(tiny_model, dtype):
    model = tiny_model()
    assert not dict(model.named_buffers())
    before = table_in_use(model)
    after = table_in_use(model.to(dtype))
    for a, b in zip(before, after, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert torch.equal(a, b)
    assert torch.equal(table_in_use(model.to(dtype).float())[0], before[0])


# ---------------------------------------------------------------------------- dtypes and NaN


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", ["every_layer", "rank_mamba_untied", "learnable", "qk_norm", *SOME_SSM])
@pytest.mark.parametrize("dt_bias", [None, -20.0, 20.0])
def test_every_dtype_is_kept_and_finite(tiny_model, variant, dtype, dt_bias):
    model = tiny_model(dtype=dtype, **VARIANTS[variant]).train()
    if dt_bias is not None:
        for name, parameter in model.named_parameters():
            if name.endswith("dt_bias"):
                torch.nn.init.constant_(parameter, dt_bias)
    wide = torch.promote_types(dtype, torch.float32)
    embeds = (model.model.embed_tokens(tokens(2, 4 * W)) * 300).detach().requires_grad_()
    cache = BMojoCache(model.config)
    labels = tokens(2, 4 * W - 2)
    first = model(inputs_embeds=embeds[:, :-2], cache=cache, labels=labels, output_eidetic=True)
    later = [model(inputs_embeds=embeds[:, i : i + 1], cache=cache).logits for i in (-2, -1)]
    logits = torch.cat([first.logits, *later], 1)
    assert logits.dtype == dtype
    assert logits.isfinite().all()
    for name, tensor in cache.tensors().items():
        kind = name.split(".")[-1]
        wanted = {"lengths": torch.int64, "eidetic_position": torch.int64}.get(kind)
        wanted = wanted or (wide if kind in ("ssm", "kk_ssm", "window_innovation", "eidetic_innovation") else dtype)
        assert tensor.dtype == wanted, name
        assert (tensor.isfinite() | (tensor == -torch.inf)).all(), name
    assert all(errors is None or (errors.dtype == wide and errors.isfinite().all()) for errors in first.innovations)
    (first.loss + logits.float().square().mean()).backward()
    assert embeds.grad.isfinite().all()
    for name, parameter in model.named_parameters():
        if name != "model.embed_tokens.weight":
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


@in_forms(["every_layer", "rank_mamba_untied", "random", *SOME_SSM])
@pytest.mark.parametrize("side", [None, "left"])
@torch.no_grad()
def test_nan_stays_in_its_row(make, form, variant, side):
    model = make(variant, torch.float32)
    embeds = model.model.embed_tokens(tokens(3, 24))
    mask = torch.ones(3, 24, dtype=torch.long)
    if side:
        mask[0, :5], mask[1, :9] = 0, 0
    poisoned = embeds.clone()
    poisoned[1, 11] = torch.nan

    def run(embeds):
        cache = BMojoCache(model.config)
        logits = [model(inputs_embeds=embeds[:, :20], attention_mask=mask[:, :20], cache=cache).logits]
        logits += [model(inputs_embeds=embeds[:, i : i + 1], cache=cache).logits for i in range(20, 24)]
        return torch.cat(logits, 1), cache

    (want, wanted), (got, cache) = run(embeds), run(poisoned)
    assert got[1, 11:].isnan().any()
    assert torch.equal(got[[0, 2]], want[[0, 2]])
    for name, tensor in cache.tensors().items():
        assert torch.equal(tensor[[0, 2]], wanted.tensors()[name][[0, 2]]), name


@torch.no_grad()
def test_padding_may_hold_anything(make, form):
    """What stands under the padding, NaN too, changes no bit."""
    model = make("every_layer", torch.float32)
    ids, mask = padded("holes")
    embeds = model.model.embed_tokens(ids)
    want = model(inputs_embeds=embeds, attention_mask=mask).logits
    poisoned = embeds.masked_fill(mask[..., None] == 0, torch.nan)
    got = model(inputs_embeds=poisoned, attention_mask=mask)
    assert torch.equal(got.logits[mask.bool()], want[mask.bool()])
    assert not any(tensor.isnan().any() for tensor in got.cache.tensors().values())


# ---------------------------------------------------------------------------- the scans


def ssd_loop(x, dt, A, B, C, state):
    outputs, per_group = [], x.shape[2] // B.shape[2]
    for t in range(x.shape[1]):
        b, c = (m[:, t].repeat_interleave(per_group, 1) for m in (B, C))
        grown = dt[:, t, :, None, None] * x[:, t, :, :, None] * b[:, :, None]
        state = (dt[:, t] * A).exp()[..., None, None] * state + grown
        outputs.append((state * c[:, :, None]).sum(-1))
    return torch.stack(outputs, 1), state


def selective_loop(x, dt, A, B, C, state):
    outputs = []
    for t in range(x.shape[1]):
        state = (dt[:, t, :, None] * A).exp() * state + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
        outputs.append((state * C[:, t, None]).sum(-1))
    return torch.stack(outputs, 1), state


def scan_inputs(kind, batch, seq_len, *sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if kind == "ssd":
        heads, channels, groups, state = sizes
        inputs = [random(batch, seq_len, heads, channels), random(batch, seq_len, heads), random(heads)]
        inputs += [random(batch, seq_len, groups, state) for _ in "BC"] + [random(batch, heads, channels, state)]
    else:
        channels, state = sizes
        inputs = [random(batch, seq_len, channels), random(batch, seq_len, channels), random(channels, state)]
        inputs += [random(batch, seq_len, state) for _ in "BC"] + [random(batch, channels, state)]
    inputs[1], inputs[2] = F.softplus(inputs[1]), -inputs[2].exp()
    return [tensor.requires_grad_() for tensor in inputs]


SCANS = {"ssd": (ssd_scan, ssd_loop, (4, 3, 2, 5)), "selective": (selective_scan, selective_loop, (6, 5))}


@pytest.mark.parametrize("kind", SCANS)
@pytest.mark.parametrize(
    ("batch", "seq_len", "chunk_size"), [(1, 1, 4), (2, 3, 4), (2, 8, 4), (1, 37, 4), (2, 67, 1), (1, 67, 64)]
)
@pytest.mark.parametrize("with_state", [False, True])
def test_scan_is_its_loop(form, kind, batch, seq_len, chunk_size, with_state):
    scan, loop, sizes = SCANS[kind]
    inputs = scan_inputs(kind, batch, seq_len, *sizes)
    if not with_state:
        inputs[-1] = torch.zeros_like(inputs[-1])
    got = scan(*inputs[:-1], inputs[-1] if with_state else None, chunk_size)
    want = loop(*inputs)
    inputs = inputs if with_state else inputs[:-1]
    losses = [y.square().mean() + state.sin().sum() for y, state in (got, want)]
    gradients = [torch.autograd.grad(loss, inputs) for loss in losses]
    for a, b in zip(got + gradients[0], want + gradients[1], strict=True):
        assert rel_error(a, b) < 1e-9


@pytest.mark.parametrize("kind", SCANS)
def test_scan_at_saturation(form, kind):
    """A token with dt 0 leaves the state as it is; one with a huge dt leaves nothing of it, and nothing overflows."""
    scan, loop, sizes = SCANS[kind]
    inputs = [tensor.detach() for tensor in scan_inputs(kind, 2, 21, *sizes)]
    inputs[1][:, 3:9], inputs[1][:, 12] = 0.0, 1e4
    got, want = scan(*inputs, 4), loop(*inputs)
    assert all(rel_error(a, b) < 1e-9 for a, b in zip(got, want, strict=True))
    single = scan(*[tensor.float() for tensor in inputs], 4)
    assert all(a.dtype == torch.float32 and rel_error(a, b) < 1e-4 for a, b in zip(single, want, strict=True))
    half = scan(*[tensor.bfloat16() for tensor in inputs], 4)
    assert all(a.dtype == torch.float32 and a.isfinite().all() for a in half)
    inputs[1][:] = 0.0
    assert torch.equal(scan(*inputs, 4)[1], inputs[-1])


@pytest.mark.parametrize("kind", SCANS)
@pytest.mark.parametrize("chunk_size", [1, 3])
def test_scan_gradcheck(form, kind, chunk_size):
    scan, _, _ = SCANS[kind]
    inputs = scan_inputs(kind, 1, 7, *{"ssd": (2, 2, 1, 2), "selective": (2, 2)}[kind])
    assert torch.autograd.gradcheck(lambda *args: scan(*args, chunk_size), inputs)


@pytest.mark.parametrize("ssm_type", ["mamba2", "mamba"])
@pytest.mark.parametrize("position", ["constant", "rank"])
def test_layer_gradcheck(make, ssm_type, position):
    """A whole bmojo layer, beyond 2w, in its input and all of its parameters but the ones of the language model around it."""
    model = make(
        ssm_type=ssm_type,
        eidetic_position=position,
        num_hidden_layers=1,
        hidden_size=4,
        intermediate_size=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=2,
        sliding_window=2,
        eidetic_size=2,
        eidetic_chunk_size=2,
        mamba_head_dim=4,
        state_size=2,
        conv_kernel=2,
        tie_attn_weights=False,
    ).model
    embeds = model.embed_tokens(tokens(1, 9)).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model(inputs_embeds=x, use_cache=False).last_hidden_state, [embeds])
    names = [name for name, _ in model.named_parameters() if name.startswith("layers.0")]
    values = [model.get_parameter(name) for name in names]

    def hidden(*values):
        weights = dict(zip(names, values, strict=True))
        inputs = {"inputs_embeds": embeds.detach(), "use_cache": False}
        return torch.func.functional_call(model, weights, (), inputs).last_hidden_state

    assert torch.autograd.gradcheck(hidden, values, fast_mode=True)


@pytest.mark.parametrize("sizes", [[1], [1] * 40, [2000, *[3] * 300], [7, 1, 64, 65, 128, 1, 2]])
def test_packed_documents_are_padded_to_less_than_twice_their_tokens(sizes):
    documents = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[None]
    layout = read_layout(None, documents, seq_idx=documents)
    if len(sizes) == 1:
        assert layout is None
        return
    assert sum(group.index.numel() for group in layout.groups) < 2 * sum(sizes)
    read = torch.cat([group.to_rows(documents)[group.real] for group in layout.groups])
    assert torch.equal(read.sort().values, documents[0])


@torch.no_grad()
def test_rows_that_differ_stream_as_on_a_device_that_is_not_asked(make, monkeypatch):
    """A GPU and a compiler get the longest lead that a chunk can have, not that of the rows at hand."""
    model = make("every_layer")
    ids, mask = padded("holes", width=40, lengths=[1, 7, 20, 33, 40, 0])
    cache, logits, start = BMojoCache(model.config), [], 0
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        for size in (3, 1, 1, 8, 1, 2, 1, 1, 1, 13, 1, 1, 6):
            columns = slice(start, start + size)
            logits.append(model(ids[:, columns], attention_mask=mask[:, columns], cache=cache).logits)
            start += size
    logits = torch.cat(logits, 1)
    for row in range(len(ids) - 1):
        kept = mask[row].bool()
        assert rel_error(logits[row, kept], model(ids[row : row + 1, kept]).logits[0]) < 1e-9


@torch.no_grad()
def test_padding_has_no_innovation(make):
    ids, mask = padded("left")
    found = make("plain")(ids, attention_mask=mask, output_eidetic=True).innovations
    assert found
    assert all((innovations[mask == 0] == 0).all() for innovations in found)
