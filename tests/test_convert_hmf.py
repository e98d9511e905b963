"""The authors' checkpoints: recordings of their own code, random models of every option against loops, and the way back."""

import json
import math
import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bmojo.cache_bmojo import BMojoCache
from bmojo.configuration_bmojo import BMojoConfig
from bmojo.convert import Refusal, convert
from bmojo.convert.core import assemble
from bmojo.convert.hmf import HMF
from bmojo.modeling_bmojo import BMojoForCausalLM
from bmojo_tests.hmf_reference import logits_of


CASES = [
    "mamba2_tied",
    "mamba2_untied",
    "mamba2_posemb_noqknorm_tiedemb",
    "mamba2_fused_stage0",
    "gka_tied",
    "gdn_tied",
]
GKA_FLAGS = "use_alpha_connection use_v_conv use_forgetting_gate use_forgetting_gate_kk use_beta_gate use_gate gla_rescale bp_lambda"
FORMAT = HMF()
SMALL = {
    "model_type": "hybrid_qwen3",
    "architectures": ["HybridQwen3ForCausalLM"],
    "vocab_size": 61,
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-4,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "hybrid_override_pattern": "*-BMF-BMF",
    "bmojo_config": {"window_size": 5, "tie_attn_weights": True, "ssm_mixer": "gka"},
}


def small(**changes) -> dict:
    return {**json.loads(json.dumps(SMALL)), **changes}


def with_bmojo(**changes) -> dict:
    return small(bmojo_config={**SMALL["bmojo_config"], **changes})


