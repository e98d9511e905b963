"""What is refused, and in which words; and that a configuration survives its JSON."""

import json
import math
from functools import partial

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import DynamicCache

from bmojo.cache_bmojo import BMojoCache
from bmojo.configuration_bmojo import BMojoConfig
from bmojo.modeling_bmojo import BMojoForCausalLM


T = 17  # columns of the calls below


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(layers_block_type=["bmojo", "full_attention"])


@pytest.fixture(scope="module")
def ids():
    return torch.arange(3, 3 + T)[None]


@pytest.fixture
def cache(model, ids):
    """A cache that has seen T columns, the first two of them padding."""
    cache = BMojoCache(model.config)
    mask = torch.ones(1, T, dtype=torch.long)
    mask[0, :2] = 0
    model(ids, attention_mask=mask, cache=cache)
    return cache


# ---------------------------------------------------------------------------- inputs


def ones(*shape):
    return torch.ones(shape, dtype=torch.long)


def restart(at):
    return torch.cat([torch.arange(at), torch.arange(T - at)])[None]


def offsets(*values):
    return torch.tensor(values, dtype=torch.int32)


MASKS = {
    "too_short": (ones(1, T - 1), r"attention_mask has shape \(1, 16\); expected \(1, 17\) for the new tokens\."),
    "too_long": (ones(1, T + 1), r"attention_mask has shape \(1, 18\); expected \(1, 17\)"),
    "other_batch": (ones(2, T), r"attention_mask has shape \(2, 17\); expected \(1, 17\)"),
    "1d": (ones(T), r"attention_mask must be 2-D .* got \(17,\)"),
    "3d": (ones(1, T, T), r"attention_mask must be 2-D .* got \(1, 17, 17\).*seq_idx, cu_seq_lens_q or position_ids"),
    "4d": (ones(1, 1, T, T), r"attention_mask must be 2-D .* got \(1, 1, 17, 17\)"),
    "dict": ({"full_attention": None}, r"attention_mask must be 2-D .* got dict"),
    "list": ([[1] * T], r"attention_mask must be 2-D .* got list"),
    "2": (ones(1, T) * 2, "only 0 .padding. and 1 .token."),
    "-1": (-ones(1, T), "only 0 .padding. and 1 .token."),
    "half": (ones(1, T) / 2, "only 0 .padding. and 1 .token."),
    "-inf": (torch.zeros(1, T).index_fill(1, torch.tensor([3]), -torch.inf), "additive masks are not supported"),
    "lowest": (torch.full((1, T), torch.finfo(torch.float32).min), "additive masks are not supported"),
    "nan": (torch.full((1, T), torch.nan), "only 0 .padding. and 1 .token."),
}


@pytest.mark.parametrize("name", MASKS)
def test_mask(model, ids, name):
    mask, text = MASKS[name]
    with pytest.raises(ValueError, match=text):
        model(ids, attention_mask=mask)


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (ones(1, 2 * T), r"attention_mask counts \[17\] tokens in the past, the cache has seen \[15\]"),
        (torch.cat([ones(1, T) * 0, ones(1, T)], 1), r"counts \[0\] tokens in the past.*pass the mask that they were read with"),
        (ones(1, T + 1), r"shape \(1, 18\); expected \(1, 17\) for the new tokens or \(1, 34\) with the 17 in the cache"),
        (ones(1, 2 * T) * 2, "only 0 .padding. and 1 .token."),
    ],
    ids=["more", "fewer", "shape", "values"],
)  # fmt: skip
def test_mask_against_the_past(model, ids, cache, mask, text):
    before = {name: tensor.clone() for name, tensor in cache.tensors().items()}
    with pytest.raises(ValueError, match=text):
        model(ids, attention_mask=mask, cache=cache)
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in cache.tensors().items()
    )  # refused before it began
    assert cache.get_seq_length() == T


@pytest.mark.parametrize("bad", [-1, -100, 97, 2**40])
@pytest.mark.parametrize("at", [0, T - 1])
def test_id_out_of_range(model, ids, bad, at):
    wrong = ids.clone()
    wrong[0, at] = bad
    low, high = min(bad, int(wrong.min())), max(bad, int(wrong.max()))
    with pytest.raises(ValueError, match=f"input_ids run from {low} to {high}; the vocabulary has ids 0 to 96"):
        model(wrong)


