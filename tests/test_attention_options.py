"""Options of attention, block and model: against transformers' models that have them, and in half precision.

The invariants over these options (streaming, padding, packing, causality, the reference in float64) are in test_model and
test_cache, among those of all others.
"""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Ernie4_5Config, GlmConfig, GraniteConfig, SmolLM3Config, StableLmConfig

from bmojo.cache_bmojo import BMojoCache, cache_bytes
from bmojo.configuration_bmojo import BMojoConfig
from bmojo.modeling_bmojo import BMojoForCausalLM


FLAG = st.booleans()
EVERY_LAYER = ["bmojo", "mamba2", "sliding_attention", "mamba", "full_attention", "hybrid"]


def rel_error(got, want) -> float:
    assert got.shape == want.shape
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def tokens(*shape, seed=1):
    return torch.randint(3, 41, shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------- models of transformers that have them


@st.composite
def families(draw):
    """A configuration of transformers, and what it says in our words."""
    heads, head_dim = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([8, 16]))
    kv_heads = heads // draw(st.sampled_from([g for g in (1, 2, 4) if heads % g == 0]))
    factor = draw(st.sampled_from([0.25, 0.5, 1.0]))
    whole = {"rope_type": "default", "rope_theta": 100.0}
    partial = whole | {"partial_rotary_factor": factor}
    same = {
        "vocab_size": 41,
        "hidden_size": heads * head_dim,
        "intermediate_size": draw(st.integers(5, 30)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": draw(FLAG),
        "hidden_act": "silu",
        "rope_parameters": whole,
        "pad_token_id": None,
    }
    ours = same | {"head_dim": head_dim, "layers_block_type": ["full_attention"] * same["num_hidden_layers"]}
    bias, mlp_bias, eps = draw(FLAG), draw(FLAG), draw(st.sampled_from([1e-6, 1e-2]))
    kind = draw(st.sampled_from(["stablelm", "glm", "ernie", "granite", "smollm3"]))
    if kind == "stablelm":  # LayerNorm, partial rotation, no bias after attention
        theirs = StableLmConfig(**same | {"rope_parameters": dict(partial)}, layer_norm_eps=eps, use_qkv_bias=bias)
        own = {"rms_norm": False, "rope_parameters": partial, "attention_bias": bias, "attention_out_bias": False}
    elif kind == "glm":  # neighbours are rotated, and only some
        wide = {"head_dim": 16, "rope_parameters": dict(partial)}
        theirs = GlmConfig(**same | wide, rms_norm_eps=eps, attention_bias=bias)
        own = wide | {"rope_interleave": True, "attention_bias": bias, "attention_out_bias": False}
    elif kind == "ernie":
        theirs = Ernie4_5Config(**same, rms_norm_eps=eps, use_bias=bias, head_dim=10)
        own = {"rope_interleave": True, "attention_bias": bias, "mlp_bias": bias, "head_dim": 10}
    elif kind == "granite":
        factors = {"embedding_multiplier": 3.0, "attention_multiplier": 0.3, "logits_scaling": 4.0}
        theirs = GraniteConfig(**same, **factors, rms_norm_eps=eps, attention_bias=bias, mlp_bias=mlp_bias)
        own = {"embedding_multiplier": 3.0, "softmax_scale": 0.3, "lm_head_multiplier": 0.25}
        own |= {"attention_bias": bias, "mlp_bias": mlp_bias}
    else:
        nowhere = [0] * same["num_hidden_layers"]
        theirs = SmolLM3Config(
            **same, rms_norm_eps=eps, no_rope_layers=nowhere, attention_bias=bias, mlp_bias=mlp_bias
        )
        own = {"position_embedding_type": "nope", "attention_bias": bias, "mlp_bias": mlp_bias}
    return theirs, BMojoConfig(**ours | {"rms_norm_eps": eps} | own)


def with_our_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in weights.items():
        name = name.replace(".self_attn.", ".mixer.")
        if "gate_up_proj" in name:
            for part, rows in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True):
                found[name.replace("gate_up_proj", part)] = rows
        else:
            found[name] = tensor
    return found


