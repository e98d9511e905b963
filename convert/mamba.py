"""Mamba and Mamba2 as transformers has them: layers of one mixer each, without MLP."""

import math

from . import theirs
from .core import Refusal, Renaming


SAME = (
    "vocab_size hidden_size num_hidden_layers state_size conv_kernel expand use_bias use_conv_bias time_step_min "
    "time_step_max time_step_floor initializer_range tie_word_embeddings use_cache residual_in_fp32"
)
LEFT_OVER = (  # of the native checkpoints that published ones were made from; transformers' classes read none of them
    "d_model d_inner n_layer ssm_cfg attn_layer_idx attn_cfg d_intermediate rms_norm norm_before_gate fused_add_norm "
    "pad_vocab_size_multiple tie_embeddings"
)


class Mixers(Renaming):
    """What all of them share."""

    architecture: str
    layer_type: str  # of ours
    embedding = "backbone.embeddings.weight"
    own: str
    neutral: str

    @property
    def model_types(self):
        return (self.name,)

    def read(self, config: dict):
        used = f"{SAME} layer_norm_epsilon hidden_act {self.own}"
        return theirs.read(config, self.name, used, f"rescale_prenorm_residual {LEFT_OVER} {self.neutral}")

    def to_bmojo(self, config):
        found = self.read(config)
        return {name: getattr(found, name) for name in SAME.split()} | {
            "intermediate_size": None,
            "mamba_hidden_act": found.hidden_act,
            "rms_norm_eps": found.layer_norm_epsilon,
            "layers_block_type": [self.layer_type] * found.num_hidden_layers,
            **theirs.special_tokens(found),
        }

    def from_bmojo(self, config):
        for number, kind in enumerate(config.layers_block_type):
            if kind != self.layer_type:
                raise Refusal(
                    f"layers_block_type has {kind!r} for layer {number}; {self.name} has {self.layer_type!r} only."
                )
        if config.intermediate_size is not None:
            raise Refusal(f"intermediate_size is {config.intermediate_size}: layers of {self.name} have no MLP.")
        fields = {name: getattr(config, name) for name in SAME.split()}
        fields |= {"layer_norm_epsilon": config.rms_norm_eps, "hidden_act": config.mamba_hidden_act}
        fields |= theirs.special_tokens(config)
        return theirs.write(self.name, self.architecture, fields | self.export_own(config))

    def export_own(self, config) -> dict:
        raise NotImplementedError

    def mixer(self, found) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Of one mixer: name in ours, name in theirs and shape."""
        raise NotImplementedError

    def names(self, found) -> dict[str, tuple[str, tuple[int, ...]]]:
        size, embedding = found.hidden_size, (found.vocab_size, found.hidden_size)
        names = {"model.embed_tokens.weight": ("backbone.embeddings.weight", embedding)}
        for layer in range(found.num_hidden_layers):
            here, there = f"model.layers.{layer}.", f"backbone.layers.{layer}."
            names[f"{here}input_layernorm.weight"] = (f"{there}norm.weight", (size,))
            for ours, (name, shape) in self.mixer(found).items():
                names[f"{here}mixer.{ours}"] = (f"{there}mixer.{name}", shape)
        names["model.norm.weight"] = ("backbone.norm_f.weight", (size,))
        if not found.tie_word_embeddings:
            names["lm_head.weight"] = ("lm_head.weight", embedding)
        return names


def projections(found, projected: int, convolved: int, inner: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The linears and the convolution that both kinds of mixer have."""
    names = {
        "in_proj.weight": ("in_proj.weight", (projected, found.hidden_size)),
        "conv1d.weight": ("conv1d.weight", (convolved, 1, found.conv_kernel)),
        "out_proj.weight": ("out_proj.weight", (found.hidden_size, inner)),
    }
    if found.use_bias:
        names["in_proj.bias"] = ("in_proj.bias", (projected,))
        names["out_proj.bias"] = ("out_proj.bias", (found.hidden_size,))
    if found.use_conv_bias:
        names["conv1d.bias"] = ("conv1d.bias", (convolved,))
    return names