def embeds(*shape):
    return {"inputs_embeds": torch.zeros(shape)}


INPUTS = {  # arguments (of a call without ids), error, text
    "neither": ({}, ValueError, "exactly one of input_ids and inputs_embeds"),
    "both": (embeds(1, T, 24) | {"input_ids": ones(1, T)}, ValueError, "exactly one of input_ids and inputs_embeds"),
    "embeds_size": (embeds(1, T, 23), ValueError, r"inputs_embeds has shape \(1, 17, 23\); expected \(batch, seq_len, 24\)"),
    "embeds_2d": (embeds(T, 24), ValueError, r"inputs_embeds has shape \(17, 24\); expected"),
    "ids_1d": ({"input_ids": ones(T)}, ValueError, r"input_ids has shape \(17,\); expected \(batch, seq_len\)"),
    "ids_3d": ({"input_ids": ones(1, T, 1)}, ValueError, r"input_ids has shape \(1, 17, 1\); expected"),
    "ids_float": ({"input_ids": torch.ones(1, T)}, RuntimeError, "FloatTensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", INPUTS)
def test_input(model, name):
    arguments, error, text = INPUTS[name]
    with pytest.raises(error, match=text):
        model(**arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"output_attentions": True}, "output_attentions is not supported.*output_eidetic=True"),
        ({"foo": 1}, "does not know foo;"),
        (
            {"token_type_ids": ones(1, T), "cache_position": torch.arange(T)},
            "does not know cache_position, token_type_ids;",
        ),
        ({"head_mask": ones(1, 4)}, "does not know head_mask;"),
    ],
    ids=["attentions", "unknown", "two_unknown", "head_mask"],
)
@pytest.mark.parametrize("part", ["head", "base"])
def test_argument_that_would_be_ignored(model, ids, arguments, text, part):
    with pytest.raises(ValueError, match=text):
        (model if part == "head" else model.model)(ids, **arguments)
    model(ids, **dict.fromkeys(arguments))  # None asks for nothing