@settings(max_examples=40, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(families(), st.integers(0, 99))
def test_options_are_those_of_transformers_models(drawn, seed):
    config, ours = drawn
    torch.manual_seed(seed)
    theirs = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            around = 1 if "norm" in name and name.endswith("weight") else 0
            parameter.copy_(around + 0.3 * torch.randn_like(parameter))
    model = BMojoForCausalLM(ours).double().eval()
    model.load_state_dict(with_our_names(theirs.state_dict()))
    ids = tokens(2, 19, seed=seed)
    with torch.no_grad():
        want = theirs(ids, use_cache=False).logits
        cache = BMojoCache(ours)
        pieces = [model(piece, cache=cache).logits for piece in ids.split([7, 1, 1, 10], 1)]
        for got in (model(ids, use_cache=False).logits, torch.cat(pieces, 1)):
            assert rel_error(got, want) <= 5e-6  # their rotary tables and norms are float32


# ---------------------------------------------------------------------------- rotation


def test_partial_rotation_under_yarn_keeps_the_rest_of_a_head(tiny_model):
    """A bmojo layer within its window is a full_attention layer: with scaled tables, which scale only what is rotated."""
    yarn = {
        "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16,
        "partial_rotary_factor": 0.6,
    }  # fmt: skip
    fields = {"rope_parameters": yarn, "head_dim": 10, "dtype": torch.float64, "initializer_range": 0.3}
    window = tiny_model(layers_block_type=["bmojo"] * 2, sliding_window=30, **fields)
    full = tiny_model(layers_block_type=["full_attention"] * 2, **fields)
    full.load_state_dict(window.state_dict(), strict=False)
    ids = tokens(1, 30)
    with torch.no_grad():
        assert rel_error(window(ids).logits, full(ids).logits) < 1e-9


@pytest.mark.parametrize("position", ["constant", "rank"])
@torch.no_grad()
def test_partial_rotation_under_yarn_streams(tiny_model, position):
    """The keys of the eidetic memory are turned back and forth: token by token the logits are those of one call."""
    yarn = {
        "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16,
        "partial_rotary_factor": 0.6,
    }  # fmt: skip
    model = tiny_model(
        rope_parameters=yarn, head_dim=10, dtype=torch.float64, initializer_range=0.3, eidetic_position=position
    )
    ids = tokens(2, 33)
    want = model(ids, use_cache=False).logits
    for sizes in ([1] * 33, [5, 1, 1, 9, 1, 16]):
        cache = BMojoCache(model.config)
        got = [model(piece, cache=cache).logits for piece in ids.split(sizes, 1)]
        assert rel_error(torch.cat(got, 1), want) < 1e-9


@pytest.mark.parametrize(("kind", "differs"), [("nope", False), ("rope", True)])
@torch.no_grad()
def test_without_rotation_order_is_not_seen(tiny_model, kind, differs):
    """What the first layer finds does not depend on where in the past a token stands; the second sees it, through causality."""
    model = tiny_model(position_embedding_type=kind, layers_block_type=["full_attention"] * 2, initializer_range=0.3)
    rows = torch.full((2, 12), 7)
    rows[0, 2], rows[1, 9] = 23, 23
    first, second = model(rows, output_hidden_states=True).hidden_states[1][:, -1]
    assert (rel_error(first, second) > 1e-3) == differs


def test_an_odd_head_needs_no_even_number_without_rotation(tiny_config):
    fields = {"head_dim": 5, "layers_block_type": ["full_attention", "bmojo"]}
    model = BMojoForCausalLM(tiny_config(position_embedding_type="nope", **fields)).eval()
    cache = BMojoCache(model.config)
    ids = tokens(1, 12)
    with torch.no_grad():
        got = torch.cat([model(piece, cache=cache).logits for piece in ids.split([9, 1, 1, 1], 1)], 1)
        assert rel_error(got, model(ids, use_cache=False).logits) < 1e-4
    with pytest.raises(Exception, match="even"):
        tiny_config(**fields)


# ---------------------------------------------------------------------------- residual stream in float32


def half(model, dtype=torch.bfloat16):
    return model.to(dtype).eval()


@pytest.mark.parametrize("rms_norm", [True, False])
@torch.no_grad()
def test_the_residual_stream_is_added_up_in_float32(tiny_model, rms_norm):
    """Every norm reads the float32 sum of what came before, and hands on the dtype of the weights, rounded once."""
    model = half(
        tiny_model(
            layers_block_type=EVERY_LAYER, num_hidden_layers=6, residual_in_fp32=True, rms_norm=rms_norm,
            initializer_range=0.3,
        )
    )  # fmt: skip
    config, sums = model.config, []

    def check_norm(module, inputs, output):
        assert torch.equal(inputs[0], sums[-1])
        assert inputs[0].dtype is torch.float32
        wide = inputs[0].double()
        if rms_norm:
            want = wide / (wide.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * module.weight.double()
        else:
            want = F.layer_norm(
                wide, wide.shape[-1:], module.weight.double(), module.bias.double(), config.rms_norm_eps
            )
        assert rel_error(output, want) < 1e-6  # not rounded yet

    def check_part(module, inputs, output):
        assert inputs[0].dtype is torch.bfloat16
        mixed = output if isinstance(output, torch.Tensor) else output[0]
        assert mixed.dtype is torch.bfloat16
        sums.append(sums[-1] + mixed.float())

    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.register_forward_hook(check_norm)
        for part in (layer.mixer, layer.mlp):
            part.register_forward_hook(check_part)
    model.model.norm.register_forward_hook(check_norm)
    ids = tokens(2, 11)
    sums.append(model.model.embed_tokens(ids).float())
    out = model(ids, use_cache=False, output_hidden_states=True)
    assert len(sums) == 13
    assert all(states.dtype is torch.float32 for states in out.hidden_states[:-1])
    assert out.hidden_states[-1].dtype is out.logits.dtype is torch.bfloat16


@torch.no_grad()
def test_a_float32_stream_loses_no_small_increments(tiny_model):
    """Embeddings thousands of times as large as what the layers add: bfloat16 drops most of it."""
    fields = {"layers_block_type": ["mamba2"] * 12, "num_hidden_layers": 12, "intermediate_size": None}
    fields["embedding_multiplier"] = 1e4
    ids, added = tokens(2, 24), {}
    for wide in (None, False, True):
        model = half(tiny_model(**fields, residual_in_fp32=bool(wide)))
        states = (model.float() if wide is None else model)(ids, output_hidden_states=True).hidden_states
        added[wide] = states[11].float() - states[0].float()
    assert rel_error(added[True], added[None]) < 0.03
    assert rel_error(added[False], added[None]) > 0.3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@torch.no_grad()
def test_a_float32_stream_leaves_caches_as_they_are(tiny_model, dtype):
    """Sizes, dtypes and rollback; and where weights are float32 or wider, every bit of the logits."""
    fields = {"layers_block_type": EVERY_LAYER, "num_hidden_layers": 6}
    model, plain = (tiny_model(dtype=dtype, residual_in_fp32=wide, **fields) for wide in (True, False))
    ids = tokens(2, 21)
    caches = [BMojoCache(model.config), BMojoCache(plain.config)]
    logits = [
        [m(x, cache=c).logits for x in ids.split([13, 1, 1, 6], 1)]
        for m, c in zip((model, plain), caches, strict=True)
    ]
    ours, theirs = (cache.tensors() for cache in caches)
    assert {name: (t.shape, t.dtype) for name, t in ours.items()} == {
        name: (t.shape, t.dtype) for name, t in theirs.items()
    }
    assert caches[0].num_bytes() == cache_bytes(model.config, 2, dtype, 21)
    if dtype.itemsize >= 4:
        assert all(torch.equal(*pair) for pair in zip(*logits, strict=True))
    cache = BMojoCache(model.config)
    cache.activate_past_recording()
    model(ids[:, :9], cache=cache)
    model(ids[:, 9:16], cache=cache)
    cache.crop(-4)
    again = model(ids[:, 12:], cache=cache).logits
    tolerance = {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    assert rel_error(again, model(ids, use_cache=False).logits[:, 12:]) < tolerance


@pytest.mark.parametrize(
    "fields",
    [
        {
            "layers_block_type": ["hybrid", "hybrid"],
            "key_multiplier": 0.5,
            "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7],
        },
        {"layers_block_type": ["full_attention", "sliding_attention"], "attention_conv_kernel": 4},
        {"position_embedding_type": "nope", "rms_norm": False, "residual_in_fp32": True},
        {"rope_interleave": True, "softmax_scale": 0.3, "embedding_multiplier": 2.0, "lm_head_multiplier": 0.5},
    ],
    ids=["hybrid", "convolution", "nope-layernorm", "interleaved"],
)
@torch.no_grad()
def test_bfloat16_is_near_float32(tiny_model, fields):
    model = half(tiny_model(**fields))
    exact = tiny_model(**fields)
    exact.load_state_dict(model.float().state_dict())
    model = half(model)
    ids = tokens(2, 20)
    want, cache = exact(ids, use_cache=False).logits, BMojoCache(model.config)
    pieces = [model(piece, cache=cache).logits for piece in ids.split([9, 1, 1, 9], 1)]
    for got in (model(ids, use_cache=False).logits, torch.cat(pieces, 1)):
        assert got.dtype is torch.bfloat16
        assert rel_error(got, want) < 0.05


# ---------------------------------------------------------------------------- configurations and files


def test_fields_come_back_from_a_file(tiny_config, tmp_path):
    config = tiny_config(
        layers_block_type=["hybrid", "hybrid"], mlp_multipliers=(0.8, 1.2), ssm_multipliers=[1.0, 2.0, 3.0, 4.0, 5.0],
        attention_out_bias=True, attention_conv_kernel=3, rope_interleave=True, unpadded_vocab_size=90,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    again = BMojoConfig.from_pretrained(tmp_path)
    assert again.to_dict() == BMojoConfig(**config.to_dict()).to_dict()
    assert (again.mlp_multipliers, again.ssm_multipliers) == ([0.8, 1.2], [1.0, 2.0, 3.0, 4.0, 5.0])
    assert (again.attention_out_bias, again.attention_bias, again.projectors_bias) == (True, False, False)


def test_a_cache_file_from_before_the_options_still_loads(tiny_model, tmp_path):
    model, ids = tiny_model(), tokens(1, 12)
    cache = BMojoCache(model.config)
    with torch.no_grad():
        model(ids, cache=cache)
    cache.save(tmp_path / "cache.safetensors")
    with safe_open(tmp_path / "cache.safetensors", "pt") as file:
        metadata = file.metadata()
    described = json.loads(metadata["config"])
    for name in ("position_embedding_type", "rope_interleave", "key_multiplier", "attention_conv_kernel"):
        del described[name]
    old = tmp_path / "old.safetensors"
    save_file(load_file(tmp_path / "cache.safetensors"), old, metadata | {"config": json.dumps(described)})
    assert BMojoCache.load(old, model.config).seen_tokens == 12
    for field, value in (("position_embedding_type", "nope"), ("key_multiplier", 0.5), ("rope_interleave", True)):
        with pytest.raises(ValueError, match=field):
            BMojoCache.load(old, tiny_model(**{field: value}).config)


def test_factors_of_one_and_none_are_the_same(tiny_model):
    ids = tokens(1, 9)
    with torch.no_grad():
        want = tiny_model()(ids).logits
        assert torch.equal(tiny_model(mlp_multipliers=[1.0, 1.0], ssm_multipliers=[1.0] * 5)(ids).logits, want)
        assert not torch.equal(tiny_model(mlp_multipliers=[1.0, 2.0])(ids).logits, want)
        assert math.isfinite(want.sum())


def test_inputs_embeds_are_taken_as_they_are(tiny_model):
    """The factor is on the embeddings of ids: as in Falcon-H1 and Granite, who passes embeddings has it in them."""
    model, ids = tiny_model(embedding_multiplier=2.5, residual_in_fp32=True), tokens(2, 9)
    with torch.no_grad():
        embeds = 2.5 * model.model.embed_tokens(ids)
        assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
