"""Random tiny models of transformers, all options drawn: converted they give the same logits, exported the same checkpoint."""

import contextlib
import json
import math
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from bmojo.cache_bmojo import BMojoCache
from bmojo.convert import Refusal, convert
from bmojo.convert.formats import recognise
from bmojo.convert.ours import make_config
from bmojo.modeling_bmojo import BMojoForCausalLM


FLAG = st.booleans()
ROPES = st.one_of(
    st.fixed_dictionaries({"rope_type": st.just("default"), "rope_theta": st.sampled_from([100.0, 1e6])}),
    st.fixed_dictionaries(
        {"rope_type": st.just("linear"), "rope_theta": st.just(1e4), "factor": st.sampled_from([2.0, 3.5])}
    ),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("llama3"),
            "rope_theta": st.just(100.0),
            "factor": st.just(4.0),
            "low_freq_factor": st.just(1.0),
            "high_freq_factor": st.sampled_from([2.0, 4.0]),
            "original_max_position_embeddings": st.sampled_from([16, 64]),
        }
    ),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("yarn"),
            "rope_theta": st.just(100.0),
            "factor": st.sampled_from([2.0, 8.0]),
            "original_max_position_embeddings": st.sampled_from([16, 64]),
        },
        optional={
            "beta_fast": st.just(16.0),
            "beta_slow": st.just(2.0),
            "attention_factor": st.sampled_from([0.7, 1.3]),
            "truncate": FLAG,
        },
    ),
)