def test_output_attentions_by_configuration(tiny_model, ids):
    model = tiny_model(output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions is not supported"):
        model(ids)


# ---------------------------------------------------------------------------- packing


PACKING = {
    "seq_idx_and_position_ids": (
        {"seq_idx": (torch.arange(T) > 5).long()[None], "position_ids": restart(5)},
        "position_ids and seq_idx put document boundaries at different tokens",
    ),
    "seq_idx_and_cu_seq_lens": (
        {"seq_idx": (torch.arange(T) >= 5).long()[None], "cu_seq_lens_q": offsets(0, 4, T)},
        "seq_idx and cu_seq_lens put document boundaries at different tokens",
    ),
    "position_ids_and_cu_seq_lens": (
        {"position_ids": restart(5), "cu_seq_lens_q": offsets(0, 5, 9, T)},
        "position_ids and cu_seq_lens put document boundaries at different tokens",
    ),
    "short": (
        {"cu_seq_lens_q": offsets(0, 5, T - 1)},
        r"cu_seq_lens must rise from 0 to seq_len 17, got \[0, 5, 16\]",
    ),
    "long": ({"cu_seq_lens_q": offsets(0, 5, T + 1)}, r"cu_seq_lens must rise from 0 to seq_len 17, got \[0, 5, 18\]"),
    "late": ({"cu_seq_lens_q": offsets(1, 5, T)}, r"cu_seq_lens must rise from 0 to seq_len 17, got \[1, 5, 17\]"),
    "falling": ({"cu_seq_lens_q": offsets(0, 9, 5, T)}, r"cu_seq_lens must rise from 0 to seq_len 17"),
    "2d": ({"cu_seq_lens_q": offsets(0, T)[None]}, r"cu_seq_lens must rise from 0 to seq_len 17"),
    "keys_differ": (
        {"cu_seq_lens_q": offsets(0, 5, T), "cu_seq_lens_k": offsets(0, 6, T)},
        "cu_seq_lens_q and cu_seq_lens_k differ",
    ),
    "keys_alone": ({"cu_seq_lens_k": offsets(0, 5, T)}, "cu_seq_lens_k was passed without cu_seq_lens_q"),
    "padding": (
        {"cu_seq_lens_q": offsets(0, 5, T), "attention_mask": (torch.arange(T) < T - 1).long()[None]},
        "one flattened row without padding",
    ),
    "gap": ({"position_ids": 2 * torch.arange(T)[None]}, "position_ids jump forward by more than 1"),
    "gap_and_restart": (
        {"position_ids": torch.cat([torch.arange(8), torch.arange(T - 8) * 3])[None]},
        "position_ids jump forward by more than 1",
    ),
    "seq_idx_shape": (
        {"seq_idx": ones(1, T - 1)},
        r"seq_idx has shape \(1, 16\), the input is \(batch 1, seq_len 17\)",
    ),
    "position_ids_shape": ({"position_ids": restart(5)[0]}, r"position_ids has shape \(17,\), the input is \(batch 1"),
    "position_ids_batch": ({"position_ids": restart(5).repeat(3, 1)}, r"position_ids has shape \(3, 17\)"),
}


@pytest.mark.parametrize("name", PACKING)
@pytest.mark.parametrize("labels", [False, True])
def test_packing(model, ids, name, labels):
    arguments, text = PACKING[name]
    with pytest.raises(ValueError, match=text):
        model(ids, labels=ids if labels else None, **arguments)


def test_offsets_of_a_batch(model, ids):
    with pytest.raises(ValueError, match="pass a batch of 1"):
        model(ids.repeat(2, 1), cu_seq_lens_q=offsets(0, 5, T))


WAYS = {
    "seq_idx": {"seq_idx": (torch.arange(T) > 5).long()[None]},
    "cu_seq_lens": {"cu_seq_lens_q": offsets(0, 5, T)},
    "position_ids": {"position_ids": restart(5)},
}


@pytest.mark.parametrize("name", WAYS)
def test_packing_with_a_cache(model, ids, cache, name):
    with pytest.raises(ValueError, match=f"{name} starts a new document inside a call that continues a cache"):
        model(ids, cache=cache, **WAYS[name])
    with pytest.raises(ValueError, match="Packed documents can't be read into a cache"):
        model(ids, cache=BMojoCache(model.config), **WAYS[name])
    assert model(ids, **WAYS[name]).cache is None


# ---------------------------------------------------------------------------- caches


def filled(config):
    cache = DynamicCache()
    for layer_idx in range(config.num_hidden_layers):
        cache.update(torch.zeros(1, 2, 3, 6), torch.zeros(1, 2, 3, 6), layer_idx)
    return cache


FOREIGN = {
    "DynamicCache": lambda config: DynamicCache(),
    "DynamicCache_of_config": lambda config: DynamicCache(config=config),
    "DynamicCache_filled": filled,
    "tuple": lambda config: (),
    "str": lambda config: "static",
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("use_cache", [True, False])
def test_foreign_cache(model, ids, name, use_cache):
    foreign = FOREIGN[name](model.config)
    text = rf"cache is a {type(foreign).__name__}; .* BMojoCache\(model.config\).*use prompt tuning"
    with pytest.raises(ValueError, match=text):
        model(ids, cache=foreign, use_cache=use_cache)


@pytest.mark.parametrize("call", ["lm", "base", "generate"])
def test_two_caches(model, ids, call):
    """Under both names only where it is one."""
    run = {"lm": model, "base": model.model, "generate": partial(model.generate, max_new_tokens=1)}[call]
    one, other = BMojoCache(model.config), BMojoCache(model.config)
    with pytest.raises(ValueError, match="Pass cache or past_key_values, not both"):
        run(ids, cache=one, past_key_values=other)
    run(ids, cache=one, past_key_values=one)
    assert (one.seen_tokens, other.seen_tokens) == (T, 0)


@pytest.mark.parametrize("batch", [2, 3])
def test_cache_of_another_batch(model, ids, cache, batch):
    with pytest.raises(
        ValueError, match=f"holds a batch of 1, the input is a batch of {batch}.*batch_repeat_interleave"
    ):
        model(ids.repeat(batch, 1), cache=cache)
    cache.batch_repeat_interleave(batch)
    model(ids.repeat(batch, 1), cache=cache)
    with pytest.raises(ValueError, match=f"holds a batch of {batch}, the input is a batch of 1.*reset"):
        model(ids, cache=cache)
    cache.reset()
    model(ids, cache=cache)


@pytest.mark.parametrize("seen", [0, T])
@pytest.mark.parametrize(
    ("field", "value"),
    [("sliding_window", 9), ("eidetic_size", 3), ("innovation_predictor", "recent"), ("state_size", 8)],
)
def test_cache_of_another_configuration(model, tiny_model, ids, seen, field, value):
    other = tiny_model(layers_block_type=["bmojo", "full_attention"], **{field: value})
    cache = BMojoCache(other.config)
    if seen:
        other(ids, cache=cache)
    with pytest.raises(ValueError, match=f"another configuration.*{field}"):
        model(ids, cache=cache)


def test_full_static_cache(model, ids):
    cache = BMojoCache(model.config, max_cache_len=T + 1)
    model(ids, cache=cache)
    with pytest.raises(ValueError, match="max_cache_len is 18; 17 columns are in the cache and 2 more do not fit"):
        model(ids[:, :2], cache=cache)
    model(ids[:, :1], cache=cache)


# ---------------------------------------------------------------------------- configuration


def rope(**parameters):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0} | parameters}


