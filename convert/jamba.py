"""Jamba as transformers has it, where every MLP is dense: layers of Mamba or of attention without positions."""

from types import SimpleNamespace

from . import theirs
from .core import Refusal, Renaming
from .mamba import selective_mixer


SAME = (  # the name and meaning that they have here
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "rms_norm_eps max_position_embeddings initializer_range tie_word_embeddings use_cache"
)
MAMBA = {  # of the mixers: name in MambaConfig and ours, name in JambaConfig
    "state_size": "mamba_d_state",
    "conv_kernel": "mamba_d_conv",
    "expand": "mamba_expand",
    "time_step_rank": "mamba_dt_rank",
    "use_bias": "mamba_proj_bias",
    "use_conv_bias": "mamba_conv_bias",
}
LAYERS = (
    "attn_layer_period attn_layer_offset num_experts expert_layer_period expert_layer_offset mamba_inner_layernorms "
    "head_dim"
)
NEUTRAL = (
    "attention_dropout num_experts_per_tok router_aux_loss_coef output_router_logits use_mamba_kernels use_mambapy "
    "use_associative_scan num_logits_to_keep calc_logits_for_entire_prompt n_ctx"
)
NORMS = {"dt_norm": "dt_layernorm", "B_norm": "b_layernorm", "C_norm": "c_layernorm"}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


class Jamba(Renaming):
    name, architecture = "jamba", "JambaForCausalLM"
    model_types = ("jamba",)

    def read(self, config: dict):
        found = theirs.read(config, self.name, f"{SAME} {' '.join(MAMBA.values())} {LAYERS}", NEUTRAL)
        for number, experts in enumerate(found.layers_num_experts):
            if experts > 1:
                raise Refusal(
                    f"num_experts is {experts}: the MLP of layer {number} is a mixture of experts, and B'MOJO's MLPs are "
                    "dense. Only Jamba without experts is converted."
                )
        if not getattr(found, "mamba_inner_layernorms", True):
            raise Refusal("mamba_inner_layernorms is false: transformers' Jamba always has the norms on dt, B and C.")
        if getattr(found, "head_dim", None) is None:
            found.head_dim = found.hidden_size // found.num_attention_heads
        return found

    def to_bmojo(self, config):
        found = self.read(config)
        kinds = {"attention": "full_attention", "mamba": "mamba"}
        fields = {name: getattr(found, name) for name in SAME.split()}
        fields |= {ours: getattr(found, name) for ours, name in MAMBA.items()}
        return fields | {
            "layers_block_type": [kinds[kind] for kind in found.layers_block_type],
            "head_dim": found.head_dim,
            "attention_bias": False,
            "mlp_bias": False,
            "use_qk_norm": False,
            "position_embedding_type": "nope",
            "mamba_intermediate_size": None,
            "mamba_hidden_act": found.hidden_act,
            "mixer_norm": "learned",
            "mixer_rms_eps": found.rms_norm_eps,
            "time_step_limit": None,
            **theirs.special_tokens(found),
        }

    def from_bmojo(self, config):
        if config.intermediate_size is None:
            raise Refusal("intermediate_size is None: every layer of jamba has an MLP.")
        fields = {name: getattr(config, name) for name in SAME.split()}
        fields |= {name: getattr(config, ours) for ours, name in MAMBA.items()}
        if config.head_dim != config.hidden_size // config.num_attention_heads:
            fields["head_dim"] = config.head_dim  # no field of JambaConfig, but read where it is given
        fields |= {"num_experts": 1, "num_experts_per_tok": 1, **theirs.special_tokens(config)}
        return theirs.write(self.name, self.architecture, fields | self.period(config.layers_block_type))

    def period(self, layers: list[str]) -> dict[str, int]:
        """Which layers are attention, as Jamba says it: those whose number has this remainder.

        Raises:
            Refusal: there are others than mamba and full_attention, or they do not recur so.
        """
        for number, kind in enumerate(layers):
            if kind not in ("mamba", "full_attention"):
                raise Refusal(
                    f"layers_block_type has {kind!r} for layer {number}; jamba has 'mamba' and 'full_attention' only."
                )
        found = [number for number, kind in enumerate(layers) if kind == "full_attention"]
        period = found[1] - found[0] if len(found) > 1 else len(layers) + 1  # not again
        offset = found[0] if found else len(layers)  # never
        if found != list(range(offset, len(layers), period)) or offset >= period:
            raise Refusal(
                f"layers_block_type has full_attention in layers {found}; in jamba they recur with a fixed period."
            )
        return {"attn_layer_period": period, "attn_layer_offset": offset}

    def names(self, found) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name in our model, name and shape in theirs, of every tensor."""
        size, width, depth = found.hidden_size, found.intermediate_size, found.head_dim
        queries, keys = found.num_attention_heads * depth, found.num_key_value_heads * depth
        rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": size}
        sizes = SimpleNamespace(hidden_size=size, intermediate_size=found.mamba_expand * size)
        vars(sizes).update({name: getattr(found, key) for name, key in MAMBA.items()})
        embedding = (found.vocab_size, size)
        names = {"model.embed_tokens.weight": ("model.embed_tokens.weight", embedding)}
        for layer, kind in enumerate(found.layers_block_type):
            at = f"model.layers.{layer}."
            names[f"{at}input_layernorm.weight"] = (f"{at}input_layernorm.weight", (size,))
            names[f"{at}post_attention_layernorm.weight"] = (f"{at}pre_ff_layernorm.weight", (size,))
            for name in MLP:
                shape = (size, width) if name == "down_proj" else (width, size)
                names[f"{at}mlp.{name}.weight"] = (f"{at}feed_forward.{name}.weight", shape)
            if kind == "attention":
                for name in PROJECTIONS:
                    shape = (rows[name], queries if name == "o_proj" else size)
                    names[f"{at}mixer.{name}.weight"] = (f"{at}self_attn.{name}.weight", shape)
                continue
            for ours, (name, shape) in selective_mixer(sizes).items():
                names[f"{at}mixer.{ours}"] = (f"{at}mamba.{name}", shape)
            normed = (sizes.time_step_rank, sizes.state_size, sizes.state_size)
            for (ours, name), length in zip(NORMS.items(), normed, strict=True):
                names[f"{at}mixer.{ours}.weight"] = (f"{at}mamba.{name}.weight", (length,))
        names["model.norm.weight"] = ("model.final_layernorm.weight", (size,))
        if not found.tie_word_embeddings:
            names["lm_head.weight"] = ("lm_head.weight", embedding)
        return names
