"""The reference against transformers' own models, and against what can be worked out by hand."""

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bmojo_tests.reference import innovations_of, reference_forward, select


DEFAULTS = {
    "vocab_size": 13,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "use_qk_norm": False,
    "tie_word_embeddings": False,
    "sliding_window": 3,
    "layers_block_type": ["bmojo", "bmojo"],
    "ssm_type": "mamba2",
    "state_size": 5,
    "conv_kernel": 4,
    "expand": 2,
    "mamba_head_dim": 4,
    "mamba_num_heads": 8,
    "n_groups": 2,
    "time_step_rank": 3,
    "time_step_limit": (0.0, float("inf")),
    "mamba_num_key_value_heads": None,
    "mamba_intermediate_size": None,
    "mamba_d_mlp": 0,
    "mamba_hidden_act": "silu",
    "mixer_norm": None,
    "mamba_use_pos_emb": False,
    "mamba_rms_norm": True,
    "mamba_norm_before_gate": False,
    "mamba_norm_eps": None,
    "position_embedding_type": "rope",
    "rope_interleave": False,
    "softmax_scale": None,
    "key_multiplier": 1.0,
    "attention_conv_kernel": 0,
    "rms_norm": True,
    "embedding_multiplier": 1.0,
    "lm_head_multiplier": 1.0,
    "mlp_multipliers": None,
    "attention_in_multiplier": 1.0,
    "attention_out_multiplier": 1.0,
    "ssm_in_multiplier": 1.0,
    "ssm_out_multiplier": 1.0,
    "ssm_multipliers": None,
    "mixer_rms_eps": 1e-06,
    "fading_query": False,
    "use_short_conv": True,
    "use_v_conv": True,
    "use_gate": True,
    "allow_neg_eigval": False,
    "use_alpha_connection": True,
    "use_forgetting_gate": True,
    "use_forgetting_gate_kk": True,
    "use_beta_gate": True,
    "gla_rescale": True,
    "num_iter": 30,
    "ridge_strength": 0.02,
    "kv_proj_rank": None,
    "kv_learnable_residual": False,
    "eidetic_size": 4,
    "eidetic_chunk_size": 5,
    "eidetic_position": "constant",
    "innovation_signal": "ssm_output",
    "innovation_predictor": "average",
    "innovation_kernel": 3,
    "innovation_half_life": None,
    "innovation_loss_coef": 0.5,
    "tie_attn_weights": True,
}


def tiny_config(**changes):
    return SimpleNamespace(**(DEFAULTS | changes))