MULTIPLIERS = "key embedding lm_head attention_in attention_out ssm_in ssm_out".split()
IMPOSSIBLE = [  # overrides of the tiny configuration, words of the error
    *(
        ({name: value}, rf"{name} is {value}; it must be at least 1")
        for name in (
            "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim sliding_window "
            "max_position_embeddings state_size conv_kernel expand mamba_num_heads mamba_head_dim n_groups "
            "time_step_rank chunk_size eidetic_chunk_size innovation_kernel"
        ).split()
        for value in (0, -3)
    ),
    ({"intermediate_size": 0}, "intermediate_size is 0; use None"),
    ({"eidetic_size": -1}, "eidetic_size is -1; it must be 0 .no eidetic memory. or more"),
    *(
        ({name: value}, rf"{name} is {value}; it must be positive and finite")
        for name in "rms_norm_eps initializer_range time_step_min time_step_max time_step_floor".split()
        for value in (0.0, -0.5, math.inf, math.nan)
    ),
    *(
        ({"innovation_loss_coef": value}, f"innovation_loss_coef is {value}; it must be 0 or more, and finite")
        for value in (-0.1, math.inf, math.nan)
    ),
    ({"time_step_min": 0.2}, "time_step_min 0.2 is above time_step_max 0.1"),
    *(
        (
            {"time_step_limit": value},
            "time_step_limit is .*; it must be None or two numbers, 0 <= lowest < highest",
        )
        for value in (
            [0.1],
            [0.1, 0.2, 0.3],
            (math.inf, math.inf),
            [0.5, 0.1],
            [0.1, 0.1],
            [-0.1, 0.1],
            [math.nan, 1.0],
        )
    ),
    ({"pad_token_id": 97}, "pad_token_id is 97; ids run from 0 to vocab_size - 1"),
    ({"bos_token_id": -1}, "bos_token_id is -1; ids run from 0"),
    ({"layers_block_type": ["bmojo"]}, "layers_block_type names 1 layers, num_hidden_layers is 2"),
    (
        {"layers_block_type": ["bmojo", "rwkv"]},
        "layers_block_type has 'rwkv'; allowed are 'bmojo', 'bmojo_f', 'mamba', 'mamba2'",
    ),
    ({"ssm_type": "s4"}, "ssm_type has 's4'; allowed are 'mamba', 'mamba2'"),
    ({"eidetic_position": "last"}, "eidetic_position has 'last'; allowed are 'constant', 'rank'"),
    ({"innovation_signal": "output"}, "innovation_signal has 'output'; allowed are 'ssm_output', 'layer_input'"),
    *(
        (
            {"innovation_half_life": value},
            f"innovation_half_life is {value}; it must be None .* or a number of tokens above 0",
        )
        for value in (0.0, -5.0, math.inf, math.nan)
    ),
    ({"innovation_predictor": "mean"}, "innovation_predictor has 'mean'; allowed are 'average', .*, 'oldest'"),
    (rope(rope_type="dynamic", factor=2.0), r"rope_parameters\['rope_type'\] has 'dynamic'; allowed are 'default'"),
    *(
        (rope(partial_rotary_factor=value), rf"'partial_rotary_factor'\] is {value}; it must be above 0 and at most 1")
        for value in (0.0, -0.5, 1.5)
    ),
    (rope(partial_rotary_factor=0.5), "need an even number of entries to rotate, not 3"),
    ({"position_embedding_type": "alibi"}, "position_embedding_type has 'alibi'; allowed are 'rope', 'nope'"),
    *(({"softmax_scale": value}, f"softmax_scale is {value}; it must be None, or pos") for value in (0.0, math.inf)),
    *(({f"{part}_multiplier": math.inf}, f"{part}_multiplier is inf; it must be finite") for part in MULTIPLIERS),
    *(
        ({f"{part}_multiplier": 1.5}, f"{part}_multiplier is 1.5, but only 'hybrid' layers have it")
        for part in MULTIPLIERS[3:]
    ),
    ({"mlp_multipliers": [1.0]}, r"mlp_multipliers is \[1.0\]; it must be None or finite factors for gate, output"),
    (
        {"ssm_multipliers": [math.nan] * 5},
        "ssm_multipliers is .*; it must be None or finite factors for z, x, B, C, dt",
    ),
    ({"ssm_multipliers": [1.0] * 5, "ssm_type": "mamba"}, "ssm_multipliers is .*, but no layer has a mamba2 SSM"),
    ({"mlp_multipliers": [1.0, 1.0], "intermediate_size": None}, "mlp_multipliers is .*, but no layer has an MLP"),
    ({"attention_conv_kernel": 4}, "attention_conv_kernel is 4; .* 0 where a layer is 'bmojo'"),
    ({"attention_conv_kernel": -1}, "attention_conv_kernel is -1; it must be 0 .none. or more"),
    *(({"unpadded_vocab_size": value}, f"unpadded_vocab_size is {value}; it must be None, or 1") for value in (0, 98)),
    ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
    ({"head_dim": 5}, "head_dim is 5 and .*: rotary embeddings need an even number"),
    ({"n_groups": 4}, "mamba_num_heads 6 is not a multiple of n_groups 4"),
    ({"mamba_d_mlp": -1}, "mamba_d_mlp is -1; it must be 0 .no MLP inside the mixer. or more"),
    ({"mamba_intermediate_size": 0}, "mamba_intermediate_size is 0; it must be None or at least 1"),
    ({"mamba_num_key_value_heads": 0}, "mamba_num_key_value_heads is 0; it must be None or at least 1"),
    (
        {"mamba_num_key_value_heads": 4, "n_groups": 6},
        "mamba_num_key_value_heads is 4: it must divide mamba_num_heads 6",
    ),
    ({"mamba_num_key_value_heads": 3}, "mamba_num_key_value_heads is 3: .* n_groups 1 must equal that"),
    ({"mamba_hidden_act": "sillu"}, "mamba_hidden_act is 'sillu'; allowed are transformers' .*silu"),
    ({"mixer_norm": "rms"}, "mixer_norm has 'rms'; allowed are None, 'learned', 'weightless'"),
    ({"mixer_rms_eps": 0.0}, "mixer_rms_eps is 0.0; it must be positive and finite"),
    ({"mamba_norm_eps": math.inf}, "mamba_norm_eps is inf; it must be positive and finite"),
    ({"mamba_use_pos_emb": True}, "mamba_use_pos_emb: .* so state_size 4 must be head_dim 6"),
    *(
        ({"mamba_use_pos_emb": True, "state_size": 6} | other, "mamba_use_pos_emb rotates B and C by halves: it needs")
        for other in ({"rope_interleave": True}, {"position_embedding_type": "nope"})
    ),
    (
        {"mamba_use_pos_emb": True, "layers_block_type": ["mamba2"] * 2, "head_dim": 5, "state_size": 5},
        "head_dim is 5; rotary embeddings need an even number",
    ),
    ({"num_iter": -1}, "num_iter is -1; it must be 0 .queries as they are. or more"),
    ({"ridge_strength": 0.0}, "ridge_strength is 0.0; it must be positive and finite"),
    ({"kv_proj_rank": 0}, "kv_proj_rank is 0; it must be None or at least 1"),
    ({"kv_learnable_residual": True}, "kv_learnable_residual=True needs a kv_proj_rank; it is None"),
    (
        {"fading_query": True},
        "fading_query=True .* needs tie_attn_weights=False and fading_span=True; they are True and",
    ),
    (
        {"layers_block_type": ["gated_deltanet"] * 2, "num_key_value_heads": 3},
        "num_attention_heads 4 is not a multiple of num_key_value_heads 3",
    ),
    ({"fading_span": False}, "innovation_predictor 'average' with fading_span=False: .* Set fading_span=True"),
    (
        {"fading_span": False, "innovation_predictor": "recent", "layers_block_type": ["bmojo", "bmojo_f"]},
        "fading_span=False leaves a layer 'bmojo_f', or 'bmojo' with eidetic_size=0, only its window; use 'sliding_attention'",
    ),
    ({"fading_span": False, "innovation_predictor": "learnable"}, "innovation_predictor 'learnable' with fading_span"),
    (
        {"fading_span": False, "eidetic_size": 0},
        "fading_span=False leaves a layer 'bmojo_f', or 'bmojo' with eidetic_size=0, only its window; use 'sliding_attention'",
    ),
]
WRONG_TYPE = [
    *(("sliding_window", value) for value in (5.0, "5", None)),
    *(("use_qk_norm", value) for value in (1, "true")),
    ("layers_block_type", "bmojo"),
    ("layers_block_type", [1, 2]),
    ("intermediate_size", 4.5),
    ("ssm_type", 2),
    ("rms_norm_eps", "small"),
    ("time_step_limit", ["a", "b"]),
]


