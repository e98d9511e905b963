"""Native checkpoints of state-spaces/mamba: recordings of the original, transformers' ports of it, refusals, and the way back.

The recordings lie beside the checkout (`shared/golden/mamba_native`); tests of them skip where they are absent.
"""

import json
import math
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from bmojo.cache_bmojo import BMojoCache
from bmojo.configuration_bmojo import BMojoConfig
from bmojo.convert import Refusal, convert
from bmojo.convert.core import assemble
from bmojo.convert.native import Native
from bmojo.modeling_bmojo import BMojoForCausalLM


CASES = "mamba1 mamba1_options mamba2 mamba2_attnconv mamba2_hybrid mamba2_options transformerpp".split()
FORM = Native()
FLAG = st.booleans()
SMALL = {"vocab_size": 37, "n_layer": 2, "pad_vocab_size_multiple": 8}


def silently(source, destination, **options):
    return convert(source, destination, progress=False, say=lambda line: None, **options)


def rel_error(got, want) -> float:
    assert got.shape == want.shape
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def model_of(config: dict, weights: dict[str, torch.Tensor]) -> BMojoForCausalLM:
    """Our model in float64, of a native config.json and state dict."""
    ours = {
        name: assemble(pieces, lambda piece: weights[piece.name][piece.start : piece.stop].double())
        for name, pieces in FORM.tensors(config).items()
    }
    model = BMojoForCausalLM(BMojoConfig(**FORM.to_bmojo(config))).double().eval()
    missing, unexpected = model.load_state_dict(ours, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if config["tie_embeddings"] else [])
    return model


def random_weights(config: dict, seed: int) -> dict[str, torch.Tensor]:
    """A native state dict in which nothing hides behind a 0 or a 1."""
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, shape in FORM.shapes(config).items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.5
        weights[name] = scale * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return weights


def native_gradients(model, config: dict) -> dict[str, torch.Tensor]:
    """The gradients of our parameters under native names."""
    parts = {}
    parameters = dict(model.named_parameters())
    for name, pieces in FORM.tensors(config).items():
        (piece,) = pieces
        parts.setdefault(piece.name, []).append((piece.start, parameters[name].grad))
    return {name: torch.cat([grad for _, grad in sorted(found, key=lambda x: x[0])]) for name, found in parts.items()}


# ---------------------------------------------------------------------------- recordings of the original


@pytest.fixture(scope="module", params=CASES)
def case(request, shared, tmp_path_factory):
    """The recorded folder, its conversion, the config.json, and the recording."""
    folder = shared / "golden" / "mamba_native" / request.param
    result = silently(folder, tmp_path_factory.mktemp("native") / request.param)
    config = json.loads((folder / "config.json").read_text())
    return SimpleNamespace(folder=folder, result=result, config=config, recorded=load_file(folder / "io.safetensors"))


def load(case, dtype):
    return BMojoForCausalLM.from_pretrained(case.result, dtype=dtype).eval()


@torch.no_grad()
def test_logits_are_the_recorded_ones(case):
    """In one call, token by token and in pieces; the padding of the vocabulary has its logits, too."""
    ids = case.recorded["input_ids"]
    for dtype, suffix, tolerance in ((torch.float64, "_f64", 1e-10), (torch.float32, "", 1e-5)):
        model, want = load(case, dtype), case.recorded[f"logits{suffix}"]
        assert rel_error(model(ids, use_cache=False).logits, want) <= tolerance
        if dtype is torch.float32:
            want = case.recorded["logits_recurrent"]
        for sizes in ([1] * ids.shape[1], [7, 1, 1, 5, ids.shape[1] - 14]):
            cache = BMojoCache(model.config)
            logits = [model(piece, cache=cache).logits for piece in ids.split(sizes, 1)]
            assert rel_error(torch.cat(logits, 1), want) <= tolerance


@torch.no_grad()
def test_hidden_states_and_mixers_are_the_recorded_ones(case):
    model, seen = load(case, torch.float32), {}
    for number, layer in enumerate(model.model.layers):
        layer.mixer.register_forward_hook(
            lambda *hook, number=number: seen.update({f"mixer_out.{number}": hook[2][0]})
        )
    last = f"hidden.{len(model.model.layers)}"
    model.model.norm.register_forward_hook(lambda _, inputs, out: seen.update({last: inputs[0], "hidden.norm_f": out}))
    states = model(case.recorded["input_ids"], use_cache=False, output_hidden_states=True).hidden_states
    seen |= {f"hidden.{number}": state for number, state in enumerate(states[:-1])}
    wanted = {name: tensor for name, tensor in case.recorded.items() if name.startswith(("hidden.", "mixer_out."))}
    assert seen.keys() == wanted.keys()
    for name, want in wanted.items():
        assert rel_error(seen[name], want) <= 1e-5, name


