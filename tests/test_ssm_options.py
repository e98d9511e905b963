"""The options inside the SSMs: against loops in float64, against transformers' mixers, and against recordings of other code."""

import json
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import FalconH1Config, FalconMambaConfig, JambaConfig
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1Mixer
from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer
from transformers.models.jamba.modeling_jamba import JambaMambaMixer

from bmojo.cache_bmojo import BMojoCache
from bmojo.configuration_bmojo import BMojoConfig
from bmojo.modeling_bmojo import BMojoForCausalLM, BMojoModel
from bmojo_tests.reference import reference_forward


FEW_EXAMPLES = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
DYNAMICS = ("A_log", "D", "dt_bias")


def rel_error(got, want):
    assert got.shape == want.shape
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-12)).item()


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random parameters, so that nothing hides behind a 0 or a 1 of the initialisation."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5
        offset = 1.0 if parameter.dim() == 1 else 0.0
        parameter.data = offset + scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model.eval()


class OneMixer:
    """A mixer of ours on its own: (batch, seq_len, hidden_size) to the same, at once or in cached calls."""

    def __init__(self, kind: str, weights: dict[str, torch.Tensor], **fields):
        """`weights` under the names of the mixer, but for A_log, D and dt_bias, which need not say `dynamics`."""
        fields = {
            "vocab_size": 7,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "intermediate_size": None,
        } | fields
        self.model = BMojoModel(BMojoConfig(layers_block_type=[kind], **fields))
        self.mixer, self.kind = self.model.layers[0].mixer, kind
        self.mixer.to(next(iter(weights.values())).dtype)
        weights = {name.replace("dt_proj.bias", "dt_bias"): tensor for name, tensor in weights.items()}
        self.mixer.load_state_dict({f"dynamics.{n}" if n in DYNAMICS else n: t for n, t in weights.items()})

    def __call__(self, u):
        return self.mixer(u, self.model._call(u, u.shape[1]))[0]

    @torch.no_grad()
    def in_pieces(self, u, sizes):
        """The outputs of cached calls of these sizes, and the state after them."""
        cache, outputs = BMojoCache(self.model.config), []
        for piece in u.split(sizes, 1):
            call = self.model._call(piece, piece.shape[1], None, cache, cache.begin(piece))
            y, state, _ = self.mixer(piece, call, cache.layer_state(0, self.kind, piece))
            cache.store([state], piece.shape[1], None, None)
            outputs.append(y)
        return torch.cat(outputs, 1), cache.layers[0].state

    def check(self, u, want, tolerance):
        """Compare the output at once and in pieces; returns the last state."""
        with torch.no_grad():
            assert rel_error(self(u), want) < tolerance
        for sizes in ([1] * u.shape[1], [u.shape[1] - 3, 1, 1, 1], [1, u.shape[1] - 1]):
            found, state = self.in_pieces(u, sizes)
            assert rel_error(found, want) < tolerance
        return state


def inputs(batch, seq_len, hidden_size, dtype=torch.float64):
    return torch.randn(batch, seq_len, hidden_size, generator=torch.Generator().manual_seed(3)).to(dtype)


# ---------------------------------------------------------------------------- against loops


@st.composite
def mamba2_fields(draw):
    grouped = draw(st.booleans())
    groups = draw(st.sampled_from([1, 2, 3]))
    state_size = draw(st.sampled_from([3, 4, 6]))
    if grouped:
        own, repeats = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        fields = {"mamba_num_heads": own * repeats, "n_groups": own * repeats, "mamba_num_key_value_heads": own}
    else:
        fields = {"mamba_num_heads": groups * draw(st.integers(1, 2)), "n_groups": groups}
    return fields | {
        "layers_block_type": [draw(st.sampled_from(["mamba2", "bmojo"]))],
        "ssm_type": "mamba2",
        "state_size": state_size,
        "mamba_head_dim": draw(st.sampled_from([1, 4, 5])),
        "mamba_use_pos_emb": state_size == 6 and draw(st.booleans()),
        "mamba_d_mlp": draw(st.sampled_from([0, 1, 6])),
        "mamba_rms_norm": draw(st.booleans()),
        "mamba_norm_before_gate": draw(st.booleans()),
        "mamba_norm_eps": draw(st.sampled_from([None, 1e-1])),
        "D_has_hdim": draw(st.booleans()),
    }