def random_weights(config, seed=0):
    """A state dict in INTERFACE's names, all of it random: nothing hides behind a 0 or a 1 of an initialisation."""
    generator = torch.Generator().manual_seed(seed)
    hidden, head_dim, n = config.hidden_size, config.head_dim, config.state_size
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    weights = {}

    def add(prefix, **shapes):
        for name, shape in shapes.items():
            tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
            weights[prefix + name.replace("__", ".")] = tensor * (shape[-1] ** -0.5 if len(shape) > 1 else 0.5)

    def add_ssm(prefix, ssm_type):
        if ssm_type == "mamba2":
            heads = config.mamba_num_heads
            d_inner = heads * config.mamba_head_dim
            channels = d_inner + 2 * config.n_groups * n
            add(prefix, in_proj__weight=(d_inner + channels + heads, hidden), norm__weight=(d_inner,))
            add(prefix + "dynamics.", A_log=(heads,), D=(heads,), dt_bias=(heads,))
        else:
            channels = d_inner = config.expand * hidden
            add(prefix, in_proj__weight=(2 * d_inner, hidden), x_proj__weight=(config.time_step_rank + 2 * n, d_inner))
            add(prefix, dt_proj__weight=(d_inner, config.time_step_rank))
            add(prefix + "dynamics.", A_log=(d_inner, n), D=(d_inner,), dt_bias=(d_inner,))
        add(prefix, conv1d__weight=(channels, 1, config.conv_kernel), conv1d__bias=(channels,))
        add(prefix, out_proj__weight=(hidden, d_inner))

    def add_attention(prefix):
        add(prefix, q_proj__weight=(queries, hidden), k_proj__weight=(keys, hidden), v_proj__weight=(keys, hidden))
        add(prefix, o_proj__weight=(hidden, queries))
        if config.use_qk_norm:
            add(prefix, q_norm__weight=(head_dim,), k_norm__weight=(head_dim,))

    add("model.", embed_tokens__weight=(config.vocab_size, hidden), norm__weight=(hidden,))
    for layer_idx, layer_type in enumerate(config.layers_block_type):
        layer, mixer = f"model.layers.{layer_idx}.", f"model.layers.{layer_idx}.mixer."
        add(layer, input_layernorm__weight=(hidden,))
        if layer_type in ("mamba", "mamba2"):
            add_ssm(mixer, layer_type)
        else:
            add_attention(mixer)
        if layer_type == "bmojo":
            add_ssm(mixer + "fading.", config.ssm_type)
            if not config.tie_attn_weights:
                add(mixer, fading_k_proj__weight=(keys, hidden), fading_v_proj__weight=(keys, hidden))
            if config.innovation_predictor == "learnable":
                add(mixer, predictor__weight=(config.innovation_kernel, hidden))
        if config.intermediate_size is not None:
            add(layer, post_attention_layernorm__weight=(hidden,))
            add(layer + "mlp.", gate_proj__weight=(config.intermediate_size, hidden))
            add(layer + "mlp.", up_proj__weight=(config.intermediate_size, hidden))
            add(layer + "mlp.", down_proj__weight=(hidden, config.intermediate_size))
    if not config.tie_word_embeddings:
        add("", lm_head__weight=(config.vocab_size, hidden))
    return weights


def tokens(seq_len, vocab_size=DEFAULTS["vocab_size"], seed=1):
    return torch.randint(vocab_size, (seq_len,), generator=torch.Generator().manual_seed(seed))


def rel_error(got, want):
    """Root mean square error relative to ``want``: one number, whatever the scale."""
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-12)).item()