@torch.no_grad()
def test_states_are_the_recorded_ones(case):
    model = load(case, torch.float32)
    cache = BMojoCache(model.config)
    model(case.recorded["input_ids"], cache=cache)
    names = [name for name in case.recorded if name.startswith(("conv_state.", "ssm_state."))]
    assert len(names) == 2 * sum(kind.startswith("mamba") for kind in model.config.layers_block_type)
    for name in names:
        kind, number = name.split("_state.")
        want = case.recorded[name]
        if kind == "conv":  # the oldest of their columns is never read again
            want = want[:, :, 1:].transpose(1, 2)
        assert rel_error(cache.layers[int(number)].state[kind], want) <= 1e-5, name


def test_loss_and_gradients_are_the_recorded_ones(case):
    model, ids = load(case, torch.float32), case.recorded["input_ids"]
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.item() == pytest.approx(case.recorded["loss"].item(), rel=1e-5)
    gradients = native_gradients(model, case.config)
    names = [name for name in case.recorded if name.startswith("grad.")]
    assert names
    for name in names:
        assert rel_error(gradients[name.removeprefix("grad.")], case.recorded[name]) <= 5e-5, name


def test_export_gives_the_same_bits(case, tmp_path):
    back = silently(case.result, tmp_path / "back", export=FORM.name)
    got = load_file(back / "model.safetensors")
    want = torch.load(case.folder / "pytorch_model.bin", weights_only=True)
    if case.config["tie_embeddings"]:
        del want["lm_head.weight"]
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name].view(torch.uint8), tensor.view(torch.uint8)), name
    config = json.loads((back / "config.json").read_text())
    assert FORM.to_bmojo(config) == FORM.to_bmojo(case.config)
    assert config["vocab_size"] == case.config["vocab_size"]
    again = silently(back, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (case.result / "model.safetensors").read_bytes()


def test_the_first_config_json_means_the_same(shared):
    folder = shared / "golden" / "mamba_native" / "mamba1"
    now, then = (json.loads((folder / name).read_text()) for name in ("config.json", "config.legacy.json"))
    assert now != then
    assert FORM.to_bmojo(now) == FORM.to_bmojo(then)


def test_verify_compares_with_the_port(shared, tmp_path):
    said = []
    convert(shared / "golden/mamba_native/mamba2", tmp_path / "out", verify=True, progress=False, say=said.append)
    assert any(line.startswith("Verified on") for line in said)
    convert(
        shared / "golden/mamba_native/mamba2_hybrid", tmp_path / "other", verify=True, progress=False, say=said.append
    )
    assert any("Not verified: transformers has no implementation of this model" in line for line in said)


def test_damaged_tensors_are_refused(shared, tmp_path):
    """A tied head that differs, a tensor too many, one too few, and an embedding of another size."""
    folder = shared / "golden" / "mamba_native" / "mamba1"
    source = torch.load(folder / "pytorch_model.bin", weights_only=True)
    broken = {
        "should repeat backbone.embedding.weight": source | {"lm_head.weight": source["lm_head.weight"] + 1},
        "does not mean: backbone.layers.0.mixer.z": source | {"backbone.layers.0.mixer.z": torch.zeros(3)},
        "lacks 1 tensors .*norm_f.weight": {k: v for k, v in source.items() if "norm_f" not in k},
        "backbone.embedding.weight has shape": {k: v for k, v in source.items() if k != "lm_head.weight"}
        | {"backbone.embedding.weight": source["lm_head.weight"][:-1]},
    }
    for number, (words, weights) in enumerate(broken.items()):
        there = tmp_path / str(number)
        there.mkdir()
        shutil.copyfile(folder / "config.json", there / "config.json")
        save_file({name: tensor.clone() for name, tensor in weights.items()}, there / "model.safetensors")
        with pytest.raises(Refusal, match=words):
            silently(there, tmp_path / "out")
        assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------- transformers' ports


def renamed(weights, *pairs):
    for pattern, new in pairs:
        weights = {re.sub(pattern, new, name): tensor for name, tensor in weights.items()}
    return weights


def split_mlp(weights):
    """fc1 of the MLPs as up_proj and gate_proj, fc2 as down_proj."""
    found = {}
    for name, tensor in weights.items():
        if name.endswith("fc1.weight"):
            value, gate = tensor.chunk(2)
            found |= {name.replace("fc1", "up_proj"): value, name.replace("fc1", "gate_proj"): gate}
        else:
            found[name.replace("fc2", "down_proj")] = tensor
    return found


def split_attention(weights, config):
    """in_proj and out_proj of the attention layers as q_proj, k_proj, v_proj and o_proj of `self_attn`."""
    attention = config["attn_cfg"]
    sizes = [attention["num_heads"] * attention["head_dim"]] + [attention["num_heads_kv"] * attention["head_dim"]] * 2
    found = {}
    for name, tensor in weights.items():
        layer = re.match(r"backbone\.layers\.(\d+)\.mixer", name)
        if not layer or int(layer[1]) not in config["attn_layer_idx"]:
            found[name] = tensor
        elif ".in_proj." in name:
            for part, rows in zip(("q_proj", "k_proj", "v_proj"), tensor.split(sizes), strict=True):
                found[name.replace("mixer.in_proj", f"self_attn.{part}")] = rows
        else:
            found[name.replace("mixer.out_proj", "self_attn.o_proj")] = tensor
    return found


def port(model_class, config, weights):
    """Transformers' model in float64 with these weights."""
    model = model_class(config).double().eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    return model


@st.composite
def skeletons(draw):
    return SMALL | {
        "vocab_size": draw(st.integers(30, 50)),
        "pad_vocab_size_multiple": draw(st.sampled_from([1, 8, 12])),
        "n_layer": draw(st.integers(1, 3)),
        "tie_embeddings": draw(FLAG),
        "residual_in_fp32": False,  # transformers rounds a float64 stream to it
    }


@st.composite
def ssm_options(draw, kind: str):
    found = {
        "layer": kind,
        "d_state": draw(st.integers(1, 9)),
        "d_conv": draw(st.integers(2, 4)),
        "bias": draw(FLAG),
        "conv_bias": draw(FLAG),
        "expand": draw(st.sampled_from([1, 2, 3])),
    }
    if kind == "Mamba1":
        return found | {"dt_rank": draw(st.sampled_from(["auto", 1, 5]))}
    limits = [[0.0, math.inf], [0.02, 0.4], [0.05, math.inf]]
    return found | {
        "headdim": draw(st.sampled_from([2, 4])),
        "ngroups": draw(st.sampled_from([1, 2])),
        "dt_limit": draw(st.sampled_from(limits)),
        "chunk_size": draw(st.sampled_from([3, 256])),
    }


@st.composite
def attention_options(draw):
    heads, head_dim = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([6, 8]))
    return {
        "causal": True,
        "num_heads": heads,
        "num_heads_kv": heads // draw(st.sampled_from([g for g in (1, 2, 4) if heads % g == 0])),
        "head_dim": head_dim,
        "qkv_proj_bias": draw(FLAG),
        "out_proj_bias": draw(FLAG),
        "rotary_emb_dim": draw(st.sampled_from([0, 2, 4, head_dim])),
        "rotary_emb_base": draw(st.sampled_from([100.0, 10000.0])),
    }


