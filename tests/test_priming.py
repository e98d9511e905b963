"""Priming: attention layers become B'MOJO layers that start from the original's answers."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bmojo.convert import Refusal, convert
from bmojo.modeling_bmojo import BMojoForCausalLM


WINDOW = 5
SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "initializer_range": 0.2,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "biased": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=WINDOW)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
}


def silently(source, destination, **options):
    return convert(source, destination, progress=False, say=lambda line: None, **options)


def load(folder, **options):
    return BMojoForCausalLM.from_pretrained(folder, dtype=torch.float64, **options).eval()


@pytest.fixture(scope="module", params=MODELS)
def source(request, tmp_path_factory):
    """A tiny Transformer, every parameter random, and its folder."""
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(0.3 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("priming") / "source"
    model.save_pretrained(folder)
    return model.double(), folder


@pytest.fixture(scope="module")
def primed(source, tmp_path_factory):
    return silently(
        source[1], tmp_path_factory.mktemp("primed") / "result", to_bmojo=True, window=WINDOW, eidetic=3, verify=True
    )


IDS = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_within_the_window_nothing_changes(source, primed):
    want = source[0](IDS[:, :WINDOW], use_cache=False).logits
    assert torch.allclose(load(primed)(IDS[:, :WINDOW], use_cache=False).logits, want, rtol=0, atol=2e-6)


@torch.no_grad()
def test_without_its_new_memories_it_is_the_sliding_window_model(source, primed, tmp_path):
    """Of the same weights: as transformers' Mistral where it has such options, and as layers of ours with a window."""
    model = load(primed, eidetic_size=0)
    beyond = model(IDS, use_cache=False).logits
    for layer in model.model.layers:
        layer.mixer.fades = False  # masks the fading span; a configuration with neither memory would be refused
    got = model(IDS, use_cache=False).logits
    assert not torch.allclose(got, beyond, atol=1e-3)

    slides = silently(source[1], tmp_path / "slides") if "mistral" in type(source[0]).__name__.lower() else None
    if slides is None:
        slides = silently(source[1], tmp_path / "full")
        fields = json.loads((slides / "config.json").read_text())
        fields |= {"layers_block_type": ["sliding_attention"] * 4, "sliding_window": WINDOW}
        (slides / "config.json").write_text(json.dumps(fields))
    assert torch.allclose(got, load(slides)(IDS, use_cache=False).logits, rtol=0, atol=1e-12)

    theirs = source[0]
    if type(theirs) is LlamaForCausalLM and not theirs.config.attention_bias:
        theirs = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=WINDOW)).double().eval()
        theirs.load_state_dict(source[0].state_dict())
    if type(theirs) is MistralForCausalLM:
        assert torch.allclose(got, theirs(IDS, use_cache=False).logits, rtol=0, atol=2e-6)


