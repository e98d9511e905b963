"""Jamba and Falcon-Mamba: recorded and random models of transformers give the same logits as ours, and come back bit by bit."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from bmojo.cache_bmojo import BMojoCache
from bmojo.configuration_bmojo import BMojoConfig
from bmojo.convert.core import Refusal, assemble
from bmojo.convert.engine import convert
from bmojo.convert.falcon_mamba import FalconMamba
from bmojo.convert.jamba import Jamba
from bmojo.convert.mamba import Mamba
from bmojo.modeling_bmojo import BMojoForCausalLM


FEW_EXAMPLES = settings(
    max_examples=10, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
TINY_JAMBA = {
    "vocab_size": 41, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 3,
    "pad_token_id": None,
}  # fmt: skip
TINY_MAMBA = {
    "vocab_size": 41, "hidden_size": 20, "num_hidden_layers": 2, "state_size": 4, "pad_token_id": None,
}  # fmt: skip


def rel_error(got, want):
    assert got.shape == want.shape
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-12)).item()


def randomised(model):
    """Random parameters, so that nothing hides behind a 0 or a 1 of the initialisation."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5
        offset = 1.0 if parameter.dim() == 1 else 0.0
        parameter.data = offset + scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model.eval()


def config_json(model) -> dict:
    """What `save_pretrained` would write."""
    return json.loads(model.config.to_json_string())


def in_memory(form, config: dict, weights: dict[str, torch.Tensor]) -> BMojoForCausalLM:
    """Our model with the weights of theirs, all of which are used, once."""
    config_of_ours = BMojoConfig(**form.to_bmojo(config))
    mapping = form.tensors(config)
    used = [piece.name for pieces in mapping.values() for piece in pieces]
    assert len(used) == len(set(used))
    assert set(used) == set(form.shapes(config)) == weights.keys() - form.duplicates(config).keys()
    assert all(tuple(weights[name].shape) == shape for name, shape in form.shapes(config).items())
    model = BMojoForCausalLM(config_of_ours).to(next(iter(weights.values())).dtype).eval()
    own = {name: assemble(pieces, lambda piece: weights[piece.name]) for name, pieces in mapping.items()}
    missing, unexpected = model.load_state_dict(own, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config["tie_word_embeddings"] else set())
    return model


def check_equal(theirs, form, in_float64):
    """Logits, those of cached calls, and gradients, all in float64; and our configuration as theirs again."""
    theirs = randomised(theirs).double()
    ours = in_memory(form, config_json(theirs), theirs.state_dict())
    ids = torch.randint(3, 41, (2, 17), generator=torch.Generator().manual_seed(1))
    with in_float64():
        want = theirs(ids, use_cache=False).logits
        want.square().mean().backward()
    got = ours(ids, use_cache=False).logits
    got.square().mean().backward()
    assert rel_error(got, want) < 1e-10
    cache = BMojoCache(ours.config)
    with torch.no_grad():
        parts = [ours(part, cache=cache).logits for part in ids.split([9, 1, 1, 6], 1)]
    assert rel_error(torch.cat(parts, 1), want) < 1e-10
    grads = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, pieces in form.tensors(config_json(theirs)).items():
        wanted = assemble(pieces, lambda piece: grads[piece.name])
        assert rel_error(ours.get_parameter(name).grad, wanted) < 1e-8, name
    again = form.from_bmojo(ours.config)
    assert form.to_bmojo(again) == form.to_bmojo(config_json(theirs))
    assert form.shapes(again) == form.shapes(config_json(theirs))


# ---------------------------------------------------------------------------- recordings


def test_recorded_jamba(shared, tmp_path):
    """Logits, hidden states, loss, cached and greedy decoding of the converted folder; and the same folder back."""
    source = shared / "golden" / "transformers" / "jamba"
    recorded = load_file(source / "io.safetensors")
    convert(source, tmp_path / "ours", progress=False, say=lambda line: None)
    for dtype, tolerance, want in ((torch.float64, 1e-10, "logits_f64"), (torch.float32, 1e-5, "logits")):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=dtype, trust_remote_code=True).eval()
        ids, want = recorded["input_ids"], recorded[want]
        with torch.no_grad():
            out = model(ids, labels=ids, use_cache=False, output_hidden_states=True)
            assert rel_error(out.logits, want) < tolerance
            cache = type(model(ids[:, :1]).cache)(model.config)
            parts = [model(part, cache=cache).logits for part in ids.split([7, *[1] * 12, ids.shape[1] - 19], 1)]
            assert rel_error(torch.cat(parts, 1), want) < tolerance
        assert rel_error(out.loss, recorded["loss"]) < 1e-5
        for i, states in enumerate(out.hidden_states):
            assert rel_error(states, recorded[f"hf_hidden_states.{i}"]) < 1e-5
        greedy = model.generate(recorded["greedy_10_plus_8"][:, :10], max_new_tokens=8, do_sample=False)
        assert torch.equal(greedy, recorded["greedy_10_plus_8"])
    convert(tmp_path / "ours", tmp_path / "theirs", export="jamba", progress=False, say=lambda line: None)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "theirs"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    twin = JambaForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32).eval()
    with torch.no_grad():
        assert rel_error(twin(recorded["input_ids"]).logits, recorded["logits"]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["32", "16"])