def random_tensors(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Theirs, such that nothing hides behind a 0 or a 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in FORMAT.shapes(config).items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        norm = "norm" in name.split(".")[-2]
        tensors[name] = 1 + 0.3 * noise if norm else noise * (0.3 if len(shape) < 2 else 1.5 * shape[-1] ** -0.5)
    return tensors


def model_of(config: dict, tensors: dict[str, torch.Tensor]) -> BMojoForCausalLM:
    """Our model in float64 with their weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = BMojoForCausalLM(BMojoConfig(**FORMAT.to_bmojo(config))).double().eval()
    weights = {
        name: assemble(pieces, lambda piece: tensors[piece.name][piece.start : piece.stop])
        for name, pieces in FORMAT.tensors(config).items()
    }
    found = model.load_state_dict(weights, strict=False)
    assert not found.unexpected_keys
    assert found.missing_keys == (["lm_head.weight"] if config["tie_word_embeddings"] else [])
    return model


def largest(got, want):
    """Largest difference relative to the largest entry."""
    assert got.shape == want.shape
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()


@torch.no_grad()
def decoded(model, ids, sizes):
    cache = BMojoCache(model.config)
    return torch.cat([model(part, cache=cache).logits for part in ids.split(sizes, 1)], 1)


# ---------------------------------------------------------------------------- their own outputs


@pytest.fixture(scope="module", params=CASES)
def recorded(request, shared):
    """A case: its folder, config.json, recorded tensors, and our model."""
    folder = shared / "golden" / "hmf" / request.param
    config = json.loads((folder / "config.json").read_text())
    return (
        folder,
        config,
        load_file(folder / "io.safetensors"),
        model_of(config, load_file(folder / "model.safetensors")),
    )


def test_every_recorded_activation(recorded):
    _, _, want, model = recorded
    seen, hooks = {}, []
    for number, layer in enumerate(model.model.layers):
        hooks.append(
            layer.register_forward_hook(lambda _, args, out, at=number: seen.update({f"hidden.{at + 1}": out[0]}))
        )
        if hasattr(layer.mixer, "fading"):
            name = f"layers.{number}."
            hooks.append(
                layer.mixer.register_forward_hook(
                    lambda _, args, out, name=name: seen.update(
                        {f"{name}mixer_input": args[0], f"{name}bmojo_out": out[0]}
                    )
                )
            )
            hooks.append(
                layer.mixer.fading.register_forward_hook(
                    lambda _, args, out, name=name: seen.update({f"{name}fading": out[0]})
                )
            )
    with torch.no_grad():
        out = model(want["input_ids"], labels=want["input_ids"], use_cache=False, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    seen |= {"logits": out.logits, "loss": out.loss, "final_norm": out.hidden_states[-1]}
    compared = {name for name in want if name != "input_ids" and not name.startswith("grad.")}
    assert seen.keys() == compared
    for name in compared:
        assert largest(seen[name], want[name]) < (2e-5 if name.endswith("fading") else 1e-5), name


def test_every_recorded_gradient(recorded):
    _, config, want, model = recorded
    model.zero_grad()
    model(want["input_ids"], labels=want["input_ids"], use_cache=False).loss.backward()
    compared = set()
    for ours, parts in FORMAT.layout(config).items():
        start = 0
        for name, shape in parts:
            if f"grad.{name}" in want:
                got, recorded_gradient = model.get_parameter(ours).grad[start : start + shape[0]], want[f"grad.{name}"]
                assert (got - recorded_gradient).norm() < 1e-4 * recorded_gradient.double().norm(), name
                compared.add(f"grad.{name}")
            start += shape[0]
    assert compared == {name for name in want if name.startswith("grad.")}


@pytest.mark.parametrize("sizes", [[1] * 50, [20, 1, 1, 9, 1, 18], [50]], ids=["single", "split", "whole"])
def test_recorded_logits_from_a_cache(recorded, sizes):
    _, _, want, model = recorded
    assert largest(decoded(model, want["input_ids"], sizes), want["logits"]) < 1e-5


def test_recorded_case_through_the_command(recorded, tmp_path):
    """Folder to folder and back: the bits of all tensors, a model that loads alone, and what is said about a teacher."""
    folder, config, want, _ = recorded
    said = []
    convert(folder, tmp_path / "ours", progress=False, say=said.append)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", trust_remote_code=True)
    with torch.no_grad():
        assert largest(model(want["input_ids"]).logits, want["logits"]) < 5e-5  # in float32
    convert(tmp_path / "ours", tmp_path / "theirs", export="hmf", progress=False, say=said.append)
    fused = "*DA" in config["hybrid_override_pattern"]
    source, result = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "theirs"))
    teacher = {name for name in source if ".self_attn." in name and name.split(".")[2] in "13"}
    assert bool(teacher) == fused
    assert source.keys() - teacher == result.keys()
    assert all(torch.equal(result[name], source[name]) for name in result)
    assert all(any(name in line and "the teacher's part" in line for line in said) for name in teacher)
    exported = json.loads((tmp_path / "theirs" / "config.json").read_text())
    standard = json.loads((folder / "expected_unfused_config.json").read_text()) if fused else config
    about_folder = {"transformers_version", "use_cache", "max_window_layers", "dtype"}
    for name in standard.keys() - about_folder:
        assert exported[name] == standard[name], name
    assert exported.keys() <= standard.keys()
    again = FORMAT.to_bmojo(exported)
    assert again == FORMAT.to_bmojo(config)


# ---------------------------------------------------------------------------- every option


def configurations():
    flags = st.booleans()
    rank = {"kv_proj_rank": st.sampled_from([None, None, 3]), "kv_learnable_residual": flags}
    eps = st.sampled_from([1e-6, 1e-2])
    blocks = {
        "mamba2": st.fixed_dictionaries({}, optional={"use_qk_norm": flags, "use_pos_emb": flags}),
        "gka": st.fixed_dictionaries(
            {},
            optional={
                **dict.fromkeys(GKA_FLAGS.split(), flags),
                "num_iter": st.integers(0, 12),
                "ridge_strength": st.sampled_from([0.02, 0.3]),
                "conv_size": st.integers(1, 5),
                "norm_eps": eps,
                "solver_type": st.just("chebyshev"),
                **rank,
            },
        ),
        "gdn": st.fixed_dictionaries(
            {},
            optional={
                **dict.fromkeys(("use_gate", "use_short_conv", "allow_neg_eigval", "conv_bias"), flags),
                "conv_size": st.integers(1, 5),
                "norm_eps": eps,
                **rank,
            },
        ),
    }

    @st.composite
    def draw_one(draw):
        mixer = draw(st.sampled_from(list(blocks)))
        bare = {"mamba2": "M2", "gka": "GKA", "gdn": "GDN"}[mixer]
        layers = draw(st.lists(st.sampled_from(["*", "BMF", "BMF", bare, "SWA"]), min_size=1, max_size=3))
        kv_heads = draw(st.sampled_from([1, 2, 3]))
        window = draw(st.integers(1, 6))
        config = small(
            hybrid_override_pattern="-".join(layers),
            num_hidden_layers=len(layers),
            num_attention_heads=kv_heads * draw(st.sampled_from([1, 2])),
            num_key_value_heads=kv_heads,
            head_dim=draw(st.sampled_from([2, 6])),
            tie_word_embeddings=draw(flags),
            attention_bias=draw(flags),
            bmojo_config={"window_size": window, "tie_attn_weights": draw(flags), "ssm_mixer": mixer},
        )
        if "SWA" in layers:
            config["swa_config"] = {"window_size": window}
        block = draw(blocks[mixer])
        return config | ({f"{mixer}_config": block} if block else {})

    return draw_one()


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(configurations(), st.integers(0, 2**20))
def test_random_models_of_every_option(config, seed):
    """Logits, cached ones too, against loops over their tensors; all tensors take part, and the way back is the same."""
    tensors = random_tensors(config, seed)
    ids = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(seed))
    model = model_of(config, tensors)
    with torch.no_grad():
        got = model(ids, use_cache=False).logits
    used = set()
    for row, logits in zip(ids, got, strict=True):
        want, used = logits_of(config, tensors, row)
        assert largest(logits, want) < 1e-10
    assert used == tensors.keys()
    assert largest(decoded(model, ids, [3, 1, 1, 7, 1, 1, 1, 1, 1]), got) < 1e-10
    fields = FORMAT.to_bmojo(config)
    exported = FORMAT.from_bmojo(BMojoConfig(**fields))
    assert FORMAT.to_bmojo(exported) == fields
    assert FORMAT.shapes(exported) == FORMAT.shapes(config)


@pytest.mark.parametrize(
    ("mixer", "parameters", "tensors"),
    [("mamba2", 9_250_692_288, 579), ("gka", 9_255_224_832, 687), ("gdn", 9_252_864_384, 633)],
)
def test_sizes_at_scale(mixer, parameters, tensors):
    """Counted with the authors' classes in the shapes of Qwen3-8B, half of its layers B'MOJO-F."""
    config = small(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, hybrid_override_pattern="-".join(["*", "BMF"] * 18),
        bmojo_config={"window_size": 2048, "tie_attn_weights": True, "ssm_mixer": mixer},
    )  # fmt: skip
    shapes = FORMAT.shapes(config)
    assert len(shapes) == tensors
    assert sum(math.prod(shape) for shape in shapes.values()) == parameters
    with torch.device("meta"):
        model = BMojoForCausalLM(BMojoConfig(**FORMAT.to_bmojo(config)))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


# ---------------------------------------------------------------------------- spellings


@pytest.mark.parametrize(
    ("spelling", "mixer"),
    [
        ("gka", "gated_kalmanet"),
        ("GKA", "gated_kalmanet"),
        ("gated_kalmanet", "gated_kalmanet"),
        ("parallel_latent_sketch", "gated_kalmanet"),
        ("gdn", "gated_deltanet"),
        ("Gated_DeltaNet", "gated_deltanet"),
        ("mamba2", "mamba2"),
        ("Mamba2", "mamba2"),
        (None, "mamba2"),
    ],
)
def test_names_of_mixers(spelling, mixer):
    config = with_bmojo(ssm_mixer=spelling)
    if spelling is None:
        del config["bmojo_config"]["ssm_mixer"]
    assert FORMAT.to_bmojo(config)["ssm_type"] == mixer


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e6, "rope_scaling": None},
        {"rope_theta": 5e6},
        {"rope_theta": 5e6, "rope_scaling": {"rope_type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}},
    ],
    ids=str,
)
def test_ways_to_say_the_rotation(spelling):
    config = small()
    del config["rope_parameters"]
    assert FORMAT.to_bmojo(config | spelling)["rope_parameters"] == {"rope_type": "default", "rope_theta": 5e6}


def test_fields_without_effect():
    plain = FORMAT.to_bmojo(small())
    idle = {
        "layer_types": ["full_attention"] * 3,
        "sliding_window": 3,
        "use_sliding_window": True,
        "max_window_layers": 1,
        "torch_dtype": "bfloat16",
        "mamba2_config": {"ssm_cfg": {"expand": 1}, "xb_proj_rank": None, "xb_learnable_residual": False},
        "gka_config": {"chunk_size": 128, "num_q_heads": 6, "num_k_heads": 2},
    }
    copies = {"hidden_size": 1, "num_heads": 1, "num_key_value_heads": 1, "head_dim": 1, "rms_norm_eps": 1.0}
    assert FORMAT.to_bmojo(small(**idle, bmojo_config=SMALL["bmojo_config"] | copies)) == plain


@pytest.mark.parametrize(
    ("pattern", "layers", "teachers"),
    [
        ("*DA-BMF*-*DA", ["full_attention", "bmojo", "full_attention"], {1: "self_attn."}),
        ("*-GKA*-SWA*", ["full_attention", "gated_kalmanet", "sliding_attention"], {1: "self_attn.", 2: "self_attn."}),
        ("*-GDN>GKA-BMF", ["full_attention", "gated_kalmanet", "bmojo"], {1: "gdn."}),
    ],
)
def test_fused_layers_become_standard_ones(pattern, layers, teachers):
    config = small(hybrid_override_pattern=pattern, swa_config={"window_size": 5})
    assert FORMAT.to_bmojo(config)["layers_block_type"] == layers
    ignored = FORMAT.ignored(config)
    assert {
        number for number in range(3) if any(f"layers\\.{number}\\." in name for name in ignored)
    } == teachers.keys()
    for number, prefix in teachers.items():
        assert re.escape(f"model.layers.{number}.{prefix}") + ".*" in ignored


@pytest.mark.parametrize("window", [7, 127, 2047])
def test_a_window_one_short_of_a_power_of_two_is_taken_literally_with_a_warning(window):
    with pytest.warns(UserWarning, match=f"window_size is {window}, one less than a power of two"):
        assert FORMAT.to_bmojo(with_bmojo(window_size=window))["sliding_window"] == window


# ---------------------------------------------------------------------------- refusals


def block(name, **entries):
    mixer = {"mamba2_config": "mamba2", "gdn_config": "gdn"}.get(name, "gka")
    return small(**{name: entries}, bmojo_config=SMALL["bmojo_config"] | {"ssm_mixer": mixer})


REFUSED = [
    *(
        (small(model_type=name), f"model_type is '{name}'")
        for name in ("hybrid_qwen2", "hybrid_llama", "hybrid_qwen3_moe")
    ),
    (small(hybrid_override_pattern=None), "hybrid_override_pattern is null"),
    (small(hybrid_override_pattern="*-BMF"), "hybrid_override_pattern names 2 layers, num_hidden_layers is 3"),
    (small(hybrid_override_pattern="*-BMF-RWKV"), "has the layer 'RWKV'; known are"),
    (small(hybrid_override_pattern="*-BMF-GDN>*"), r"has the layer 'GDN>\*'"),
    (small(hybrid_override_pattern="*-BMF-M2"), "mix gated_kalmanet and mamba2"),
    (small(bmojo_config=None), "bmojo_config.window_size is missing"),
    (small(bmojo_config={"window_size": 4}), "bmojo_config.tie_attn_weights is missing"),
    (with_bmojo(window_size=True), "bmojo_config.window_size is true; it must be a whole number"),
    (with_bmojo(window_size="8"), 'bmojo_config.window_size is "8"'),
    (with_bmojo(tie_attn_weights=1), "bmojo_config.tie_attn_weights is 1; it must be true or false"),
    (with_bmojo(ssm_mixer="s4"), "bmojo_config.ssm_mixer is 's4'"),
    (with_bmojo(sinks=4), "bmojo_config.sinks is 4, which this converter does not know"),
    (small(bmojo_config=[1]), r"bmojo_config is \[1\]; it must be a group of fields"),
    (
        small(hybrid_override_pattern="*-BMF-SWA", swa_config={"window_size": 4}),
        "bmojo_config.window_size and swa_config.window_size differ, 5 and 4",
    ),
    (small(hybrid_override_pattern="*-BMF-SWA"), "swa_config.window_size is missing"),
    (
        block("mamba2_config", ssm_cfg={"repeat_kv_before_conv": True}),
        "mamba2_config.ssm_cfg.repeat_kv_before_conv is true",
    ),
    (block("mamba2_config", ssm_cfg=[1]), r"mamba2_config.ssm_cfg is \[1\]; it must be a group of fields"),
    (block("mamba2_config", xb_proj_rank=8), "mamba2_config.xb_proj_rank is 8"),
    (block("mamba2_config", xb_learnable_residual=True), "mamba2_config.xb_learnable_residual is true"),
    (block("gka_config", num_sketches_per_head=2), "gka_config.num_sketches_per_head is 2"),
    (block("gka_config", solver_type="cg"), "gka_config.solver_type is 'cg'; only 'chebyshev'"),
    (block("gka_config", num_iter=2.5), "gka_config.num_iter is 2.5; it must be a whole number"),
    (block("gka_config", ridge_strength=0), "gka_config.ridge_strength is 0; it must be a number"),
    (block("gka_config", num_q_heads=4), "gka_config.num_q_heads is 4, the model's own is 6"),
    (block("gdn_config", use_gate="yes"), 'gdn_config.use_gate is "yes"; it must be true or false'),
    (block("gdn_config", mode="chunk"), 'gdn_config.mode is "chunk", which this converter does not know'),
    (small(gka_overrides={"num_iter": 10}), "config.json has gka_overrides"),
    (small(attention_dropout=0.1), "attention_dropout is 0.1"),
    (small(hidden_act="gelu"), "hidden_act is 'gelu'"),
    (small(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}), "rope_type is 'linear'"),
    (small(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "rope_type is 'dynamic'"),
    (small(some_new_option=1), "config.json has some_new_option = 1, which this converter does not know for hmf"),
]


@pytest.mark.parametrize(("config", "text"), REFUSED, ids=[text[:40] for _, text in REFUSED])
def test_refusals_name_what_is_in_the_way(config, text):
    with pytest.raises(Refusal, match=text):
        FORMAT.to_bmojo(config)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"ssm_type": "mamba"}, "ssm_type is 'mamba'"),
        ({"eidetic_size": 4}, "eidetic_size is 4; layers of hmf have no eidetic memory"),
        ({"eidetic_size": 4, "layers_block_type": ["bmojo", "bmojo_f"]}, "eidetic_size is 4; layers of hmf have no"),
        ({"layers_block_type": ["mamba", "bmojo"]}, "layers_block_type has 'mamba' for layer 0"),
        ({"layers_block_type": ["mamba2", "bmojo"], "ssm_type": "gated_deltanet"}, "mix gated_deltanet and mamba2"),
        ({"intermediate_size": None}, "intermediate_size is None"),
        ({"use_qk_norm": False}, "no special case of hmf: use_qk_norm is False"),
        ({"tie_attn_weights": False}, "no special case of hmf: fading_query is False"),
        ({"use_conv_bias": True}, "no special case of hmf: use_conv_bias is True"),
        ({"use_bias": True}, "no special case of hmf: use_bias is True"),
    ],
    ids=str,
)
def test_what_is_no_special_case_is_not_exported(tiny_model, tmp_path, changes, text):
    fitting = {"ssm_type": "gated_kalmanet", "eidetic_size": 0, "use_qk_norm": True, "use_conv_bias": False}
    tiny_model(**fitting | changes).save_pretrained(tmp_path / "ours")
    with pytest.raises(Refusal, match=text):
        convert(tmp_path / "ours", tmp_path / "theirs", export="hmf", progress=False, say=lambda line: None)
    assert not (tmp_path / "theirs").exists()


@pytest.mark.parametrize("ssm_type", ["gated_kalmanet", "gated_deltanet"])
@pytest.mark.parametrize(
    ("kinds", "eidetic_size"), [(["bmojo"], 0), (["bmojo_f"], 4), (["bmojo", "bmojo_f"], 0)], ids=str
)
def test_models_made_here_can_be_exported(tiny_model, tmp_path, ssm_type, kinds, eidetic_size):
    layers = [*kinds, "sliding_attention", ssm_type, "full_attention"]
    model = tiny_model(
        ssm_type=ssm_type, layers_block_type=layers, num_hidden_layers=len(layers), eidetic_size=eidetic_size,
        use_qk_norm=True, use_conv_bias=False,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", export="hmf", progress=False, say=lambda line: None)
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    ids = torch.arange(3, 33)
    want, _ = logits_of(config, load_file(tmp_path / "theirs" / "model.safetensors"), ids)
    with torch.no_grad():
        assert largest(model.double()(ids[None]).logits[0], want) < 1e-10


@pytest.mark.parametrize("lacking", [True, False])
def test_tensors_that_do_not_fit_the_configuration(tmp_path, lacking):
    config = small()
    tensors = random_tensors(config)
    if lacking:
        del tensors["model.layers.1.bmojo_f.gka.alpha_proj.bias"]
    else:
        tensors["model.layers.1.bmojo_f.bmojo_attn.q_proj_.weight"] = torch.zeros(2, 2)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "theirs" / "model.safetensors")
    name = "alpha_proj.bias" if lacking else "q_proj_.weight"
    with pytest.raises(Refusal, match=name):
        convert(tmp_path / "theirs", tmp_path / "ours", progress=False, say=lambda line: None)