def test_the_fading_memory_comes_from_attention(source, primed):
    old, new = source[0].state_dict(), load_file(primed / "model.safetensors")
    heads, keys, depth = 4, 2, 10
    inner, grouped = heads * depth, keys * depth
    for layer in range(4):
        there, here = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mixer."
        query, key, value, output = (old[f"{there}{name}_proj.weight"].float() for name in "qkvo")
        for name, tensor in zip("qkvo", (query, key, value, output), strict=True):
            assert torch.equal(new[f"{here}{name}_proj.weight"], tensor)
        gate, x, B, C, dt = new[f"{here}fading.in_proj.weight"].split([inner, grouped, grouped, inner, heads])
        assert torch.equal(x, value)
        assert torch.equal(B, key)
        assert torch.equal(C, query)
        assert 0 < dt.std() < 1
        assert torch.equal(new[f"{here}fading.out_proj.weight"], output)
        repeated = value.view(keys, 1, depth, -1).expand(keys, heads // keys, depth, -1).reshape(inner, -1)
        assert torch.allclose(gate, (output.T + repeated) / 2)
        taps = new[f"{here}fading.conv1d.weight"][:, 0]
        assert (taps[:, -1] == 1).all()
        assert (taps[:, :-1] == 0).all()
        if f"{there}q_norm.weight" in old:
            assert torch.equal(new[f"{here}fading.C_norm.weight"], old[f"{there}q_norm.weight"].float())
            assert torch.equal(new[f"{here}fading.B_norm.weight"], old[f"{there}k_norm.weight"].float())
        if f"{there}q_proj.bias" in old:
            biases = new[f"{here}fading.in_proj.bias"].split([inner, grouped, grouped, inner, heads])
            for got, name in zip(biases[1:4], "vkq", strict=True):
                assert torch.equal(got, old[f"{there}{name}_proj.bias"].float())
            repeated = old[f"{there}v_proj.bias"].float().view(keys, 1, depth).expand(keys, heads // keys, depth)
            assert torch.equal(biases[0], repeated.flatten() / 2)
            assert (biases[4] == 0).all()
        assert (new[f"{here}fading.dynamics.A_log"] >= 0).all()
        assert new[f"{here}fading.dynamics.dt_bias"].std() > 0


def test_training_reaches_every_parameter(primed):
    model = load(primed).train()
    model(IDS, labels=IDS).loss.backward()
    still = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0]
    assert not still


def test_a_folder_of_ours_primes_to_the_same(source, primed, tmp_path):
    ours = silently(source[1], tmp_path / "ours")
    again = silently(ours, tmp_path / "again", to_bmojo=True, window=WINDOW, eidetic=3, verify=True)
    for name in ("model.safetensors", "config.json"):
        assert (again / name).read_bytes() == (primed / name).read_bytes()


@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.integers(0, 3), min_size=1, max_size=5), st.sampled_from(["bfloat16", "float32"]))
def test_chosen_layers(tmp_path_factory, source, layers, dtype):
    folder = tmp_path_factory.mktemp("chosen")
    given_window = {} if "mistral" in type(source[0]).__name__.lower() else {"window": WINDOW}
    result = silently(source[1], folder / "result", to_bmojo=True, layers=layers, dtype=dtype, **given_window)
    config = json.loads((result / "config.json").read_text())
    assert [layer for layer, kind in enumerate(config["layers_block_type"]) if kind == "bmojo"] == sorted(set(layers))
    assert (config["sliding_window"], config["eidetic_size"]) == (WINDOW, 256)
    for name, tensor in load_file(result / "model.safetensors").items():
        wanted = "float32" if "dynamics" in name else dtype
        assert str(tensor.dtype) == f"torch.{wanted}"


def test_every_second_layer_and_the_default_window(tmp_path, source, capsys):
    if type(source[0]) is MistralForCausalLM:
        pytest.skip("the default window is Mistral's own")
    convert(source[1], tmp_path / "result", to_bmojo=True, every=2, progress=False)
    assert "B'MOJO layers are 0, 2: window 2048, eidetic memory 256." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"layers": [4]}, "names 4; the model has layers 0 to 3"),
        ({"layers": []}, "names no layer"),
        ({"layers": [1], "every": 2}, "exclude each other"),
        ({"every": 0}, "at least 1"),
        ({"window": 0}, "sliding_window is 0"),
        ({"eidetic": -1}, "eidetic_size is -1"),
    ],
)
def test_options_that_do_not_fit(source, tmp_path, options, told):
    with pytest.raises(Refusal, match=told):
        silently(source[1], tmp_path / "result", to_bmojo=True, **options)


def test_sliding_layers_that_stay_fix_the_window(tmp_path):
    torch.manual_seed(0)
    MODELS["mistral"]().save_pretrained(tmp_path / "source")
    with pytest.raises(Refusal, match="a model has one window"):
        silently(tmp_path / "source", tmp_path / "result", to_bmojo=True, layers=[0], window=WINDOW + 1)
    silently(tmp_path / "source", tmp_path / "result", to_bmojo=True, window=WINDOW + 1, verify=True)


@pytest.mark.parametrize("kind", ["mamba2", "bmojo"])
def test_only_transformers_are_primed(tiny_model, tmp_path, kind):
    tiny_model(layers_block_type=["full_attention", kind]).save_pretrained(tmp_path / "source")
    with pytest.raises(Refusal, match=f"the model has {kind} layers"):
        silently(tmp_path / "source", tmp_path / "result", to_bmojo=True)