@st.composite
def mamba1(draw):
    config = draw(skeletons()) | {"d_model": draw(st.sampled_from([8, 20])), "ssm_cfg": draw(ssm_options("Mamba1"))}
    return config, draw(st.integers(0, 99))


@st.composite
def mamba2(draw):
    config = draw(skeletons()) | {"d_model": draw(st.sampled_from([8, 16])), "ssm_cfg": draw(ssm_options("Mamba2"))}
    return config, draw(st.integers(0, 99))


@st.composite
def hybrid(draw):
    """As Bamba has it: an MLP everywhere, a bias nowhere in attention."""
    config, seed = draw(mamba2())
    attention = draw(attention_options()) | {"qkv_proj_bias": False, "out_proj_bias": False}
    attention["rotary_emb_dim"] = max(2, attention["rotary_emb_dim"])
    layers = draw(st.sets(st.integers(0, config["n_layer"] - 1), min_size=1))
    return config | {"attn_layer_idx": sorted(layers), "attn_cfg": attention, "d_intermediate": 60}, seed


@st.composite
def transformer(draw):
    config, attention = draw(skeletons()), draw(attention_options())
    attention |= {"out_proj_bias": attention["qkv_proj_bias"], "rotary_emb_dim": attention["head_dim"]}
    layers = list(range(config["n_layer"]))
    config |= {"attn_layer_idx": layers, "attn_cfg": attention, "d_intermediate": 130, "d_model": 16}
    return config, draw(st.integers(0, 99))