@st.composite
def transformers_fields(draw, kind: str):
    """Fields of a tiny Llama, Mistral or Qwen3."""
    heads = draw(st.sampled_from([1, 2, 4]))
    layers = draw(st.integers(1, 3))
    fields = {
        "hidden_size": heads * draw(st.sampled_from([6, 8])),
        "intermediate_size": draw(st.integers(5, 30)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // draw(st.sampled_from([g for g in (1, 2, 4) if heads % g == 0])),
        "head_dim": draw(st.sampled_from([4, 6, 10])),
        "hidden_act": draw(st.sampled_from(["silu", "gelu", "gelu_pytorch_tanh", "relu"])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        "rope_parameters": draw(ROPES),
        "max_position_embeddings": 64,
    }
    if kind == "llama":
        fields |= {
            "attention_bias": draw(FLAG),
            "mlp_bias": draw(FLAG),
            "pretraining_tp": draw(st.sampled_from([1, 2])),
        }
        if draw(FLAG):
            del fields["head_dim"]
    if kind == "mistral":
        fields["sliding_window"] = draw(st.sampled_from([None, 1, 7, 40]))
    if kind == "qwen3":
        fields |= {
            "attention_bias": draw(FLAG),
            "use_sliding_window": draw(FLAG),
            "sliding_window": draw(st.integers(1, 9)),
        }
        if fields["use_sliding_window"] and draw(FLAG):
            choice = st.sampled_from(["full_attention", "sliding_attention"])
            fields["layer_types"] = draw(st.lists(choice, min_size=layers, max_size=layers))
        fields["max_window_layers"] = draw(st.integers(0, layers))
    return fields


@st.composite
def mamba_fields(draw, kind: str):
    """Fields of a tiny Mamba or Mamba2."""
    expand = draw(st.sampled_from([1, 2, 3]))
    fields = {
        "hidden_size": draw(st.sampled_from([8, 12, 24])),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "state_size": draw(st.integers(1, 9)),
        "expand": expand,
        "conv_kernel": draw(st.integers(2, 4)),
        "use_bias": draw(FLAG),
        "use_conv_bias": draw(FLAG),
        "layer_norm_epsilon": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        "residual_in_fp32": draw(FLAG),
        "hidden_act": draw(st.sampled_from(["silu", "gelu"])),
    }
    if kind == "mamba":
        if draw(FLAG):
            fields["intermediate_size"] = 7
        return fields | {"time_step_rank": draw(st.sampled_from(["auto", 1, 5])), "time_step_scale": 2.0}
    inner = expand * fields["hidden_size"]
    fields["head_dim"] = draw(st.sampled_from([2, 4]))
    fields["num_heads"] = inner // fields["head_dim"]
    fields["n_groups"] = draw(st.sampled_from([groups for groups in (1, 2, 3) if fields["num_heads"] % groups == 0]))
    fields["chunk_size"] = draw(st.sampled_from([3, 16]))
    fields["time_step_limit"] = draw(st.sampled_from([(0.0, math.inf), (0.02, 0.4), (0.05, math.inf)]))
    return fields


def make(kind: str, fields: dict, seed: int):
    """A model of transformers with every parameter random, A_log, norms and biases too."""
    config = CONFIG_MAPPING[kind](**fields, vocab_size=41, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = 1 if "norm" in name else 0
            parameter.copy_(around + torch.randn_like(parameter) * (0.3 if parameter.dim() < 2 else 0.15))
    return model


def rel_error(got, want) -> float:
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "mamba", "mamba2"])
def test_any_options_convert_exactly(kind):
    draw = (mamba_fields if "mamba" in kind else transformers_fields)(kind)

    @settings(max_examples=15, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(draw, st.booleans(), st.integers(0, 99))
    def check(fields, tied, seed):
        theirs = make(kind, fields | {"tie_word_embeddings": tied}, seed)
        with tempfile.TemporaryDirectory() as folder:
            source, result, back = (Path(folder) / name for name in ("source", "result", "back"))
            theirs.save_pretrained(source)
            for options in ((source, result, {}), (result, back, {"export": kind})):
                convert(*options[:2], **options[2], progress=False, say=lambda line: None)
            ours = BMojoForCausalLM.from_pretrained(result, dtype=torch.float64).eval()
            again = AutoModelForCausalLM.from_pretrained(back)
            tensors = load_file(source / "model.safetensors"), load_file(back / "model.safetensors")
        assert tensors[0].keys() == tensors[1].keys()
        assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
        ids = torch.randint(41, (2, 23), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            want = theirs(ids, use_cache=False).logits
            assert torch.equal(again.eval()(ids, use_cache=False).logits, want)
            want = theirs.double()(ids, use_cache=False).logits
            cache = BMojoCache(ours.config)
            pieces = [ours(piece, cache=cache).logits for piece in ids.split([9, 1, 1, 12], 1)]
            for got in (ours(ids, use_cache=False).logits, torch.cat(pieces, 1)):
                assert rel_error(got, want) <= 2e-6  # transformers' rotary tables and norms are float32

    check()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_converted_llama_writes_what_llama_writes(padded, settings, tmp_path):
    """Through some hundred columns, for which the keys of full attention grow several times."""
    fields = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    theirs = make("llama", fields | {"num_key_value_heads": 2, "max_position_embeddings": 512}, 0)
    theirs.save_pretrained(tmp_path / "llama")
    convert(tmp_path / "llama", tmp_path / "bmojo", progress=False, say=lambda line: None)
    ours = BMojoForCausalLM.from_pretrained(tmp_path / "bmojo", dtype=torch.float64).eval()
    ids = torch.randint(3, 41, (3, 70), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :9] = mask[1, :64] = 0
    common = {"attention_mask": mask, "min_new_tokens": 150, "max_new_tokens": 150, "do_sample": False}
    want = theirs.double().generate(ids, **common, **settings)
    assert want.shape == (3, 220)
    assert len(want[:, 70:].unique()) > 10, "it does not repeat itself only"
    assert torch.equal(ours.generate(ids, **common, **settings), want)


REFUSED = [
    (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "rope_type is 'dynamic'",
    ),
    (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor",
    ),
    ("llama", {"logit_scale": 0.5}, "logit_scale = 0.5"),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ("llama", {"auto_map": {"AutoModelForCausalLM": "modeling.Other"}}, "auto_map"),
    ("llama", {"hidden_act": "unheard_of"}, "unheard_of"),
    ("llama", {"hidden_size": "many"}, "hidden_size"),
    ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder"),
    ("qwen3", {"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": False}, "sliding_window"),
    ("mamba2", {"n_groups": 4}, "n_groups"),
]


@pytest.mark.parametrize(("kind", "change", "told"), REFUSED)
def test_what_has_no_exact_counterpart_is_refused_by_name(kind, change, told, shared, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(shared / "golden" / "transformers" / kind, source)
    path = source / "config.json"
    path.chmod(0o644)
    fields = json.loads(path.read_text()) | change
    if kind == "qwen3":
        fields["num_hidden_layers"] = 2
    path.unlink()
    path.write_text(json.dumps(fields))
    with pytest.raises(Refusal, match=told):
        convert(source, tmp_path / "result", progress=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


PUBLISHED = {  # config.json as older transformers wrote them, and what they must mean
    "llama 3.2": (
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008],
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "initializer_range": 0.02,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.45.0.dev0",
            "use_cache": True,
            "vocab_size": 128256,
        },
        {"head_dim": 64, "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0}},
    ),
    "llama 1": (
        {
            "architectures": ["LlamaForCausalLM"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "initializer_range": 0.02,
            "max_sequence_length": None,
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "pad_token_id": -1,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"type": "linear", "factor": 2},
            "temperature": 0.9,
            "torch_dtype": "float16",
            "transformers_version": "4.28.1",
            "use_cache": True,
            "vocab_size": 32000,
        },
        {"head_dim": 128, "num_key_value_heads": 32, "pad_token_id": None, "rope_parameters": {"factor": 2}},
    ),
    "qwen3": (
        {
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "head_dim": 128,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "max_position_embeddings": 40960,
            "max_window_layers": 36,
            "model_type": "qwen3",
            "num_attention_heads": 32,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            "rope_theta": 1000000,
            "sliding_window": None,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        {"use_qk_norm": True, "rope_parameters": {"rope_theta": 1000000, "rope_type": "yarn"}},
    ),
    "mamba 130m": (
        {
            "architectures": ["MambaForCausalLM"],
            "conv_kernel": 4,
            "d_inner": 1536,
            "d_model": 768,
            "expand": 2,
            "fused_add_norm": True,
            "hidden_act": "silu",
            "hidden_size": 768,
            "intermediate_size": 1536,
            "layer_norm_epsilon": 1e-05,
            "model_type": "mamba",
            "n_layer": 24,
            "num_hidden_layers": 24,
            "pad_vocab_size_multiple": 8,
            "residual_in_fp32": True,
            "rms_norm": True,
            "ssm_cfg": {},
            "state_size": 16,
            "time_step_rank": 48,
            "time_step_scale": 1.0,
            "vocab_size": 50280,
        },
        {"tie_word_embeddings": True, "residual_in_fp32": True, "time_step_rank": 48},
    ),
    "mamba2 with an infinite limit": (
        {
            "model_type": "mamba2",
            "hidden_size": 64,
            "num_heads": 2,
            "head_dim": 64,
            "n_groups": 2,
            "num_hidden_layers": 2,
            "vocab_size": 100,
            "time_step_limit": [0.0, math.inf],
        },
        {"time_step_limit": None, "tie_word_embeddings": False},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_understood(name):
    fields, want = PUBLISHED[name]
    got = recognise(fields, Path()).to_bmojo(fields)
    config = make_config(got)
    for field, value in want.items():
        found = getattr(config, field)
        assert found == value if not isinstance(value, dict) else value.items() <= found.items()


ODD = st.sampled_from([0, -1, 3, "x", None, [], {}, 1e30, True, 0.5, [1, 2]])


def places(fields: dict, path=()):
    """Every place in nested fields."""
    for name, value in fields.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from places(value, (*path, name))


def test_odd_values_are_refused_not_stumbled_over(shared):
    """In the config.json of every format: what it means, or a Refusal, nothing else."""
    folders = sorted(path.parent for path in (shared / "golden").glob("*/*/config.json"))
    originals = {folder: json.loads((folder / "config.json").read_text()) for folder in folders}

    @settings(max_examples=600, deadline=None, database=None, derandomize=True)
    @given(st.sampled_from(folders), st.data())
    def check(folder, data):
        fields = inner = json.loads(json.dumps(originals[folder]))
        *path, last = data.draw(st.sampled_from(list(places(fields))))
        for name in path:
            inner = inner[name]
        inner[last] = data.draw(ODD)
        with contextlib.suppress(Refusal):
            form = recognise(fields, folder)
            make_config(form.to_bmojo(fields))
            for question in (form.tensors, form.shapes, form.duplicates, form.ignored):
                question(fields)

    check()
