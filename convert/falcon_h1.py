"""Falcon-H1 as transformers has it: in every layer attention and a Mamba2 side by side, and factors nearly everywhere."""

import math

from . import theirs
from .core import Refusal, Renaming
from .llama import rope


SAME = (  # the name and meaning that they have here
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "max_position_embeddings rms_norm_eps initializer_range tie_word_embeddings use_cache attention_bias mlp_bias "
    "projectors_bias mamba_rms_norm"
)
FACTORS = (
    "key_multiplier embedding_multiplier lm_head_multiplier attention_in_multiplier attention_out_multiplier "
    "ssm_in_multiplier ssm_out_multiplier"
)
LISTS = {"mlp_multipliers": 2, "ssm_multipliers": 5}  # and how many factors they hold
RENAMED = {  # theirs: ours
    "mamba_n_heads": "mamba_num_heads",
    "mamba_d_head": "mamba_head_dim",
    "mamba_n_groups": "n_groups",
    "mamba_d_state": "state_size",
    "mamba_d_conv": "conv_kernel",
    "mamba_expand": "expand",
    "mamba_chunk_size": "chunk_size",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_proj_bias": "use_bias",
}
SWITCHES = (
    "attention_bias mlp_bias projectors_bias mamba_rms_norm mamba_norm_before_gate mamba_conv_bias mamba_proj_bias"
)
MLP = ("gate_proj", "up_proj", "down_proj")