def vocabulary(config):
    return -(-config["vocab_size"] // config["pad_vocab_size_multiple"]) * config["pad_vocab_size_multiple"]


def as_mamba(config, weights):
    ssm, mamba_1 = config["ssm_cfg"], config["ssm_cfg"]["layer"] == "Mamba1"
    fields = {
        "vocab_size": vocabulary(config),
        "hidden_size": config["d_model"],
        "num_hidden_layers": config["n_layer"],
        "state_size": ssm["d_state"],
        "conv_kernel": ssm["d_conv"],
        "expand": ssm["expand"],
        "use_bias": ssm["bias"],
        "use_conv_bias": ssm["conv_bias"],
        "tie_word_embeddings": config["tie_embeddings"],
        "residual_in_fp32": config["residual_in_fp32"],
        "layer_norm_epsilon": 1e-5,
        "pad_token_id": None,
    }
    weights = renamed(weights, (r"backbone\.embedding\.", "backbone.embeddings."))
    if mamba_1:
        return port(MambaForCausalLM, MambaConfig(**fields, time_step_rank=ssm["dt_rank"]), weights)
    fields |= {
        "head_dim": ssm["headdim"],
        "num_heads": ssm["expand"] * config["d_model"] // ssm["headdim"],
        "n_groups": ssm["ngroups"],
        "time_step_limit": tuple(ssm["dt_limit"]),
    }
    return port(Mamba2ForCausalLM, Mamba2Config(**fields), weights)


SKELETON = (
    (r"backbone\.embedding\.", "model.embed_tokens."),
    (r"backbone\.layers", "model.layers"),
    (r"\.norm\.(weight)$", r".input_layernorm.\1"),
)


def as_bamba(config, weights):
    ssm, attention = config["ssm_cfg"], config["attn_cfg"]
    theirs = BambaConfig(
        vocab_size=vocabulary(config),
        hidden_size=config["d_model"],
        intermediate_size=128,
        num_hidden_layers=config["n_layer"],
        attn_layer_indices=config["attn_layer_idx"],
        num_attention_heads=attention["num_heads"],
        num_key_value_heads=attention["num_heads_kv"],
        head_dim=attention["head_dim"],
        rope_parameters={
            "rope_type": "default",
            "rope_theta": attention["rotary_emb_base"],
            "partial_rotary_factor": attention["rotary_emb_dim"] / attention["head_dim"],
        },
        mamba_n_heads=ssm["expand"] * config["d_model"] // ssm["headdim"],
        mamba_d_head=ssm["headdim"],
        mamba_n_groups=ssm["ngroups"],
        mamba_d_state=ssm["d_state"],
        mamba_d_conv=ssm["d_conv"],
        mamba_expand=ssm["expand"],
        mamba_conv_bias=ssm["conv_bias"],
        mamba_proj_bias=ssm["bias"],
        time_step_limit=tuple(ssm["dt_limit"]),
        tie_word_embeddings=config["tie_embeddings"],
        rms_norm_eps=1e-5,
        pad_token_id=None,
    )
    weights = renamed(
        split_mlp(split_attention(weights, config)),
        (r"\.mixer\.", ".mamba."),
        (r"\.mamba\.norm\.", ".mamba.gated."),  # out of the way of the norm of the block
        *SKELETON,
        (r"\.mamba\.gated\.", ".mamba.norm."),
        (r"backbone\.norm_f", "model.final_layernorm"),
        (r"\.norm2\.", ".pre_ff_layernorm."),
        (r"\.mlp\.", ".feed_forward."),
    )
    return port(BambaForCausalLM, theirs, weights)


def as_llama(config, weights):
    attention = config["attn_cfg"]
    theirs = LlamaConfig(
        vocab_size=vocabulary(config),
        hidden_size=config["d_model"],
        intermediate_size=256,
        num_hidden_layers=config["n_layer"],
        num_attention_heads=attention["num_heads"],
        num_key_value_heads=attention["num_heads_kv"],
        head_dim=attention["head_dim"],
        rope_parameters={"rope_type": "default", "rope_theta": attention["rotary_emb_base"]},
        attention_bias=attention["qkv_proj_bias"],
        tie_word_embeddings=config["tie_embeddings"],
        rms_norm_eps=1e-5,
        pad_token_id=None,
    )
    weights = renamed(
        split_mlp(split_attention(weights, config)),
        *SKELETON,
        (r"backbone\.norm_f", "model.norm"),
        (r"\.norm2\.", ".post_attention_layernorm."),
    )
    return port(LlamaForCausalLM, theirs, weights)


@pytest.mark.parametrize(
    ("kind", "as_theirs"), [(mamba1, as_mamba), (mamba2, as_mamba), (hybrid, as_bamba), (transformer, as_llama)]
)
def test_any_options_are_what_the_port_computes(kind, as_theirs):
    @settings(max_examples=20, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(kind())
    def check(drawn):
        config, seed = drawn
        weights = random_weights(config, seed)
        theirs, ours = as_theirs(config, weights), model_of(config, weights)
        ids = torch.randint(vocabulary(config), (2, 21), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            want = theirs(ids, use_cache=False).logits
            assert rel_error(ours(ids, use_cache=False).logits, want) <= 5e-6  # float32 inside of transformers
            cache = BMojoCache(ours.config)
            pieces = [ours(piece, cache=cache).logits for piece in ids.split([8, 1, 1, 11], 1)]
            assert rel_error(torch.cat(pieces, 1), want) <= 5e-6
        assert FORM.to_bmojo(FORM.from_bmojo(ours.config)) == FORM.to_bmojo(config)

    check()


# ---------------------------------------------------------------------------- what no port has


def native_attention(attention: dict, weights: dict[str, torch.Tensor], u: torch.Tensor) -> torch.Tensor:
    """The attention of state-spaces/mamba by its formulas, loop over tokens; u (seq_len, d_model)."""
    heads, kv_heads, head_dim = attention["num_heads"], attention["num_heads_kv"], attention["head_dim"]
    joint = linear(weights, "in_proj", u)
    if attention["d_conv"]:
        joint = short_convolution(weights, joint)
    query, key, value = joint.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], -1)

    def turn(x, t):
        x, size = x.clone(), attention["rotary_emb_dim"]
        for i in range(size // 2):
            angle = t * attention["rotary_emb_base"] ** (-2 * i / size)
            a, b = (2 * i, 2 * i + 1) if attention["rotary_emb_interleaved"] else (i, i + size // 2)
            first, second = x[:, a].clone(), x[:, b].clone()
            x[:, a] = first * math.cos(angle) - second * math.sin(angle)
            x[:, b] = first * math.sin(angle) + second * math.cos(angle)
        return x

    query = torch.stack([turn(x.view(heads, head_dim), t) for t, x in enumerate(query)])
    key = torch.stack([turn(x.view(kv_heads, head_dim), t) for t, x in enumerate(key)])
    value = value.view(-1, kv_heads, head_dim)
    scale = attention["softmax_scale"] or head_dim**-0.5
    out = []
    for t in range(len(u)):
        for head in range(heads):
            group = head // (heads // kv_heads)
            scores = (key[: t + 1, group] @ query[t, head]) * scale
            out.append(scores.softmax(0) @ value[: t + 1, group])
    return linear(weights, "out_proj", torch.cat(out).view(len(u), heads * head_dim))


def native_mamba1(ssm: dict, weights: dict[str, torch.Tensor], u: torch.Tensor) -> torch.Tensor:
    x, z = linear(weights, "in_proj", u).chunk(2, -1)
    x = F.silu(short_convolution(weights, x))
    rank = weights["dt_proj.weight"].shape[1]
    low, B, C = (x @ weights["x_proj.weight"].T).split([rank, ssm["d_state"], ssm["d_state"]], -1)
    dt, A = F.softplus(linear(weights, "dt_proj", low)), -weights["A_log"].exp()
    h, out = torch.zeros_like(A), []
    for t in range(len(u)):
        h = (dt[t, :, None] * A).exp() * h + (dt[t] * x[t])[:, None] * B[t]
        out.append((h @ C[t] + weights["D"] * x[t]) * F.silu(z[t]))
    return linear(weights, "out_proj", torch.stack(out))


def native_mamba2(ssm: dict, weights: dict[str, torch.Tensor], u: torch.Tensor) -> torch.Tensor:
    heads, P, N, G = len(weights["A_log"]), ssm["headdim"], ssm["d_state"], ssm["ngroups"]
    dS = heads * P
    dM = weights["out_proj.weight"].shape[1] - dS
    z0, x0, z, x, B, C, dt = linear(weights, "in_proj", u).split([dM, dM, dS, dS, G * N, G * N, heads], -1)
    x, B, C = F.silu(short_convolution(weights, torch.cat([x, B, C], -1))).split([dS, G * N, G * N], -1)
    dt, A = F.softplus(dt + weights["dt_bias"]).clamp(*ssm["dt_limit"]), -weights["A_log"].exp()
    D = weights["D"].view(heads, P) if ssm["D_has_hdim"] else weights["D"][:, None]
    h, out = torch.zeros(heads, P, N, dtype=u.dtype), []
    for t in range(len(u)):
        x_t = x[t].view(heads, P)
        B_t, C_t = (y[t].view(G, N).repeat_interleave(heads // G, 0) for y in (B, C))
        h = (dt[t] * A).exp()[:, None, None] * h + dt[t, :, None, None] * x_t[..., None] * B_t[:, None]
        y = ((h * C_t[:, None]).sum(-1) + D * x_t).view(dS)
        if ssm["rmsnorm"]:
            y = y if ssm["norm_before_gate"] else y * F.silu(z[t])
            groups = y.view(G, dS // G)
            y = (groups / (groups.square().mean(-1, keepdim=True) + 1e-5).sqrt()).view(dS) * weights["norm.weight"]
        if not ssm["rmsnorm"] or ssm["norm_before_gate"]:
            y = y * F.silu(z[t])
        out.append(torch.cat([F.silu(z0[t]) * x0[t], y]))
    return linear(weights, "out_proj", torch.stack(out))


def linear(weights, name: str, x):
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def short_convolution(weights, x):
    """Depthwise over time, zeros before the start; the last tap is for the current token."""
    kernel = weights["conv1d.weight"][:, 0].T
    taps = len(kernel)
    padded = torch.cat([torch.zeros(taps - 1, x.shape[1], dtype=x.dtype), x])
    convolved = torch.stack([(kernel * padded[t : t + taps]).sum(0) for t in range(len(x))])
    return convolved + weights.get("conv1d.bias", 0.0)


def native_model(config: dict, weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Logits of a native model by its formulas; every option is given."""

    def norm(name, x):
        if config["rms_norm"]:
            return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[f"{name}.weight"]
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    x = weights["backbone.embedding.weight"][ids]
    for i in range(config["n_layer"]):
        at = f"backbone.layers.{i}."
        mixer = {name.removeprefix(f"{at}mixer."): w for name, w in weights.items() if name.startswith(f"{at}mixer.")}
        u, ssm = norm(f"{at}norm", x), config["ssm_cfg"]
        if i in config["attn_layer_idx"]:
            x = x + native_attention(config["attn_cfg"], mixer, u)
        else:
            x = x + (native_mamba1 if ssm["layer"] == "Mamba1" else native_mamba2)(ssm, mixer, u)
        if config["d_intermediate"]:
            value, gate = (norm(f"{at}norm2", x) @ weights[f"{at}mlp.fc1.weight"].T).chunk(2, -1)
            x = x + (value * F.silu(gate)) @ weights[f"{at}mlp.fc2.weight"].T
    head = weights["backbone.embedding.weight" if config["tie_embeddings"] else "lm_head.weight"]
    return norm("backbone.norm_f", x) @ head.T


@st.composite
def anything(draw):
    """Every option that the format has, in any layer."""
    config, attention = draw(skeletons()), draw(attention_options())
    attention |= {
        "rotary_emb_interleaved": draw(FLAG),
        "softmax_scale": draw(st.sampled_from([None, 0.5, 1.25])),
        "d_conv": draw(st.sampled_from([0, 1, 2, 4])),
    }
    ssm = draw(ssm_options(draw(st.sampled_from(["Mamba1", "Mamba2"]))))
    ssm["expand"] = draw(st.sampled_from([1, 2, 1.5, 2.34]))
    d_model = draw(st.sampled_from([8, 12]))
    if ssm["layer"] == "Mamba2":
        total = int(ssm["expand"] * d_model)
        ssm["headdim"] = draw(st.sampled_from([1, 2]))
        ssm["d_ssm"] = draw(st.sampled_from([8, 4, total - total % 4]))
        ssm |= {name: draw(FLAG) for name in ("D_has_hdim", "rmsnorm", "norm_before_gate")}
    layers = draw(st.sets(st.integers(0, config["n_layer"] - 1)))
    config |= {"attn_layer_idx": sorted(layers), "attn_cfg": attention, "ssm_cfg": ssm, "d_model": d_model}
    config |= {"rms_norm": draw(FLAG), "d_intermediate": draw(st.sampled_from([0, 1, 128])), "residual_in_fp32": True}
    return config, draw(st.integers(0, 99))


@settings(max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(anything())
def test_any_model_is_what_its_formulas_say(drawn):
    config, seed = drawn
    weights = random_weights(config, seed)
    ours, ids = model_of(config, weights), torch.randint(30, (1, 14), generator=torch.Generator().manual_seed(seed))
    want = native_model(config, weights, ids[0])
    with torch.no_grad():
        assert rel_error(ours(ids, use_cache=False).logits[0], want) <= 1e-10
        cache = BMojoCache(ours.config)
        pieces = [ours(piece, cache=cache).logits for piece in ids.split([3, 1, 1, 1, 8], 1)]
        assert rel_error(torch.cat(pieces, 1)[0], want) <= 1e-10
    again = FORM.from_bmojo(ours.config)
    assert FORM.to_bmojo(again) == FORM.to_bmojo(config)
    assert FORM.shapes(again) == FORM.shapes(config)


@pytest.mark.parametrize(
    ("expand", "d_model", "inner"), [(1.5, 10, 15), (0.7, 10, 7), (1.3, 7, 9), (2.0, 8, 16), (2.9999, 10, 29)]
)
def test_a_fraction_for_expand_is_rounded_down(expand, d_model, inner):
    config = SMALL | {"d_model": d_model, "ssm_cfg": {"expand": expand}}
    ours = BMojoConfig(**FORM.to_bmojo(config))
    model = BMojoForCausalLM(ours)
    assert model.model.layers[0].mixer.out_proj.in_features == inner
    assert FORM.shapes(config) == FORM.shapes(FORM.from_bmojo(ours))


def test_d_ssm_leaves_an_mlp_branch():
    config = SMALL | {"d_model": 16, "ssm_cfg": {"layer": "Mamba2", "d_ssm": 24, "headdim": 4, "expand": 1.75}}
    ours = BMojoConfig(**FORM.to_bmojo(config))
    assert (ours.mamba_d_mlp, ours.mamba_num_heads) == (4, 6)
    assert FORM.shapes(config) == FORM.shapes(FORM.from_bmojo(ours))


# ---------------------------------------------------------------------------- recognition and refusals


def test_recognition(tmp_path):
    native = {"d_model": 8, "n_layer": 1, "vocab_size": 10}
    assert FORM.recognises(native, tmp_path)
    assert not FORM.recognises(native | {"model_type": "mamba", "ssm_cfg": {}}, tmp_path)  # state-spaces/mamba-130m-hf
    assert not FORM.recognises({"d_model": 8, "vocab_size": 10}, tmp_path)


MAMBA2 = {"ssm_cfg": {"layer": "Mamba2", "headdim": 8}}
CAUSAL = {"causal": True, "num_heads": 2}
REFUSED = [
    ({"moe_cfg": {}}, "moe_cfg"),
    ({"norm_epsilon": 1e-6}, "norm_epsilon = 1e-06"),
    ({"d_model": "16"}, "d_model is '16'; it must be a whole number"),
    ({"d_model": True}, "d_model is True"),
    ({"n_layer": 0}, "n_layer is 0"),
    ({"n_layer": 10**9}, "n_layer is 1000000000; it must be at most 10000"),
    ({"vocab_size": -5}, "vocab_size is -5"),
    ({"vocab_size": None}, "vocab_size is None"),
    ({"ssm_cfg": None}, "ssm_cfg is None; it must be an object"),
    ({"rms_norm": "yes"}, "rms_norm is 'yes'; it must be true or false"),
    ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple is 0"),
    ({"attn_layer_idx": [2], "attn_cfg": CAUSAL}, r"attn_layer_idx is \[2\]; .* different numbers below n_layer 2"),
    ({"attn_layer_idx": [0, 0], "attn_cfg": CAUSAL}, "different numbers"),
    ({"attn_layer_idx": [-1], "attn_cfg": CAUSAL}, r"attn_layer_idx is \[-1\]; it must be a list of whole numbers"),
    ({"attn_layer_idx": [0]}, "no attn_cfg.num_heads"),
    ({"attn_layer_idx": [0], "attn_cfg": {"num_heads": 2}}, "attn_cfg.causal is False; it must be true"),
    *(
        ({"attn_layer_idx": [0], "attn_cfg": CAUSAL | change}, words)
        for change, words in (
            ({"mlp_dim": 256}, "attn_cfg.mlp_dim is 256; it must be 0"),
            ({"num_heads": 3}, "attn_cfg.num_heads is 3; it must be a divisor of 16"),
            ({"num_heads_kv": 3}, "attn_cfg.num_heads_kv is 3; it must be a divisor of num_heads 2"),
            ({"rotary_emb_dim": 3}, "attn_cfg.rotary_emb_dim is 3; it must be even"),
            ({"rotary_emb_dim": 10}, "attn_cfg.rotary_emb_dim is 10; it must be even, and at most head_dim 8"),
            ({"rotary_emb_base": 0}, "attn_cfg.rotary_emb_base is 0; it must be a positive number"),
            ({"softmax_scale": -1.0}, "attn_cfg.softmax_scale is -1.0; it must be null or a positive number"),
            ({"head_dim": 2.5}, "attn_cfg.head_dim is 2.5"),
            ({"window_size": 128}, "attn_cfg.window_size = 128"),
        )
    ),
    ({"ssm_cfg": {"layer": "Mamba3"}}, "ssm_cfg.layer is 'Mamba3'; it must be 'Mamba1' or 'Mamba2'"),
    ({"ssm_cfg": {"headdim": 8}}, "ssm_cfg.headdim = 8"),  # Mamba1 has none
    ({"ssm_cfg": {"dt_rank": "automatic"}}, "ssm_cfg.dt_rank is 'automatic'"),
    ({"ssm_cfg": {"expand": 0.01}}, "ssm_cfg.expand is 0.01"),
    *(
        ({"ssm_cfg": MAMBA2["ssm_cfg"] | change}, words)
        for change, words in (
            ({"headdim": 5}, "ssm_cfg.headdim is 5; it must be a divisor of the 32 channels"),
            ({"ngroups": 3}, "ssm_cfg.ngroups is 3; it must be a divisor of the 4 heads"),
            ({"d_ssm": 64}, "ssm_cfg.d_ssm is 64; it must be null or a number from 1 to 32"),
            ({"dt_limit": [0.5, 0.1]}, r"ssm_cfg.dt_limit is \[0.5, 0.1\]; it must be two ascending numbers"),
            ({"dt_limit": [math.nan, 1.0]}, "ssm_cfg.dt_limit is"),
            ({"qk_norm": True}, "ssm_cfg.qk_norm = True"),
        )
    ),
]


@pytest.mark.parametrize(("change", "words"), REFUSED)
def test_what_is_no_native_model_is_refused_by_name(change, words):
    with pytest.raises(Refusal, match=words):
        FORM.to_bmojo({"d_model": 16, "n_layer": 2, "vocab_size": 37} | change)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"layers_block_type": ["mamba", "mamba2"]}, "layers_block_type has 'mamba', 'mamba2'"),
        ({"layers_block_type": ["bmojo"] * 2}, "layers_block_type has 'bmojo'"),
        ({"layers_block_type": ["sliding_attention"] * 2}, "layers_block_type has 'sliding_attention'"),
        ({"layers_block_type": ["mamba"] * 2, "intermediate_size": 40}, "intermediate_size is 40"),
        ({"layers_block_type": ["mamba"] * 2, "intermediate_size": 128}, "rms_norm_eps is 1e-06"),
        ({"layers_block_type": ["full_attention"] * 2, "use_qk_norm": True}, "use_qk_norm is True"),
        ({"layers_block_type": ["full_attention"] * 2, "key_multiplier": 0.5}, "key_multiplier is 0.5"),
        ({"layers_block_type": ["full_attention"] * 2, "hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"layers_block_type": ["mamba"] * 2, "lm_head_multiplier": 0.5}, "lm_head_multiplier is 0.5"),
        ({"layers_block_type": ["mamba"] * 2, "mixer_norm": "learned"}, "mixer_norm is 'learned'"),
    ],
)
def test_what_native_has_not_is_refused_by_name(tiny_model, tmp_path, fields, words):
    if "intermediate_size" not in fields:
        fields = fields | {"intermediate_size": 128, "rms_norm_eps": 1e-5}
    tiny_model(**{"initializer_range": 0.1} | fields).save_pretrained(tmp_path / "ours")
    with pytest.raises(Refusal, match=words):
        silently(tmp_path / "ours", tmp_path / "out", export=FORM.name)
    assert not (tmp_path / "out").exists()


def test_a_model_of_ours_goes_there_and_back(tiny_model, tmp_path):
    """Padding of the vocabulary and all: nothing of it began as a native model."""
    kinds = ["mamba2", "full_attention"]
    model = tiny_model(
        layers_block_type=kinds, intermediate_size=128, rms_norm_eps=1e-5, vocab_size=100, unpadded_vocab_size=97
    )
    model.save_pretrained(tmp_path / "ours")
    there = silently(tmp_path / "ours", tmp_path / "there", export=FORM.name)
    assert json.loads((there / "config.json").read_text())["pad_vocab_size_multiple"] == 4
    back = BMojoForCausalLM.from_pretrained(silently(there, tmp_path / "back"))
    assert back.config.unpadded_vocab_size == 97
    weights = back.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