def named(overrides):
    return "-".join(f"{name}={value}" for name, value in overrides.items())


@pytest.mark.parametrize(("overrides", "text"), IMPOSSIBLE, ids=[named(overrides) for overrides, _ in IMPOSSIBLE])
def test_impossible_value(tiny_config, overrides, text):
    with pytest.raises(StrictDataclassClassValidationError, match=text):
        tiny_config(**overrides)


@pytest.mark.parametrize(("field", "value"), WRONG_TYPE)
def test_value_of_a_wrong_type(tiny_config, field, value):
    with pytest.raises((StrictDataclassFieldValidationError, ValueError), match=field):
        tiny_config(**{field: value})


def test_heads_that_do_not_divide(tiny_config):
    with pytest.raises(
        ValueError, match=r"hidden_size 25 is not a multiple of num_attention_heads 4; .* or set head_dim"
    ):
        tiny_config(hidden_size=25, head_dim=None)
    assert tiny_config(hidden_size=25, head_dim=6).head_dim == 6


@pytest.mark.parametrize(
    "overrides",
    [
        {"fading_span": False, "innovation_predictor": "recent"},
        {"fading_span": False, "innovation_signal": "layer_input"},
        {"fading_span": False, "eidetic_size": 0, "layers_block_type": ["mamba", "mamba2"]},
        {"n_groups": 4, "ssm_type": "mamba"},
        {"intermediate_size": None, "eidetic_size": 0},
        {"innovation_loss_coef": 0.0, "time_step_limit": [0.0, 1.0]},
        {"time_step_limit": [0.0, math.inf], "mamba_rms_norm": False, "mamba_norm_before_gate": True},
        {"mamba_num_key_value_heads": 4, "mamba_use_pos_emb": True, "ssm_type": "mamba"},
        {"layers_block_type": ["mamba", "full_attention"], "position_embedding_type": "nope", "head_dim": 7},
        {"layers_block_type": ["mamba"] * 2, "hidden_size": 10, "num_attention_heads": 2, "head_dim": None},
        {"layers_block_type": ["mamba", "mamba2"], "hidden_size": 14, "num_attention_heads": 2, "head_dim": None},
        {"layers_block_type": ["gated_deltanet", "gated_kalmanet"], "kv_proj_rank": 2, "num_iter": 0},
    ],
    ids=named,
)
def test_checks_refuse_no_more_than_they_must(tiny_config, overrides):
    model = BMojoForCausalLM(tiny_config(**overrides))
    assert model(torch.arange(20)[None]).logits.isfinite().all()


