"""Falcon-H1: random models of transformers, all options drawn, refusals, and the way back (test_golden has recordings)."""

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
from transformers import FalconH1Config, FalconH1ForCausalLM

from bmojo.cache_bmojo import BMojoCache
from bmojo.convert import Refusal, convert
from bmojo.convert.falcon_h1 import FalconH1
from bmojo.modeling_bmojo import BMojoForCausalLM


FLAG = st.booleans()
FACTOR = st.sampled_from([1.0, 0.3, 0.9, 1.7])
ROPES = [
    {"rope_type": "default", "rope_theta": 100.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
    {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16},
]


def silently(source, destination, **options):
    return convert(source, destination, progress=False, say=lambda line: None, **options)


def rel_error(got, want) -> float:
    assert got.shape == want.shape
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@st.composite
def fields_of_falcon(draw):
    heads, mamba_heads = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([2, 4]))
    mamba_head_dim = draw(st.sampled_from([3, 4]))
    names = "key embedding lm_head attention_in attention_out ssm_in ssm_out".split()
    fields = {
        "vocab_size": 41,
        "hidden_size": heads * draw(st.sampled_from([6, 8])),
        "intermediate_size": draw(st.integers(5, 30)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": heads // draw(st.sampled_from([g for g in (1, 2, 4) if heads % g == 0])),
        "hidden_act": draw(st.sampled_from(["silu", "gelu", "relu"])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        "rope_parameters": dict(draw(st.sampled_from(ROPES))),
        "max_position_embeddings": 64,
        "mamba_d_ssm": mamba_heads * mamba_head_dim,
        "mamba_n_heads": mamba_heads,
        "mamba_d_head": draw(st.sampled_from([mamba_head_dim, "auto"])),
        "mamba_n_groups": draw(st.sampled_from([1, 2])),
        "mamba_d_state": draw(st.integers(1, 9)),
        "mamba_d_conv": draw(st.integers(2, 4)),
        "mamba_chunk_size": draw(st.sampled_from([3, 16])),
        "time_step_limit": draw(st.sampled_from([(0.0, math.inf), (0.02, 0.4), (0.05, math.inf)])),
        "mlp_multipliers": draw(st.sampled_from([None, [0.8, 1.2]])),
        "ssm_multipliers": draw(st.sampled_from([None, [0.9, 1.1, 0.8, 1.2, 0.7]])),
        "tie_word_embeddings": draw(FLAG),
        "pad_token_id": None,
    }
    fields |= {f"{name}_multiplier": draw(FACTOR) for name in names}
    fields |= {f"mamba_{name}": draw(FLAG) for name in ("conv_bias", "proj_bias", "rms_norm", "norm_before_gate")}
    fields |= {name: draw(FLAG) for name in ("projectors_bias", "attention_bias", "mlp_bias")}
    if draw(FLAG):  # without it, it follows from expand
        fields |= {"mamba_d_ssm": None, "mamba_expand": 2, "mamba_d_head": 2 * fields["hidden_size"] // mamba_heads}
    if draw(FLAG):
        fields["head_dim"] = 10
    return fields


def make(fields: dict, seed: int) -> FalconH1ForCausalLM:
    """A model of transformers with every parameter random, A_log, norms and biases too."""
    torch.manual_seed(seed)
    model = FalconH1ForCausalLM(FalconH1Config(**fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = 1 if "norm" in name else 0
            parameter.copy_(around + torch.randn_like(parameter) * (0.3 if parameter.dim() < 2 else 0.15))
    return model


@settings(max_examples=30, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(fields_of_falcon(), st.integers(0, 99))
def test_any_options_convert_exactly(fields, seed):
    theirs = make(fields, seed)
    with tempfile.TemporaryDirectory() as folder:
        source, result, back = (Path(folder) / name for name in ("source", "result", "back"))
        theirs.save_pretrained(source)
        silently(source, result)
        silently(result, back, export="falcon_h1")
        ours = BMojoForCausalLM.from_pretrained(result, dtype=torch.float64).eval()
        again = FalconH1ForCausalLM.from_pretrained(back).eval()
        tensors = load_file(source / "model.safetensors"), load_file(back / "model.safetensors")
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    ids = torch.randint(41, (2, 23), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        want = theirs(ids, use_cache=False).logits
        assert torch.equal(again(ids, use_cache=False).logits, want)
        want = theirs.double()(ids, use_cache=False).logits
        cache = BMojoCache(ours.config)
        pieces = [ours(piece, cache=cache).logits for piece in ids.split([9, 1, 1, 12], 1)]
        for got in (ours(ids, use_cache=False).logits, torch.cat(pieces, 1)):
            assert rel_error(got, want) <= 5e-6  # transformers' tables, scans and norms are float32


def test_gradients_are_those_of_the_original(tmp_path):
    theirs = make(
        {
            "vocab_size": 41, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "mamba_d_ssm": 24, "mamba_n_heads": 6, "mamba_n_groups": 2, "mamba_d_state": 5,
            "mamba_rms_norm": True, "mamba_norm_before_gate": True, "mamba_chunk_size": 8, "key_multiplier": 0.6,
            "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7], "mlp_multipliers": [0.8, 1.2], "embedding_multiplier": 1.5,
            "lm_head_multiplier": 0.7, "ssm_in_multiplier": 1.3, "ssm_out_multiplier": 0.75,
            "attention_in_multiplier": 1.1, "attention_out_multiplier": 0.9, "tie_word_embeddings": True,
            "pad_token_id": None,
        },
        seed=3,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path / "source")
    ours = BMojoForCausalLM.from_pretrained(silently(tmp_path / "source", tmp_path / "ours")).train()
    ids = torch.randint(41, (2, 23), generator=torch.Generator().manual_seed(0))
    for model in (theirs.train(), ours):
        model(ids, labels=ids, use_cache=False).loss.backward()
    wanted = dict(theirs.named_parameters())
    names = FalconH1().tensors(theirs.config.to_dict())
    assert len(names) == len(wanted)
    for name, parameter in ours.named_parameters():
        (piece,) = names[name]
        assert rel_error(parameter.grad, wanted[piece.name].grad) <= 1e-4, name


REFUSED = [
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type is 'dynamic'"),
    ({"residual_multiplier": 0.5}, "residual_multiplier = 0.5"),
    ({"key_multiplier": None}, "key_multiplier is null"),
    ({"ssm_multipliers": [1.0, 1.0]}, r"ssm_multipliers is \[1.0, 1.0\]; it must hold 5 factors"),
    ({"mlp_multipliers": [1.0]}, "mlp_multipliers"),
    ({"mamba_n_groups": 4}, "mamba_n_heads 6 is not a multiple of mamba_n_groups 4"),
    ({"mamba_d_head": 7}, "dimensions for the Mamba head state"),
    ({"time_step_limit": None}, "time_step_limit is null"),
    ({"head_dim": 2.5}, "head_dim is 2.5"),
    ({"hidden_act": "unheard_of"}, "unheard_of"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED)
def test_what_has_no_exact_counterpart_is_refused_by_name(shared, tmp_path, change, words):
    folder = shared / "golden" / "transformers" / "falcon_h1"
    source = tmp_path / "source"
    source.mkdir()
    shutil.copyfile(folder / "model.safetensors", source / "model.safetensors")
    fields = json.loads((folder / "config.json").read_text()) | change
    (source / "config.json").write_text(json.dumps(fields))
    with pytest.raises(Refusal, match=words):
        silently(source, tmp_path / "result")
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"layers_block_type": ["hybrid", "bmojo"]}, "layers_block_type has 'bmojo' for layer 1"),
        ({"ssm_type": "mamba"}, "ssm_type is 'mamba'"),
        ({"intermediate_size": None}, "intermediate_size is None"),
        ({"use_qk_norm": True}, "use_qk_norm is True"),
        ({"position_embedding_type": "nope"}, "position_embedding_type is 'nope'"),
        ({"attention_conv_kernel": 4}, "attention_conv_kernel is 4"),
        ({"rms_norm": False}, "rms_norm is False"),
        ({"mamba_d_mlp": 3}, "mamba_d_mlp is 3"),
        ({"softmax_scale": 0.5}, "softmax_scale is 0.5"),
    ],
)
def test_what_falcon_h1_has_not_is_refused_by_name(tiny_model, tmp_path, fields, words):
    tiny_model(**{"layers_block_type": ["hybrid"] * 2} | fields).save_pretrained(tmp_path / "ours")
    with pytest.raises(Refusal, match=words):
        silently(tmp_path / "ours", tmp_path / "out", export="falcon_h1")
    assert not (tmp_path / "out").exists()