@st.composite
def mamba_fields(draw):
    return {
        "layers_block_type": [draw(st.sampled_from(["mamba", "bmojo"]))],
        "ssm_type": "mamba",
        "state_size": draw(st.integers(1, 5)),
        "mamba_intermediate_size": draw(st.sampled_from([None, 1, 17, 50])),
        "time_step_rank": draw(st.sampled_from([1, 3, 30])),
    }


@st.composite
def any_fields(draw):
    fields = draw(st.one_of(mamba2_fields(), mamba_fields()))
    return fields | {
        "num_hidden_layers": 1,
        "mixer_norm": draw(st.sampled_from([None, "learned", "weightless"])),
        "mixer_rms_eps": draw(st.sampled_from([1e-6, 1e-1])),
        "mamba_hidden_act": draw(st.sampled_from(["silu", "gelu", "tanh"])),
        "use_bias": draw(st.booleans()),
        "use_conv_bias": draw(st.booleans()),
        "conv_kernel": draw(st.sampled_from([1, 2, 4])),
        "time_step_limit": draw(st.sampled_from([None, [0.0, 0.4], [0.2, float("inf")], [0.1, 0.9]])),
    }


@given(any_fields(), st.booleans())
@settings(FEW_EXAMPLES, max_examples=40)
def test_any_options_are_the_reference(tiny_config, cut, fields, in_blocks):
    """Logits, and the gradients of all parameters, of any combination; cached calls too; also in the forms for long inputs."""
    with cut() if in_blocks else nullcontext():
        compare_with_reference(tiny_config(**fields))


def compare_with_reference(config):
    model = randomise(BMojoForCausalLM(config).double())
    ids = torch.randint(3, 97, (13,), generator=torch.Generator().manual_seed(1))
    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    want = reference_forward(config, weights, ids).logits
    got = model(ids[None], use_cache=False).logits[0]
    assert rel_error(got, want) < 1e-9
    want_grads = torch.autograd.grad(want.square().sum(), list(weights.values()), allow_unused=True)
    got_grads = torch.autograd.grad(got.square().sum(), list(model.parameters()), allow_unused=True)
    for name, a, b in zip(weights, got_grads, want_grads, strict=True):
        assert (a is None) == (b is None), name
        assert a is None or rel_error(a, b) < 1e-8 or (a - b).abs().max() < 1e-12, name
    cache = BMojoCache(config)
    with torch.no_grad():
        parts = [model(part[None], cache=cache).logits[0] for part in ids.split([4, 1, 1, 1, 5, 1])]
    assert rel_error(torch.cat(parts), want) < 1e-9


OTHERS = {  # an option, and what it must be told apart from
    "mixer_norm": ("learned", "weightless", None),
    "mixer_rms_eps": (1e-6, 1e-2),
    "mamba_hidden_act": ("silu", "gelu"),
    "mamba_use_pos_emb": (False, True),
    "mamba_norm_before_gate": (False, True),
    "mamba_norm_eps": (None, 1e-2),
    "time_step_limit": (None, [0.0, 0.3], [1.0, float("inf")]),
}


@pytest.mark.parametrize("option", OTHERS)
def test_every_option_counts(tiny_config, option):
    """Options that leave the shapes as they are give other logits from the same weights."""
    ids, found = torch.arange(3, 23)[None], []
    for value in OTHERS[option]:
        fields = {"layers_block_type": ["mamba2"] * 2, "mixer_norm": "learned", "state_size": 6, "n_groups": 2}
        model = BMojoForCausalLM(tiny_config(**(fields | {option: value}))).double()
        randomise(model)
        with torch.no_grad():
            found.append(model(ids).logits)
    for i, one in enumerate(found):
        for other in found[:i]:
            assert rel_error(one, other) > 1e-4


# ---------------------------------------------------------------------------- against transformers' mixers