CONFIGS = {
    "tiny": {},
    "lists": {
        "layers_block_type": ["mamba", "bmojo", "full_attention", "sliding_attention", "mamba2"],
        "num_hidden_layers": 5,
        "eos_token_id": [2, 5],
        "time_step_limit": (0.01, 0.3),
    },
    "derived": {"head_dim": None, "num_key_value_heads": None, "ssm_type": "mamba", "state_size": None},
    "none": {"intermediate_size": None, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None},
    "rope": rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, rope_theta=1e-3 + 1e6),
    "infinite": {
        "time_step_limit": (0.01, math.inf),
        "D_has_hdim": True,
        "mixer_norm": "weightless",
        "mamba_norm_eps": 1e-5,
    },
    "floats": {"rms_norm_eps": 1e-7 / 3, "initializer_range": 0.1 + 0.2, "innovation_loss_coef": 0.0},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration_round_trip(tiny_config, tmp_path, name):
    config = tiny_config(**CONFIGS[name])
    for field, value in CONFIGS[name].items():
        if value is not None and field not in ("rope_parameters", "time_step_limit"):
            assert getattr(config, field) == value
    wanted = config.to_dict()
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["layers_block_type"] == list(config.layers_block_type)
    assert "layer_types" not in saved  # transformers would rewrite it
    copies = {
        "from_dict": BMojoConfig.from_dict(config.to_dict()),
        "json": BMojoConfig.from_dict(json.loads(config.to_json_string(use_diff=False))),
        "folder": BMojoConfig.from_pretrained(tmp_path),
        "file": BMojoConfig.from_json_file(tmp_path / "config.json"),
    }
    for way, copy in copies.items():
        assert {**copy.to_dict(), "architectures": None} == {**wanted, "architectures": None}, way
        assert copy.layers_block_type == config.layers_block_type, way
    copies["folder"].save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == saved