class FalconH1(Renaming):
    name, architecture = "falcon_h1", "FalconH1ForCausalLM"
    model_types = ("falcon_h1",)

    def read(self, config: dict):
        used = (
            f"{SAME} {FACTORS} {' '.join(LISTS)} {' '.join(RENAMED)} mamba_d_ssm mamba_norm_before_gate time_step_limit "
            "head_dim rope_parameters rope_theta rope_scaling"
        )
        neutral = "attention_dropout num_logits_to_keep layer_types layers_block_type"
        found = theirs.read(config, self.name, used, neutral)
        if getattr(found, "head_dim", None) is None:
            found.head_dim = found.hidden_size // found.num_attention_heads
        if type(found.head_dim) is not int or found.head_dim < 1:
            raise Refusal(f"head_dim is {found.head_dim!r}; it must be a whole number of at least 1.")
        for name in (*FACTORS.split(), *RENAMED, *SWITCHES.split()):
            if getattr(found, name) is None:
                raise Refusal(f"{name} is null, which {self.name} cannot compute with.")
        for name, count in LISTS.items():
            if len(getattr(found, name)) != count:
                raise Refusal(f"{name} is {getattr(found, name)}; it must hold {count} factors.")
        if found.mamba_n_heads % found.mamba_n_groups:
            raise Refusal(
                f"mamba_n_heads {found.mamba_n_heads} is not a multiple of mamba_n_groups {found.mamba_n_groups}."
            )
        if found.time_step_limit is None:
            raise Refusal(f"time_step_limit is null, which {self.name} cannot compute with.")
        return found

    def to_bmojo(self, config):
        found = self.read(config)
        low, high = found.time_step_limit
        fields = {name: getattr(found, name) for name in SAME.split()}
        fields |= {name: float(getattr(found, name)) for name in FACTORS.split()}
        for name in LISTS:
            factors = [float(factor) for factor in getattr(found, name)]
            fields[name] = None if set(factors) == {1.0} else factors
        fields |= {ours: getattr(found, name) for name, ours in RENAMED.items()}
        return fields | {
            "layers_block_type": ["hybrid"] * found.num_hidden_layers,
            "ssm_type": "mamba2",
            "head_dim": found.head_dim,
            "attention_out_bias": found.attention_bias,
            "rope_parameters": rope(found.rope_parameters),
            "position_embedding_type": "rope",
            "use_qk_norm": False,
            "mamba_hidden_act": found.hidden_act,
            "mamba_norm_before_gate": found.mamba_rms_norm and found.mamba_norm_before_gate,
            "time_step_limit": None if (low, high) == (0, math.inf) else [low, high],
            **theirs.special_tokens(found),
        }

    def from_bmojo(self, config):
        for number, kind in enumerate(config.layers_block_type):
            if kind != "hybrid":
                raise Refusal(f"layers_block_type has {kind!r} for layer {number}; {self.name} has 'hybrid' only.")
        if config.ssm_type != "mamba2":
            raise Refusal(f"ssm_type is {config.ssm_type!r}; the SSM of {self.name} is 'mamba2'.")
        if config.intermediate_size is None:
            raise Refusal(f"intermediate_size is None: every layer of {self.name} has an MLP.")
        fields = {name: getattr(config, name) for name in f"{SAME} {FACTORS}".split()}
        fields |= {name: getattr(config, name) or [1.0] * count for name, count in LISTS.items()}
        fields |= {name: getattr(config, ours) for name, ours in RENAMED.items()}
        if config.head_dim * config.num_attention_heads != config.hidden_size:
            fields["head_dim"] = config.head_dim
        return theirs.write(
            self.name,
            self.architecture,
            fields
            | {
                "mamba_d_ssm": config.mamba_num_heads * config.mamba_head_dim,
                "mamba_norm_before_gate": config.mamba_norm_before_gate,
                "time_step_limit": config.time_step_limit or [0.0, math.inf],
                "rope_parameters": dict(config.rope_parameters),
                **theirs.special_tokens(config),
            },
        )

    def names(self, found) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name in our model, name and shape in theirs, of every tensor."""
        embedding = (found.vocab_size, found.hidden_size)
        names = {"model.embed_tokens.weight": ("model.embed_tokens.weight", embedding)}
        inside = self.attention(found) | self.mamba(found) | self.mlp(found)
        for layer in range(found.num_hidden_layers):
            at = f"model.layers.{layer}."
            names |= {at + ours: (at + name, shape) for ours, (name, shape) in inside.items()}
        names["model.norm.weight"] = ("model.final_layernorm.weight", embedding[1:])
        if not found.tie_word_embeddings:
            names["lm_head.weight"] = ("lm_head.weight", embedding)
        return names

    def attention(self, found) -> dict[str, tuple[str, tuple[int, ...]]]:
        size, queries = found.hidden_size, found.num_attention_heads * found.head_dim
        keys = found.num_key_value_heads * found.head_dim
        names = {}
        for name, shape in {
            "q_proj": (queries, size),
            "k_proj": (keys, size),
            "v_proj": (keys, size),
            "o_proj": (size, queries),
        }.items():
            names[f"mixer.{name}.weight"] = (f"self_attn.{name}.weight", shape)
            if found.attention_bias:
                names[f"mixer.{name}.bias"] = (f"self_attn.{name}.bias", shape[:1])
        return names

    def mamba(self, found) -> dict[str, tuple[str, tuple[int, ...]]]:
        size, heads = found.hidden_size, found.mamba_n_heads
        inner = heads * found.mamba_d_head
        convolved = inner + 2 * found.mamba_n_groups * found.mamba_d_state
        shapes = {
            "in_proj.weight": (inner + convolved + heads, size),
            "conv1d.weight": (convolved, 1, found.mamba_d_conv),
            "out_proj.weight": (size, inner),
        }
        if found.mamba_proj_bias:
            shapes["in_proj.bias"] = (inner + convolved + heads,)
        if found.mamba_conv_bias:
            shapes["conv1d.bias"] = (convolved,)
        if found.projectors_bias:
            shapes["out_proj.bias"] = (size,)
        if found.mamba_rms_norm:
            shapes["norm.weight"] = (inner,)
        names = {f"mixer.ssm.{name}": (f"mamba.{name}", shape) for name, shape in shapes.items()}
        dynamics = {f"mixer.ssm.dynamics.{name}": (f"mamba.{name}", (heads,)) for name in ("A_log", "D", "dt_bias")}
        return names | dynamics

    def mlp(self, found) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The MLP and both norms."""
        size, inner = found.hidden_size, found.intermediate_size
        names = {
            "input_layernorm.weight": ("input_layernorm.weight", (size,)),
            "post_attention_layernorm.weight": ("pre_ff_layernorm.weight", (size,)),
        }
        for name in MLP:
            shape = (size, inner) if name == "down_proj" else (inner, size)
            names[f"mlp.{name}.weight"] = (f"feed_forward.{name}.weight", shape)
            if found.mlp_bias:
                names[f"mlp.{name}.bias"] = (f"feed_forward.{name}.bias", shape[:1])
        return names

    def ignored(self, config):
        return {
            r"model\.layers\.\d+\.mamba\.mup_vector": "a table that follows from ssm_multipliers",
            r"model(\.layers\.\d+\.self_attn)?\.rotary_emb\.inv_freq": "a table that follows from rope_theta",
        }