@given(
    st.fixed_dictionaries(
        {
            "mamba_n_groups": st.sampled_from([1, 2, 4]),
            "mamba_d_head": st.sampled_from([3, 8]),
            "mamba_d_state": st.sampled_from([4, 7]),
            "mamba_rms_norm": st.booleans(),
            "mamba_norm_before_gate": st.booleans(),
            "mamba_conv_bias": st.booleans(),
            "mamba_d_conv": st.sampled_from([2, 4]),
            "hidden_act": st.sampled_from(["silu", "gelu"]),
            "time_step_limit": st.sampled_from([(0.0, float("inf")), (0.0, 0.5), (0.3, float("inf"))]),
        }
    )
)
@FEW_EXAMPLES
def test_mamba2_is_falcon_h1s(in_float64, options):
    """Gated norm or none, before or behind the gate, in groups; the SSM's width apart from expand * hidden_size."""
    heads = 4
    config = FalconH1Config(
        **options, hidden_size=20, mamba_n_heads=heads, mamba_d_ssm=heads * options["mamba_d_head"], mamba_chunk_size=8,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, rms_norm_eps=1e-3, vocab_size=9,
    )  # fmt: skip
    theirs = randomise(FalconH1Mixer(config, 0).double())
    theirs.mup_vector = 1.0  # the model sets it: factors on the parts of the input projection
    ours = OneMixer(
        "mamba2", theirs.state_dict(), hidden_size=20, mamba_num_heads=heads, mamba_head_dim=config.mamba_d_head,
        state_size=config.mamba_d_state, n_groups=config.mamba_n_groups, conv_kernel=config.mamba_d_conv, rms_norm_eps=1e-3,
        use_conv_bias=config.mamba_conv_bias, mamba_hidden_act=config.hidden_act, time_step_limit=config.time_step_limit,
        mamba_rms_norm=config.mamba_rms_norm, mamba_norm_before_gate=config.mamba_norm_before_gate,
    )  # fmt: skip
    u = inputs(2, 19, 20)
    with torch.no_grad(), in_float64():
        want = theirs(u)
    ours.check(u, want, 1e-9)


SELECTIVE = st.fixed_dictionaries(
    {
        "state_size": st.sampled_from([1, 4, 7]),
        "time_step_rank": st.sampled_from([1, 3]),
        "conv_kernel": st.sampled_from([1, 2, 4]),
        "use_bias": st.booleans(),
        "use_conv_bias": st.booleans(),
        "hidden_act": st.sampled_from(["silu", "gelu", "relu"]),
    }
)


@given(SELECTIVE, st.sampled_from([24, 40]), st.sampled_from([1e-6, 1e-2]))
@FEW_EXAMPLES
def test_mamba_is_falcon_mambas(in_float64, options, inner, eps):
    config = FalconMambaConfig(
        **options, hidden_size=20, intermediate_size=inner, mixer_rms_eps=eps, num_hidden_layers=1, vocab_size=9
    )
    theirs = randomise(FalconMambaMixer(config, 0, initialize_mixer_weights=False).double())
    options["mamba_hidden_act"] = options.pop("hidden_act")
    ours = OneMixer(
        "mamba", theirs.state_dict(), hidden_size=20, mamba_intermediate_size=inner, mixer_norm="weightless",
        mixer_rms_eps=eps, **options,
    )  # fmt: skip
    u = inputs(2, 19, 20)
    with torch.no_grad(), in_float64():
        want = theirs(u)
    ours.check(u, want, 1e-9)


@given(SELECTIVE, st.sampled_from([1, 2]))
@FEW_EXAMPLES
def test_mamba_is_jambas(in_float64, options, expand):
    names = {
        "state_size": "mamba_d_state", "time_step_rank": "mamba_dt_rank", "conv_kernel": "mamba_d_conv",
        "use_bias": "mamba_proj_bias", "use_conv_bias": "mamba_conv_bias", "hidden_act": "hidden_act",
    }  # fmt: skip
    config = JambaConfig(
        **{names[name]: value for name, value in options.items()},
        hidden_size=20,
        mamba_expand=expand,
        rms_norm_eps=1e-2,
    )
    theirs = randomise(JambaMambaMixer(config, 0).double())
    weights = {name.replace("_layernorm", "_norm"): tensor for name, tensor in theirs.state_dict().items()}
    weights = {name.replace("b_norm", "B_norm").replace("c_norm", "C_norm"): t for name, t in weights.items()}
    options["mamba_hidden_act"] = options.pop("hidden_act")
    ours = OneMixer(
        "mamba", weights, hidden_size=20, expand=expand, mixer_norm="learned", mixer_rms_eps=1e-2, **options
    )
    u = inputs(2, 19, 20)
    with torch.no_grad(), in_float64():
        want = theirs(u)
    ours.check(u, want, 1e-9)


# ---------------------------------------------------------------------------- against recordings


def hmf_cases():
    return ["mamba2_tied", "mamba2_untied", "mamba2_posemb_noqknorm_tiedemb", "mamba2_fused_stage0"]