@torch.no_grad()
def randomized(model, seed=0):
    """The model in float64, with every parameter random and of a size that makes all of them matter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.double().parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale)
    return model.eval()


def renamed(state_dict, *replacements):
    """`state_dict` with its names changed to ours."""
    weights = {}
    for name, tensor in state_dict.items():
        for old, new in replacements:
            name = name.replace(old, new)
        weights[name] = tensor
    return weights


# ---------------------------------------------------------------------------- layers that transformers has as well


@pytest.mark.parametrize("bias", [False, True])
def test_full_attention_is_llama(bias):
    peer = LlamaConfig(
        vocab_size=13,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        attention_bias=bias,
        mlp_bias=bias,
        tie_word_embeddings=bias,
    )
    model = randomized(LlamaForCausalLM(peer))
    config = tiny_config(layers_block_type=["full_attention"] * 2, tie_word_embeddings=bias)
    weights = renamed(model.state_dict(), ("self_attn", "mixer"))
    if bias:
        del weights["lm_head.weight"]
    ids = tokens(20)
    got = reference_forward(config, weights, ids)
    assert rel_error(got.logits, model(ids[None]).logits[0]) < 1e-6  # transformers rotates and normalises in float32
    assert got.memory == got.innovations == [None, None]


def test_query_and_key_norm_is_qwen3():
    peer = Qwen3Config(
        vocab_size=13,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )
    model = randomized(Qwen3ForCausalLM(peer))
    config = tiny_config(layers_block_type=["full_attention"] * 2, use_qk_norm=True)
    ids = tokens(20)
    got = reference_forward(config, renamed(model.state_dict(), ("self_attn", "mixer")), ids)
    assert rel_error(got.logits, model(ids[None]).logits[0]) < 1e-6


def test_sliding_attention_is_mistral():
    peer = MistralConfig(
        vocab_size=13,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        sliding_window=3,
        attn_implementation="eager",
    )
    model = randomized(MistralForCausalLM(peer))
    config = tiny_config(layers_block_type=["sliding_attention"] * 2)
    ids = tokens(20)
    got = reference_forward(config, renamed(model.state_dict(), ("self_attn", "mixer")), ids)
    assert rel_error(got.logits, model(ids[None]).logits[0]) < 1e-6


@pytest.mark.parametrize(
    ("n_groups", "use_bias", "limit"), [(1, False, (0.0, float("inf"))), (2, True, (0.3, 0.7)), (4, False, (0.0, 0.5))]
)
def test_mamba2_layers_are_mamba2(n_groups, use_bias, limit):
    peer = Mamba2Config(
        vocab_size=13,
        hidden_size=16,
        num_hidden_layers=2,
        num_heads=8,
        head_dim=4,
        state_size=5,
        n_groups=n_groups,
        conv_kernel=3,
        chunk_size=8,
        layer_norm_epsilon=1e-5,
        use_bias=use_bias,
        use_conv_bias=not use_bias,
        time_step_limit=limit,
        tie_word_embeddings=True,
    )
    model = randomized(Mamba2ForCausalLM(peer))
    config = tiny_config(
        layers_block_type=["mamba2"] * 2,
        intermediate_size=None,
        tie_word_embeddings=True,
        n_groups=n_groups,
        time_step_limit=limit,
    )
    names = [("backbone.embeddings", "model.embed_tokens"), ("backbone", "model"), ("norm_f", "norm")]
    names += [(f"{i}.norm", f"{i}.input_layernorm") for i in range(2)]
    names += [(f"mixer.{name}", f"mixer.dynamics.{name}") for name in ("A_log", "D", "dt_bias")]
    ids = tokens(20)
    got = reference_forward(config, renamed(model.state_dict(), *names), ids)
    assert rel_error(got.logits, model(ids[None]).logits[0]) < 1e-6  # transformers scans in float32


@pytest.mark.parametrize("use_bias", [False, True])
def test_mamba_layers_are_mamba(use_bias):
    peer = MambaConfig(
        vocab_size=13,
        hidden_size=16,
        num_hidden_layers=2,
        state_size=5,
        conv_kernel=3,
        expand=2,
        time_step_rank=3,
        layer_norm_epsilon=1e-5,
        use_bias=use_bias,
        use_conv_bias=not use_bias,
        tie_word_embeddings=True,
    )
    model = randomized(MambaForCausalLM(peer))
    config = tiny_config(layers_block_type=["mamba"] * 2, intermediate_size=None, tie_word_embeddings=True)
    names = [("backbone.embeddings", "model.embed_tokens"), ("backbone", "model"), ("norm_f", "norm")]
    names += [(f"{i}.norm", f"{i}.input_layernorm") for i in range(2)]
    names += [(f"mixer.{name}", f"mixer.dynamics.{name}") for name in ("A_log", "D")]
    names += [("dt_proj.bias", "dynamics.dt_bias")]
    ids = tokens(20)
    got = reference_forward(config, renamed(model.state_dict(), *names), ids)
    assert rel_error(got.logits, model(ids[None]).logits[0]) < 1e-6


# ---------------------------------------------------------------------------- the three spans


def test_bmojo_within_its_window_is_full_attention():
    config = tiny_config(sliding_window=9)
    weights = random_weights(config)
    ids = tokens(10)
    got = reference_forward(config, weights, ids).logits
    want = reference_forward(tiny_config(layers_block_type=["full_attention"] * 2), weights, ids).logits
    assert rel_error(got[:9], want[:9]) < 1e-12
    assert rel_error(got[9], want[9]) > 1e-3  # the first token has left the window, its fading token is there


@pytest.mark.parametrize("position", ["constant", "rank"])
def test_window_and_full_memory_hold_every_token_once(position):
    """Without positions and without fading tokens, a memory for all that left the window makes full attention."""
    config = tiny_config(
        rope_parameters={"rope_type": "default", "rope_theta": 1e300},  # dimensions 0 and 3 turn, the others do not
        tie_attn_weights=False,
        eidetic_size=20,
        eidetic_chunk_size=1,
        eidetic_position=position,
    )
    weights = random_weights(config)
    for i in range(2):
        mixer = f"model.layers.{i}.mixer."
        for name in ("q_proj", "k_proj", "fading_k_proj"):
            weight = weights[f"{mixer}{name}.weight"].view(-1, 6, 16)
            weight[:, [0, 3]] = 0  # what would turn
            if name != "q_proj":
                weight[:, 1] = 0  # the dimension that tells fading keys apart, by biases
            sign = {"q_proj": 1.0, "k_proj": 0.0, "fading_k_proj": -1e4}[name]
            weights[f"{mixer}{name}.bias"] = sign * torch.tensor([0.0, 1, 0, 0, 0, 0]).repeat(len(weight)).double()
        weights[f"{mixer}q_proj.weight"].view(-1, 6, 16)[:, 1] = 0
    ids = tokens(20)
    got = reference_forward(config, weights, ids)
    config.layers_block_type = ["full_attention"] * 2
    assert rel_error(got.logits, reference_forward(config, weights, ids).logits) < 1e-12
    assert got.memory[0][19] == list(range(17))


def fading_outputs(weights, ids):
    """What the SSM of the first bmojo layer returns: the layer as a plain mamba2 layer, less its residual."""
    config = tiny_config(layers_block_type=["mamba2"], intermediate_size=None)
    before, after = reference_forward(
        config, {name.replace("fading.", ""): tensor for name, tensor in weights.items()}, ids
    ).hidden_states
    return after - before


@pytest.mark.parametrize("signal", ["ssm_output", "layer_input"])
def test_innovation_is_that_of_the_signal(signal):
    config = tiny_config(innovation_kernel=2, innovation_signal=signal)
    weights = random_weights(config)
    ids = tokens(6)
    if signal == "ssm_output":
        x = fading_outputs(weights, ids)
    else:  # the embedding, normed
        x = weights["model.embed_tokens.weight"][ids]
        x = x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
        x = x * weights["model.layers.0.input_layernorm.weight"]
    past = torch.stack([0 * x[0], x[0], *((x[t - 1] + x[t - 2]) / 2 for t in range(2, 6))])
    got = reference_forward(config, weights, ids).innovations[0]
    assert got == pytest.approx((x - past).square().sum(-1).tolist(), rel=1e-9)


@pytest.mark.parametrize("position", ["constant", "rank"])
def test_scores_depend_on_distances_alone(position):
    """One layer again, its rotary embedding written with complex numbers and the distance of each token from the query."""
    config = tiny_config(
        layers_block_type=["bmojo"],
        intermediate_size=None,
        num_attention_heads=1,
        num_key_value_heads=1,
        tie_attn_weights=False,
        eidetic_position=position,
        innovation_predictor="oldest",
        vocab_size=7,
    )
    weights = random_weights(config)
    ids = tokens(18, vocab_size=7)
    got = reference_forward(config, weights, ids)
    assert got.memory[0][17] == [0, 1, 2, 3]  # chunk 3 begins at 15, so the tokens 0 to 12 had left the window

    before = got.hidden_states[0]
    y = fading_outputs(weights, ids)
    norm = before.square().mean(-1, keepdim=True).add(1e-5).rsqrt()
    u = before * norm * weights["model.layers.0.input_layernorm.weight"]
    w = {name.removeprefix("model.layers.0.mixer."): tensor for name, tensor in weights.items()}

    t, window = 17, 3
    distance = {("u", j): t - j for j in (15, 16, 17)} | {("y", j): t - j for j in (12, 13, 14)}
    eidetic = [6, 6, 6, 6] if position == "constant" else [10, 9, 8, 7]
    distance |= {("u", j): eidetic[j] for j in range(4)}
    assert config.sliding_window == window

    def as_complex(x):
        return torch.complex(x[:3], x[3:])

    frequency = 100.0 ** (-torch.arange(3).double() / 3)
    query = as_complex(w["q_proj.weight"] @ u[t])
    scores, values = [], []
    for (source, j), d in distance.items():
        prefix, token = ("", u[j]) if source == "u" else ("fading_", y[j])
        key = as_complex(w[f"{prefix}k_proj.weight"] @ token)
        scores.append((query * key.conj() * torch.exp(1j * frequency * d)).real.sum() / 6**0.5)
        values.append(w[f"{prefix}v_proj.weight"] @ token)
    out = w["o_proj.weight"] @ (torch.stack(scores).softmax(0) @ torch.stack(values))
    assert rel_error(got.hidden_states[1][t] - before[t], out) < 1e-12


# ---------------------------------------------------------------------------- innovation and memory


def scores_of(y, weights=None, **changes):
    return innovations_of(
        tiny_config(**changes), 0, weights or {}, torch.tensor(y, dtype=torch.float64)[:, None], None
    )


def test_innovations_by_hand():
    y = [3.0, 1.0, 4.0, 8.0, 6.0]
    predictions = [0, 3, 2, 8 / 3, 13 / 3]
    average, loss = scores_of(y)
    assert average == pytest.approx([(a - b) ** 2 for a, b in zip(y, predictions, strict=True)])
    assert loss == 0.0

    halves = [0, 3, (1 + 3 / 2) / 1.5, (4 + 1 / 2 + 3 / 4) / 1.75, (8 + 4 / 2 + 1 / 4) / 1.75]  # 1 - 2 / (3 + 1) = 1/2
    exponential, _ = scores_of(y, innovation_predictor="exponential")
    assert exponential == pytest.approx([(a - b) ** 2 for a, b in zip(y, halves, strict=True)])

    kernel = {"predictor.weight": torch.tensor([[1.0], [2.0], [-1.0]], dtype=torch.float64, requires_grad=True)}
    learned = [0, 3 * 3, 1.5 * (1 + 2 * 3), 4 + 2 * 1 - 3, 8 + 2 * 4 - 1]
    errors, loss = scores_of(y, kernel, innovation_predictor="learnable")
    assert errors == pytest.approx([(a - b) ** 2 for a, b in zip(y, learned, strict=True)])
    assert loss.item() == pytest.approx(0.5 * sum(errors) / 5)
    loss.backward()
    assert kernel["predictor.weight"].grad.abs().min() > 0

    assert scores_of(y, innovation_predictor="recent")[0] == [0, 1, 2, 3, 4]
    assert scores_of(y, innovation_predictor="oldest")[0] == [0] * 5
    assert scores_of(y, innovation_predictor="exponential", innovation_kernel=1)[0] == pytest.approx([9, 4, 9, 16, 4])


def test_selection_by_hand():
    nan = float("nan")
    config = tiny_config(sliding_window=3, eidetic_chunk_size=5, eidetic_size=3)
    errors = [1.0, nan, 5.0, 1.0, 7.0, 1.0, 9.0, 9.0, 9.0]
    assert select(config, 0, errors) == []
    assert select(config, 1, errors) == [0, 1, 2]  # all that left the window, 2 = 5 - 3 the last of them
    config.eidetic_size = 2
    assert select(config, 1, errors) == [0, 2]  # NaN ranks last
    assert select(config, 2, errors) == [6, 7]  # of 0 to 7
    config.eidetic_size = 5
    assert select(config, 2, errors) == [0, 2, 4, 6, 7]  # of the three errors of 1 the earliest
    config.eidetic_size = 4
    assert select(config, 2, errors) == [2, 4, 6, 7]
    config.eidetic_size = 0
    assert select(config, 2, errors) == []


def test_selection_with_a_half_life_by_hand():
    config = tiny_config(sliding_window=3, eidetic_chunk_size=5, eidetic_size=2, innovation_half_life=1)
    errors = [
        64.0,
        17.0,
        8.0,
        0.0,
        3.0,
        2.0,
        0.5,
        0.6,
    ]  # at chunk 2, of 0 to 7, in units of 2^-10: 64, 34, 32, 0, 48, 64, 32, 76.8
    assert select(config, 2, errors) == [0, 7]  # of the two with 64 the earlier
    config.eidetic_size = 4
    assert select(config, 2, errors) == [0, 4, 5, 7]
    config.innovation_half_life = 2
    assert select(config, 2, errors) == [0, 1, 2, 4]  # in units of 2^-5: 64, 24, 16, 0, 12, 11.3, 4, 6.8
    config.innovation_half_life, config.innovation_predictor = 1, "oldest"
    assert select(config, 2, [0.0] * 8) == [0, 1, 2, 3]


def test_random_scores_are_asked_for():
    config = tiny_config(innovation_predictor="random")
    weights = random_weights(config)
    with pytest.raises(ValueError, match="random_scores"):
        reference_forward(config, weights, tokens(12))
    got = reference_forward(
        config, weights, tokens(12), lambda layer_idx, seq_len: [(layer_idx or -1) * t for t in range(seq_len)]
    )
    assert got.memory[0][11] == [0, 1, 2, 3]
    assert got.memory[1][11] == [4, 5, 6, 7]


# ---------------------------------------------------------------------------- every option, as one function of the prefix


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ssm_type": "mamba", "eidetic_position": "rank", "use_qk_norm": True},
        {"tie_attn_weights": False, "innovation_predictor": "learnable", "tie_word_embeddings": True},
        {"eidetic_size": 0, "innovation_predictor": "exponential", "intermediate_size": None},
        {
            "layers_block_type": ["mamba", "bmojo", "full_attention", "mamba2", "sliding_attention"],
            "num_key_value_heads": 1,
        },
    ],
)
def test_prefix_decides(changes):
    config = tiny_config(**changes)
    weights = random_weights(config)
    ids = tokens(23)
    whole = reference_forward(config, weights, ids)
    part = reference_forward(config, {name: tensor.float() for name, tensor in weights.items()}, ids[:16].tolist())
    part64 = reference_forward(config, weights, ids[:16].tolist())
    assert torch.equal(whole.logits[:16], part64.logits)
    assert whole.logits.dtype == part.logits.dtype == torch.float64
    assert len(whole.hidden_states) == len(config.layers_block_type) + 1
    for layer_type, errors, memory in zip(config.layers_block_type, whole.innovations, whole.memory, strict=True):
        if layer_type != "bmojo":
            assert errors is None
            assert memory is None
            continue
        assert len(errors) == len(memory) == 23
        for t in range(23):
            left = max(0, t // 5 * 5 - 3 + 1)
            assert memory[t] == memory[t // 5 * 5] == sorted(set(memory[t]))
            assert len(memory[t]) == min(config.eidetic_size, left)


def test_gradients_reach_the_fading_memory():
    config = tiny_config(tie_attn_weights=False, innovation_predictor="learnable")
    weights = {name: tensor.requires_grad_() for name, tensor in random_weights(config).items()}
    result = reference_forward(config, weights, tokens(12))
    result.logits.square().sum().backward()
    unused = {name for name, tensor in weights.items() if tensor.grad is None or not tensor.grad.any()}
    assert unused == {f"model.layers.{i}.mixer.predictor.weight" for i in range(2)}
    result.innovation_loss.backward()
    assert all(weights[name].grad.any() for name in unused)