def test_configurations_share_nothing(tiny_config):
    first, second = tiny_config(), tiny_config()
    first.layers_block_type[0] = "mamba"
    first.rope_parameters["rope_theta"] = 1.0
    assert second.layers_block_type == ["bmojo", "bmojo"]
    assert second.rope_parameters["rope_theta"] == 10000.0


def test_saved_weights_load_with_another_class_of_configuration(tiny_config, tmp_path):
    """Each folder of remote code brings its own class; what counts is what it holds."""

    class Elsewhere(BMojoConfig):
        pass

    config = Elsewhere(**tiny_config(layers_block_type=["mamba", "bmojo"]).to_dict())
    model = BMojoForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "bmojo"
    loaded = BMojoForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded.config) is BMojoConfig
    ids = torch.arange(3, 23)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ({"innovation_half_life": -5.0}, "innovation_half_life is -5.0; it must be None"),
        ({"innovation_signal": "foo"}, "innovation_signal has 'foo'; allowed are 'ssm_output', 'layer_input'"),
        ({"eidetic_size": 0, "fading_span": False}, "fading_span=False leaves a layer"),
        ({"sliding_window": 0}, "sliding_window is 0; it must be at least 1"),
        ({"num_hidden_layers": 1}, "layers_block_type names 2 layers, num_hidden_layers is 1; they must agree"),
    ],
    ids=str,
)
def test_impossible_overrides_at_load(tiny_model, tmp_path, override, text):
    """They are set when the config has been checked; so does who writes to a config before building a model."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassClassValidationError, match=text):
        type(model).from_pretrained(tmp_path, **override)
    with pytest.raises(StrictDataclassClassValidationError, match=text):
        type(model.config).from_pretrained(tmp_path, **override)
    for name, value in override.items():
        setattr(model.config, name, value)
    with pytest.raises(StrictDataclassClassValidationError, match=text):
        type(model)(model.config)


def test_an_additive_mask_is_refused_in_a_compiled_call_too(tiny_model, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    mask = torch.zeros(1, 12)
    mask[0, :3] = -torch.inf
    with pytest.raises(ValueError, match="Additive masks are not supported"):
        tiny_model()(torch.ones(1, 12, dtype=torch.long), attention_mask=mask, use_cache=False)