def test_falcon_mamba_there_and_back(tmp_path, dtype):
    """Through files: logits are transformers', and every bit comes back."""
    theirs = randomised(FalconMambaForCausalLM(FalconMambaConfig(**TINY_MAMBA, intermediate_size=28))).to(dtype)
    theirs.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "ours", verify=True, progress=False, say=(said := []).append)
    assert any("Verified" in line for line in said)
    convert(tmp_path / "ours", tmp_path / "theirs", export="falcon_mamba", progress=False, say=lambda line: None)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "theirs"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == dtype for name in before)
    twin = FalconMambaForCausalLM.from_pretrained(tmp_path / "theirs", dtype=dtype).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(twin(ids).logits, theirs(ids).logits)


# ---------------------------------------------------------------------------- random models


@given(
    st.fixed_dictionaries(
        {
            "attn_layer_period": st.sampled_from([1, 2, 3, 7]),
            "attn_layer_offset": st.integers(0, 5),
            "num_key_value_heads": st.sampled_from([1, 2, 4]),
            "mamba_d_state": st.sampled_from(
                [2, 5]
            ),  # of 1, the norm leaves but a sign: gradients in float32 are noise
            "mamba_d_conv": st.sampled_from([2, 4]),
            "mamba_expand": st.sampled_from([1, 2]),
            "mamba_dt_rank": st.sampled_from(["auto", 5]),
            "mamba_conv_bias": st.booleans(),
            "mamba_proj_bias": st.booleans(),
            "hidden_act": st.sampled_from(["silu", "gelu"]),
            "rms_norm_eps": st.sampled_from([1e-6, 1e-2]),
            "tie_word_embeddings": st.booleans(),
            "head_dim": st.sampled_from([None, 5, 8]),
            "num_experts": st.sampled_from([1, 3]),
        }
    )
)
@FEW_EXAMPLES
def test_random_jamba(in_float64, options):
    options["attn_layer_offset"] %= options["attn_layer_period"]
    if options["head_dim"] is None:
        del options["head_dim"]
    if options["num_experts"] > 1:  # in none of the layers
        options |= {"expert_layer_period": 9, "expert_layer_offset": 4}
    check_equal(JambaForCausalLM(JambaConfig(**(TINY_JAMBA | options))), Jamba(), in_float64)


MAMBA_OPTIONS = {
    "conv_kernel": st.sampled_from([1, 2, 4]),
    "expand": st.sampled_from([1, 2]),
    "intermediate_size": st.sampled_from([None, 20, 33]),
    "time_step_rank": st.sampled_from(["auto", 5]),
    "use_bias": st.booleans(),
    "use_conv_bias": st.booleans(),
    "hidden_act": st.sampled_from(["silu", "gelu", "relu"]),
    "layer_norm_epsilon": st.sampled_from([1e-5, 1e-2]),
    "tie_word_embeddings": st.booleans(),
    "residual_in_fp32": st.booleans(),
}


def test_fields_of_the_native_origin_are_no_obstacle():
    """Published files of transformers' Mamba keep some, which its class does not read."""
    config = json.loads(MambaConfig(**TINY_MAMBA).to_json_string())
    left = {"d_model": 20, "ssm_cfg": {}, "rms_norm": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8}
    assert Mamba().to_bmojo(config | left) == Mamba().to_bmojo(config)
    with pytest.raises(Refusal, match="has moe_cfg = "):
        Mamba().to_bmojo(config | {"moe_cfg": {"experts": 2}})


def of_any_width(options):
    return {name: value for name, value in options.items() if (name, value) != ("intermediate_size", None)}


@given(st.fixed_dictionaries(MAMBA_OPTIONS | {"mixer_rms_eps": st.sampled_from([1e-6, 1e-2])}))
@FEW_EXAMPLES
def test_random_falcon_mamba(in_float64, options):
    check_equal(
        FalconMambaForCausalLM(FalconMambaConfig(**TINY_MAMBA | of_any_width(options))), FalconMamba(), in_float64
    )


@given(st.fixed_dictionaries(MAMBA_OPTIONS))
@FEW_EXAMPLES
def test_random_mamba(in_float64, options):
    check_equal(MambaForCausalLM(MambaConfig(**TINY_MAMBA | of_any_width(options))), Mamba(), in_float64)


