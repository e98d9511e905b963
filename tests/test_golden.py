"""Special cases against recordings of transformers' own models: the same weights under our names give the same logits.

The recordings lie beside the checkout (`shared/golden/transformers`); these tests skip where they are absent.
"""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from bmojo.cache_bmojo import BMojoCache
from bmojo.configuration_bmojo import BMojoConfig
from bmojo.modeling_bmojo import BMojoForCausalLM


CASES = ["llama", "llama_opt", "mistral", "qwen3", "qwen3_opt", "mamba", "mamba_opt", "mamba2", "mamba2_opt"]
LAYER_TYPES = {"llama": "full_attention", "qwen3": "full_attention", "mistral": "sliding_attention"}
SAME_NAME = (  # in their configurations as in ours
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size hidden_act "
    "tie_word_embeddings rope_parameters attention_bias mlp_bias conv_kernel expand state_size n_groups use_bias "
    "use_conv_bias time_step_rank max_position_embeddings rms_norm_eps"
).split()
NEW_NAMES = (  # of parameters
    (r"^backbone\.embeddings\.", "model.embed_tokens."),
    (r"^backbone\.norm_f\.", "model.norm."),
    (r"^backbone\.", "model."),
    (r"(layers\.\d+)\.norm\.", r"\1.input_layernorm."),
    (r"\.self_attn\.", ".mixer."),
    (r"\.mixer\.(A_log|D|dt_bias)$", r".mixer.dynamics.\1"),
    (r"\.mixer\.dt_proj\.bias$", ".mixer.dynamics.dt_bias"),
)


def special_case(folder) -> tuple[BMojoForCausalLM, dict[str, torch.Tensor]]:
    """Our model with the recorded weights, in float64, and the recording."""
    theirs = json.loads((folder / "config.json").read_text())
    kind = theirs["model_type"]
    fields = {name: theirs[name] for name in SAME_NAME if name in theirs}
    fields["layers_block_type"] = (
        theirs.get("layer_types") or [LAYER_TYPES.get(kind, kind)] * theirs["num_hidden_layers"]
    )
    if kind in LAYER_TYPES:
        fields |= {"head_dim": theirs["head_dim"], "use_qk_norm": kind == "qwen3"}
        fields["sliding_window"] = theirs.get("sliding_window") or 512
    else:
        fields |= {"intermediate_size": None, "rms_norm_eps": theirs["layer_norm_epsilon"]}
    if kind == "mamba2":
        fields |= {"mamba_num_heads": theirs["num_heads"], "mamba_head_dim": theirs["head_dim"]}
        low, high = theirs["time_step_limit"]
        fields["time_step_limit"] = None if isinstance(high, dict) else [low, high]
    weights = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for pattern, new in NEW_NAMES:
            name = re.sub(pattern, new, name)
        weights[name] = tensor.double()
    model = BMojoForCausalLM(BMojoConfig(**fields)).double().eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if theirs["tie_word_embeddings"] else set())
    return model, load_file(folder / "io.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_recorded_ones(shared, case):
    model, recorded = special_case(shared / "golden" / "transformers" / case)
    ids, want = recorded["input_ids"], recorded["logits_f64"].double()
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        cache = BMojoCache(model.config)
        pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([11, 1, 1, ids.shape[1] - 13], 1)]
        greedy = model.generate(recorded["greedy_10_plus_8"][:, :10], max_new_tokens=8, do_sample=False)
    for got in (full, torch.cat(pieces, 1)):
        assert (got - want).norm() <= 1e-6 * want.norm()  # the recording itself may hold float32 inside
    assert torch.equal(greedy, recorded["greedy_10_plus_8"])