def selective_mixer(found) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Of Mamba's mixer, as `Mixers.mixer`, from sizes under the names of transformers' MambaConfig."""
    inner, state, rank = found.intermediate_size, found.state_size, found.time_step_rank
    return projections(found, 2 * inner, inner, inner) | {
        "x_proj.weight": ("x_proj.weight", (rank + 2 * state, inner)),
        "dt_proj.weight": ("dt_proj.weight", (inner, rank)),
        "dynamics.dt_bias": ("dt_proj.bias", (inner,)),
        "dynamics.A_log": ("A_log", (inner, state)),
        "dynamics.D": ("D", (inner,)),
    }


class Mamba(Mixers):
    name, architecture = "mamba", "MambaForCausalLM"
    layer_type = "mamba"
    own = "time_step_rank intermediate_size"
    neutral = "time_step_scale time_step_init_scheme use_mambapy use_associative_scan"

    def read(self, config):
        found = super().read(config)
        if not isinstance(found.intermediate_size, int):
            raise Refusal(f"intermediate_size is {found.intermediate_size!r}; it must be a whole number.")
        return found

    def to_bmojo(self, config):
        found = self.read(config)
        inner = None if found.intermediate_size == found.expand * found.hidden_size else found.intermediate_size
        return super().to_bmojo(config) | {
            "time_step_rank": found.time_step_rank,
            "mamba_intermediate_size": inner,
        }

    def export_own(self, config):
        inner = config.mamba_intermediate_size or config.expand * config.hidden_size
        return {"time_step_rank": config.time_step_rank, "intermediate_size": inner}

    def mixer(self, found):
        return selective_mixer(found)


class Mamba2(Mixers):
    name, architecture = "mamba2", "Mamba2ForCausalLM"
    layer_type = "mamba2"
    own = "num_heads head_dim n_groups time_step_limit chunk_size"
    neutral = "time_step_rank intermediate_size"  # of Mamba; read by nothing in Mamba2

    def read(self, config):
        found = super().read(config)
        if len(found.time_step_limit) != 2:
            raise Refusal(f"time_step_limit is {found.time_step_limit}; it must be two numbers.")
        if found.num_heads % found.n_groups:
            raise Refusal(f"num_heads {found.num_heads} is not a multiple of n_groups {found.n_groups}.")
        return found

    def to_bmojo(self, config):
        found = self.read(config)
        low, high = found.time_step_limit
        return super().to_bmojo(config) | {
            "mamba_num_heads": found.num_heads,
            "mamba_head_dim": found.head_dim,
            "n_groups": found.n_groups,
            "chunk_size": found.chunk_size,
            "time_step_limit": None if (low, high) == (0, math.inf) else [low, high],
        }

    def export_own(self, config):
        inner = config.mamba_num_heads * config.mamba_head_dim
        if inner % config.hidden_size:
            raise Refusal(
                f"mamba_num_heads * mamba_head_dim is {inner}; {self.name} wants a multiple of hidden_size "
                f"{config.hidden_size}."
            )
        return {
            "expand": inner // config.hidden_size,
            "num_heads": config.mamba_num_heads,
            "head_dim": config.mamba_head_dim,
            "n_groups": config.n_groups,
            "chunk_size": config.chunk_size,
            "time_step_limit": config.time_step_limit or [0.0, math.inf],
        }

    def mixer(self, found):
        heads = found.num_heads
        inner, grouped = heads * found.head_dim, found.n_groups * found.state_size
        return projections(found, 2 * inner + 2 * grouped + heads, inner + 2 * grouped, inner) | {
            "norm.weight": ("norm.weight", (inner,)),
            "dynamics.dt_bias": ("dt_bias", (heads,)),
            "dynamics.A_log": ("A_log", (heads,)),
            "dynamics.D": ("D", (heads,)),
        }