# ---------------------------------------------------------------------------- which layers are attention


@given(st.integers(1, 12), st.integers(1, 9), st.data())
@settings(FEW_EXAMPLES, max_examples=100)
def test_a_period_is_found_again(layers, period, data):
    offset = data.draw(st.integers(0, period - 1))
    kinds = ["full_attention" if i % period == offset else "mamba" for i in range(layers)]
    theirs = JambaConfig(num_hidden_layers=layers, **Jamba().period(kinds))
    assert [{"attention": "full_attention"}.get(kind, kind) for kind in theirs.layers_block_type] == kinds


@pytest.mark.parametrize("found", [[0, 1, 3], [0, 3, 4], [2, 3], [0, 2], [4, 5]])
def test_other_orders_are_refused(found):
    kinds = ["full_attention" if i in found else "mamba" for i in range(6)]
    with pytest.raises(Refusal, match=rf"layers_block_type has full_attention in layers \[{found[0]}.*fixed period"):
        Jamba().period(kinds)


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_experts": 16}, "num_experts is 16: the MLP of layer 1 is a mixture of experts"),
        ({"num_experts": 2, "expert_layer_period": 3, "expert_layer_offset": 2}, "the MLP of layer 2 is a mixture"),
        ({"mamba_inner_layernorms": False}, "mamba_inner_layernorms is false"),
        ({"sliding_window": 7}, "config.json has sliding_window = 7, which this converter does not know"),
        ({"attn_layer_offset": 5}, "config.json is no JambaConfig: .*must be smaller"),
        ({"mamba_expand": "2"}, "config.json is no JambaConfig: .*mamba_expand"),
    ],
)
def test_jamba_refuses(overrides, message):
    config = json.loads(JambaConfig(**TINY_JAMBA).to_json_string()) | overrides
    for method in ("to_bmojo", "tensors", "shapes"):
        with pytest.raises(Refusal, match=message):
            getattr(Jamba(), method)(config)


@pytest.mark.parametrize(
    ("form", "overrides", "message"),
    [
        ("jamba", {"position_embedding_type": "rope"}, "position_embedding_type is 'rope', jamba means 'nope'"),
        ("jamba", {"mixer_norm": "weightless"}, "mixer_norm is 'weightless', jamba means 'learned'"),
        ("jamba", {"mixer_rms_eps": 1e-3}, "mixer_rms_eps is 0.001, jamba means 1e-06"),
        ("jamba", {"mamba_hidden_act": "relu"}, "mamba_hidden_act is 'relu', jamba means 'silu'"),
        ("jamba", {"use_qk_norm": True}, "use_qk_norm is True, jamba means False"),
        ("jamba", {"layers_block_type": ["mamba", "mamba2"]}, "'mamba2' for layer 1; jamba has 'mamba' and"),
        ("jamba", {"intermediate_size": None}, "intermediate_size is None: every layer of jamba has an MLP"),
        ("jamba", {"mamba_intermediate_size": 7}, "mamba_intermediate_size is 7, jamba means None"),
        ("falcon_mamba", {"mixer_norm": "learned"}, "mixer_norm is 'learned', falcon_mamba means 'weightless'"),
        ("falcon_mamba", {"mixer_norm": None}, "mixer_norm is None, falcon_mamba means 'weightless'"),
        ("falcon_mamba", {"intermediate_size": 8}, "intermediate_size is 8: layers of falcon_mamba have no MLP"),
        ("falcon_mamba", {"time_step_limit": [0.0, 0.1]}, "time_step_limit is .*, falcon_mamba means None"),
        ("mamba", {"mixer_norm": "weightless"}, "mixer_norm is 'weightless', mamba means None"),
    ],
)
def test_what_is_no_special_case_is_not_exported(tiny_model, tmp_path, form, overrides, message):
    common = {"eidetic_size": 0, "mixer_rms_eps": 1e-6}
    bases = {
        "jamba": {
            "layers_block_type": ["mamba", "full_attention"],
            "position_embedding_type": "nope",
            "mixer_norm": "learned",
        },
        "falcon_mamba": {"layers_block_type": ["mamba"] * 2, "intermediate_size": None, "mixer_norm": "weightless"},
        "mamba": {"layers_block_type": ["mamba"] * 2, "intermediate_size": None},
    }
    tiny_model(**(common | bases[form])).save_pretrained(tmp_path / "may")
    convert(tmp_path / "may", tmp_path / "can", export=form, progress=False, say=lambda line: None)
    tiny_model(**(common | bases[form] | overrides)).save_pretrained(tmp_path / "ours")
    with pytest.raises(Refusal, match=message):
        convert(tmp_path / "ours", tmp_path / "theirs", export=form, progress=False, say=lambda line: None)
    assert not (tmp_path / "theirs").exists()