@pytest.mark.parametrize("case", hmf_cases())
def test_mixers_of_the_authors_checkpoints(shared, case):
    folder = shared / "golden" / "hmf" / case
    theirs, recorded = json.loads((folder / "config.json").read_text()), load_file(folder / "io.safetensors")
    tensors = load_file(folder / "model.safetensors")
    heads, head_dim = theirs["num_attention_heads"], theirs["head_dim"]
    fields = {
        "hidden_size": theirs["hidden_size"],
        "head_dim": head_dim,
        "rope_parameters": theirs["rope_parameters"],
        "rms_norm_eps": theirs["rms_norm_eps"],
        "mamba_num_heads": heads,
        "mamba_head_dim": head_dim,
        "mamba_num_key_value_heads": theirs["num_key_value_heads"],
        "n_groups": heads,
        "state_size": head_dim,
        "mixer_norm": "learned" if theirs["mamba2_config"]["use_qk_norm"] else None,
        "mamba_use_pos_emb": theirs["mamba2_config"]["use_pos_emb"],
        "mamba_norm_eps": 1e-5,
    }
    layers = [name.split(".")[1] for name in recorded if name.endswith(".fading")]
    assert layers
    for layer in layers:
        prefix = f"model.layers.{layer}.bmojo_f.mamba."
        weights = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        u, want = recorded[f"layers.{layer}.mixer_input"], recorded[f"layers.{layer}.fading"]
        mixer = OneMixer("mamba2", weights, **fields)
        mixer.check(u, want, 1e-5)
        wrong = OneMixer("mamba2", weights, **(fields | {"mamba_norm_eps": 1e-3}))
        with torch.no_grad():
            assert rel_error(wrong(u), want) > 1e-4


def native_fields(theirs: dict) -> dict:
    """Our fields for the mixers of a native checkpoint."""
    given, width = theirs["ssm_cfg"], theirs["d_model"]
    inner = int(given.get("expand", 2) * width)
    fields = {
        "hidden_size": width,
        "rms_norm_eps": 1e-5,
        "use_bias": given.get("bias", False),
        "use_conv_bias": given.get("conv_bias", True),
        "conv_kernel": given.get("d_conv", 4),
    }
    if given.get("layer", "Mamba1") == "Mamba1":
        rank = given.get("dt_rank", "auto")
        return fields | {
            "state_size": given.get("d_state", 16),
            "mamba_intermediate_size": inner,
            "time_step_rank": None if rank == "auto" else rank,
        }
    head_dim = given.get("headdim", 64)
    channels = given.get("d_ssm") or inner
    return fields | {
        "state_size": given.get("d_state", 128),
        "mamba_head_dim": head_dim,
        "mamba_num_heads": channels // head_dim,
        "mamba_d_mlp": inner - channels,
        "n_groups": given.get("ngroups", 1),
        "D_has_hdim": given.get("D_has_hdim", False),
        "mamba_rms_norm": given.get("rmsnorm", True),
        "mamba_norm_before_gate": given.get("norm_before_gate", False),
        "time_step_limit": given.get("dt_limit"),
    }


@pytest.mark.parametrize("case", ["mamba1", "mamba1_options", "mamba2", "mamba2_hybrid", "mamba2_options"])
def test_mixers_of_native_checkpoints(shared, case):
    """Outputs, and the state after the last token."""
    folder = shared / "golden" / "mamba_native" / case
    theirs, recorded = json.loads((folder / "config.json").read_text()), load_file(folder / "io.safetensors")
    tensors = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    kind = "mamba" if theirs["ssm_cfg"].get("layer", "Mamba1") == "Mamba1" else "mamba2"
    layers = [int(name.split(".")[1]) for name in recorded if name.startswith("ssm_state.")]
    assert layers
    for layer in layers:
        block = f"backbone.layers.{layer}."
        own = {name.removeprefix(block): tensor for name, tensor in tensors.items() if name.startswith(block)}
        weights = {name.removeprefix("mixer."): tensor for name, tensor in own.items() if name.startswith("mixer.")}
        u = recorded[f"hidden.{layer}"]
        if theirs["rms_norm"]:
            u = F.rms_norm(u, u.shape[-1:], own["norm.weight"], 1e-5)
        else:
            u = F.layer_norm(u, u.shape[-1:], own["norm.weight"], own["norm.bias"], 1e-5)
        state = OneMixer(kind, weights, **native_fields(theirs)).check(u, recorded[f"mixer_out.{layer}"], 1e-5)
        assert rel_error(state["ssm"], recorded[f"ssm_state.{layer}"]) < 1e-5
        assert rel_error(state["conv"].transpose(1, 2), recorded[f"conv_state.{layer}"][..., 1:]) < 1e-5
