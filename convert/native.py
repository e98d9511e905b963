"""The checkpoints that state-spaces/mamba itself writes: Mamba1, Mamba2, their hybrids with attention, and all attention."""

import math
from pathlib import Path
from types import SimpleNamespace

from .core import Format, Piece, Refusal
from .read import read_checkpoint


EPSILON = 1e-5  # of every norm; fixed in the original's code
MLP_MULTIPLE = 128  # the original rounds the width of an MLP up to it
MOST_LAYERS = 10_000  # a file that claims more is no model, and must not cost memory
REQUIRED = object()
NEUTRAL = {"_name_or_path", "torch_dtype", "dtype", "transformers_version"}

# Every key that the original knows: what a missing one means, and what type of value it has.
CONFIG = {
    "d_model": (2560, "size"),
    "d_intermediate": (0, "count"),
    "n_layer": (64, "size"),
    "vocab_size": (50277, "size"),
    "ssm_cfg": ({}, "object"),
    "attn_layer_idx": ([], "counts"),
    "attn_cfg": ({}, "object"),
    "rms_norm": (True, "switch"),
    "residual_in_fp32": (True, "switch"),
    "fused_add_norm": (True, "switch"),  # which kernel runs
    "pad_vocab_size_multiple": (8, "size"),
    "tie_embeddings": (True, "switch"),
}
BOTH = {
    "layer": ("Mamba1", "any"),
    "d_conv": (4, "size"),
    "expand": (2, "positive"),
    "bias": (False, "switch"),
    "conv_bias": (True, "switch"),
}
MAMBA1 = BOTH | {"d_state": (16, "size"), "dt_rank": ("auto", "any")}
MAMBA2 = BOTH | {
    "d_state": (128, "size"),
    "headdim": (64, "size"),
    "ngroups": (1, "size"),
    "d_ssm": (None, "any"),
    "D_has_hdim": (False, "switch"),
    "rmsnorm": (True, "switch"),
    "norm_before_gate": (False, "switch"),
    "dt_limit": ((0.0, math.inf), "any"),
}
NO_EFFECT = {  # on the logits: keys of the layers that set how they begin to train, or how they run
    *"dt_min dt_max dt_init_floor dt_scale dt_init conv_init A_init_range chunk_size use_mem_eff_path".split(),
    *"use_fast_path layer_idx process_group sequence_parallel device dtype".split(),
}
ATTENTION = {
    "num_heads": (REQUIRED, "size"),
    "num_heads_kv": (None, "any"),
    "head_dim": (None, "any"),
    "causal": (False, "switch"),
    "qkv_proj_bias": (True, "switch"),
    "out_proj_bias": (True, "switch"),
    "softmax_scale": (None, "any"),
    "rotary_emb_dim": (0, "count"),
    "rotary_emb_base": (10000.0, "positive"),
    "rotary_emb_interleaved": (False, "switch"),
    "d_conv": (0, "count"),
    "mlp_dim": (0, "count"),
}


def is_integer(value, least: int) -> bool:
    return type(value) is int and value >= least


def is_positive(value) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


TYPES = {
    "size": ("a whole number of at least 1", lambda value: is_integer(value, 1)),
    "count": ("a whole number of at least 0", lambda value: is_integer(value, 0)),
    "counts": ("a list of whole numbers", lambda value: type(value) is list and all(is_integer(x, 0) for x in value)),
    "positive": ("a positive number", is_positive),
    "switch": ("true or false", lambda value: type(value) is bool),
    "object": ("an object", lambda value: type(value) is dict),
    "any": ("anything", lambda value: True),
}


def demand(holds: bool, name: str, value, wanted: str) -> None:
    if not holds:
        raise Refusal(f"{name} is {value!r}; it must be {wanted}.")


def take(found: dict, keys: dict, no_effect: set[str], where: str = "") -> SimpleNamespace:
    """The values of all keys, defaults filled in.

    Raises:
        Refusal: a key is unknown or missing, or its value of another type.
    """
    for name, value in found.items():
        if name not in keys and name not in no_effect:
            raise Refusal(
                f"config.json has {where}{name} = {value!r}, which state-spaces/mamba does not have: a fork's option, "
                "that changes what the model computes."
            )
    values = {}
    for name, (default, kind) in keys.items():
        value = found.get(name, default)
        if value is REQUIRED:
            raise Refusal(f"config.json has no {where}{name}.")
        wanted, holds = TYPES[kind]
        demand(holds(value), where + name, value, wanted)
        values[name] = value
    return SimpleNamespace(**values)


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def fraction_of(part: int, whole: int) -> float:
    """A factor with int(whole * factor) == part: their quotient, unless that is rounded down below it."""
    factor = part / whole
    return factor if int(whole * factor) == part else math.nextafter(factor, math.inf)


def read_ssm(found: dict, d_model: int) -> SimpleNamespace:
    """ssm_cfg with the sizes that follow from it: `kind`, `inner`, and `rank` (Mamba1) or `heads`, `branch` (Mamba2)."""
    layer = found.get("layer", "Mamba1")
    demand(layer in ("Mamba1", "Mamba2"), "ssm_cfg.layer", layer, "'Mamba1' or 'Mamba2', no other layer is converted")
    ssm = take(found, MAMBA1 if layer == "Mamba1" else MAMBA2, NO_EFFECT, "ssm_cfg.")
    ssm.kind = "mamba" if layer == "Mamba1" else "mamba2"
    total = int(ssm.expand * d_model)
    demand(total > 0, "ssm_cfg.expand", ssm.expand, f"so large that int(expand * d_model {d_model}) is at least 1")
    if layer == "Mamba1":
        ssm.inner = total
        ssm.rank = math.ceil(d_model / 16) if ssm.dt_rank == "auto" else ssm.dt_rank
        demand(is_integer(ssm.rank, 1), "ssm_cfg.dt_rank", ssm.dt_rank, "'auto' or a whole number of at least 1")
        return ssm
    ssm.inner = total if ssm.d_ssm is None else ssm.d_ssm
    demand(
        is_integer(ssm.inner, 1) and ssm.inner <= total,
        "ssm_cfg.d_ssm",
        ssm.d_ssm,
        f"null or a number from 1 to {total}",
    )
    ssm.branch, ssm.heads = total - ssm.inner, ssm.inner // ssm.headdim
    demand(
        ssm.heads * ssm.headdim == ssm.inner, "ssm_cfg.headdim", ssm.headdim, f"a divisor of the {ssm.inner} channels"
    )
    demand(ssm.heads % ssm.ngroups == 0, "ssm_cfg.ngroups", ssm.ngroups, f"a divisor of the {ssm.heads} heads")
    limit = ssm.dt_limit
    numbers = isinstance(limit, (list, tuple)) and all(type(bound) in (int, float) for bound in limit)
    demand(
        numbers and len(limit) == 2 and 0 <= limit[0] < limit[1], "ssm_cfg.dt_limit", limit, "two ascending numbers"
    )
    return ssm


def read_attention(found: dict, d_model: int) -> SimpleNamespace:
    """attn_cfg, its nulls filled in."""
    attention = take(found, ATTENTION, set(), "attn_cfg.")
    demand(attention.causal, "attn_cfg.causal", attention.causal, "true: without it attention sees the future")
    demand(
        attention.mlp_dim == 0, "attn_cfg.mlp_dim", attention.mlp_dim, "0, an MLP inside of attention is not converted"
    )
    if attention.num_heads_kv is None:
        attention.num_heads_kv = attention.num_heads
    divides = is_integer(attention.num_heads_kv, 1) and attention.num_heads % attention.num_heads_kv == 0
    demand(divides, "attn_cfg.num_heads_kv", attention.num_heads_kv, f"a divisor of num_heads {attention.num_heads}")
    if attention.head_dim is None:
        demand(
            d_model % attention.num_heads == 0, "attn_cfg.num_heads", attention.num_heads, f"a divisor of {d_model}"
        )
        attention.head_dim = d_model // attention.num_heads
    demand(is_integer(attention.head_dim, 1), "attn_cfg.head_dim", attention.head_dim, "a whole number of at least 1")
    rotated = attention.rotary_emb_dim
    demand(
        rotated % 2 == 0 and rotated <= attention.head_dim,
        "attn_cfg.rotary_emb_dim",
        rotated,
        f"even, and at most head_dim {attention.head_dim}",
    )
    scale = attention.softmax_scale
    demand(scale is None or is_positive(scale), "attn_cfg.softmax_scale", scale, "null or a positive number")
    return attention


def read(config: dict) -> SimpleNamespace:
    """Their config.json with everything that follows from it.

    Returns:
        The keys of `CONFIG`, and `vocab` (rows of the embedding), `mlp` (width, 0 without), `layers` (kinds in our words),
        `ssm` and `attention` as `read_ssm` and `read_attention` give them, None where no layer has one.
    """
    found = take(config, CONFIG, NEUTRAL)
    demand(found.n_layer <= MOST_LAYERS, "n_layer", found.n_layer, f"at most {MOST_LAYERS}")
    indices = set(found.attn_layer_idx)
    demand(
        len(indices) == len(found.attn_layer_idx) and all(index < found.n_layer for index in indices),
        "attn_layer_idx",
        found.attn_layer_idx,
        f"a list of different numbers below n_layer {found.n_layer}",
    )
    found.vocab = round_up(found.vocab_size, found.pad_vocab_size_multiple)
    found.mlp = round_up(found.d_intermediate, MLP_MULTIPLE)
    ssm = read_ssm(found.ssm_cfg, found.d_model)
    found.layers = ["full_attention" if index in indices else ssm.kind for index in range(found.n_layer)]
    found.ssm = ssm if len(indices) < found.n_layer else None
    found.attention = read_attention(found.attn_cfg, found.d_model) if indices else None
    return found


class Native(Format):
    name = "mamba_ssm"

    def recognises(self, config, folder: Path) -> bool:
        return "model_type" not in config and {"d_model", "n_layer", "vocab_size"} <= config.keys()

    # -- configurations ------------------------------------------------------------------------------------------------

    def to_bmojo(self, config):
        found = read(config)
        fields = {
            "vocab_size": found.vocab,
            "unpadded_vocab_size": None if found.vocab == found.vocab_size else found.vocab_size,
            "hidden_size": found.d_model,
            "intermediate_size": found.mlp or None,
            "num_hidden_layers": found.n_layer,
            "layers_block_type": found.layers,
            "hidden_act": "silu",
            "mlp_bias": False,
            "rms_norm": found.rms_norm,
            "rms_norm_eps": EPSILON,
            "residual_in_fp32": found.residual_in_fp32,
            "tie_word_embeddings": found.tie_embeddings,
        }
        if found.ssm is not None:
            fields |= self.fields_of_ssm(found.ssm, found.d_model)
        if found.attention is not None:
            fields |= self.fields_of_attention(found.attention)
        return fields

    def fields_of_ssm(self, ssm, d_model: int) -> dict:
        fields = {
            "ssm_type": ssm.kind,
            "state_size": ssm.d_state,
            "conv_kernel": ssm.d_conv,
            "use_bias": ssm.bias,
            "projectors_bias": ssm.bias,
            "use_conv_bias": ssm.conv_bias,
            "mamba_hidden_act": "silu",
            "mixer_norm": None,
        }
        if ssm.kind == "mamba":
            whole = ssm.inner % d_model == 0
            return fields | {
                "time_step_rank": ssm.rank,
                "expand": ssm.inner // d_model if whole else 1,
                "mamba_intermediate_size": None if whole else ssm.inner,
                "time_step_limit": None,
            }
        low, high = ssm.dt_limit
        return fields | {
            "mamba_num_heads": ssm.heads,
            "mamba_head_dim": ssm.headdim,
            "mamba_num_key_value_heads": None,
            "n_groups": ssm.ngroups,
            "mamba_d_mlp": ssm.branch,
            "D_has_hdim": ssm.D_has_hdim,
            "mamba_rms_norm": ssm.rmsnorm,
            "mamba_norm_before_gate": ssm.rmsnorm and ssm.norm_before_gate,
            "mamba_norm_eps": None,
            "mamba_use_pos_emb": False,
            "ssm_multipliers": None,
            "time_step_limit": None if (low, high) == (0, math.inf) else [float(low), float(high)],
        }

    def fields_of_attention(self, attention) -> dict:
        rotary = {"rope_type": "default", "rope_theta": float(attention.rotary_emb_base)}
        if 0 < attention.rotary_emb_dim < attention.head_dim:
            rotary["partial_rotary_factor"] = fraction_of(attention.rotary_emb_dim, attention.head_dim)
        return {
            "num_attention_heads": attention.num_heads,
            "num_key_value_heads": attention.num_heads_kv,
            "head_dim": attention.head_dim,
            "attention_bias": attention.qkv_proj_bias,
            "attention_out_bias": attention.out_proj_bias,
            "attention_conv_kernel": attention.d_conv,
            "softmax_scale": None if attention.softmax_scale is None else float(attention.softmax_scale),
            "position_embedding_type": "rope" if attention.rotary_emb_dim else "nope",
            "rope_parameters": rotary,
            "rope_interleave": bool(attention.rotary_emb_dim) and attention.rotary_emb_interleaved,
            "use_qk_norm": False,
            "key_multiplier": 1.0,
        }

    def from_bmojo(self, config):
        kinds = set(config.layers_block_type) - {"full_attention"}
        if not (kinds <= {"mamba"} or kinds <= {"mamba2"}):
            raise Refusal(
                f"layers_block_type has {', '.join(map(repr, sorted(kinds)))}; {self.name} has 'full_attention' beside "
                "'mamba' or beside 'mamba2'."
            )
        if (config.intermediate_size or 0) % MLP_MULTIPLE:
            raise Refusal(
                f"intermediate_size is {config.intermediate_size}; an MLP of {self.name} has a multiple of {MLP_MULTIPLE}."
            )
        tokens = config.unpadded_vocab_size or config.vocab_size
        multiple = next(
            (2**n for n in range(12) if round_up(tokens, 2**n) == config.vocab_size), config.vocab_size
        )  # the smallest one; padded to itself is always right
        attending = [i for i, kind in enumerate(config.layers_block_type) if kind == "full_attention"]
        return {
            "d_model": config.hidden_size,
            "d_intermediate": config.intermediate_size or 0,
            "n_layer": config.num_hidden_layers,
            "vocab_size": tokens,
            "ssm_cfg": self.ssm_cfg(config, *kinds) if kinds else {},
            "attn_layer_idx": attending,
            "attn_cfg": self.attn_cfg(config) if attending else {},
            "rms_norm": config.rms_norm,
            "residual_in_fp32": config.residual_in_fp32,
            "fused_add_norm": True,
            "pad_vocab_size_multiple": multiple,
            "tie_embeddings": config.tie_word_embeddings,
        }

    def ssm_cfg(self, config, kind: str) -> dict:
        inner = config.mamba_intermediate_size or config.expand * config.hidden_size
        if kind == "mamba2":
            inner = config.mamba_num_heads * config.mamba_head_dim + config.mamba_d_mlp
        whole = inner % config.hidden_size == 0
        found = {
            "layer": "Mamba1" if kind == "mamba" else "Mamba2",
            "d_state": config.state_size,
            "d_conv": config.conv_kernel,
            "expand": inner // config.hidden_size if whole else fraction_of(inner, config.hidden_size),
            "bias": config.use_bias,
            "conv_bias": config.use_conv_bias,
        }
        if kind == "mamba":
            return found | {"dt_rank": config.time_step_rank}
        return found | {
            "headdim": config.mamba_head_dim,
            "ngroups": config.n_groups,
            "d_ssm": inner - config.mamba_d_mlp if config.mamba_d_mlp else None,
            "D_has_hdim": config.D_has_hdim,
            "rmsnorm": config.mamba_rms_norm,
            "norm_before_gate": config.mamba_norm_before_gate,
            "dt_limit": config.time_step_limit or [0.0, math.inf],
        }

    def attn_cfg(self, config) -> dict:
        return {
            "causal": True,
            "num_heads": config.num_attention_heads,
            "num_heads_kv": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "qkv_proj_bias": config.attention_bias,
            "out_proj_bias": config.attention_out_bias,
            "softmax_scale": config.softmax_scale,
            "rotary_emb_dim": config.rotary_dim,
            "rotary_emb_base": config.rope_parameters["rope_theta"],
            "rotary_emb_interleaved": config.rope_interleave,
            "d_conv": config.attention_conv_kernel,
        }

    # -- tensors -------------------------------------------------------------------------------------------------------

    def tensors(self, config):
        found, ours = read(config), {}
        ours["model.embed_tokens.weight"] = [Piece("backbone.embedding.weight")]
        norm = ("weight",) if found.rms_norm else ("weight", "bias")
        for i, kind in enumerate(found.layers):
            here, there = f"model.layers.{i}.", f"backbone.layers.{i}."
            ours |= {f"{here}input_layernorm.{name}": [Piece(f"{there}norm.{name}")] for name in norm}
            mixer = self.attention(found.attention) if kind == "full_attention" else self.ssm(found.ssm)
            for name, (source, *rows) in mixer.items():
                ours[f"{here}mixer.{name}"] = [Piece(f"{there}mixer.{source}", *rows)]
            if found.mlp:
                ours |= {f"{here}post_attention_layernorm.{name}": [Piece(f"{there}norm2.{name}")] for name in norm}
                ours[f"{here}mlp.up_proj.weight"] = [Piece(f"{there}mlp.fc1.weight", 0, found.mlp)]
                ours[f"{here}mlp.gate_proj.weight"] = [Piece(f"{there}mlp.fc1.weight", found.mlp, 2 * found.mlp)]
                ours[f"{here}mlp.down_proj.weight"] = [Piece(f"{there}mlp.fc2.weight")]
        ours |= {f"model.norm.{name}": [Piece(f"backbone.norm_f.{name}")] for name in norm}
        if not found.tie_embeddings:
            ours["lm_head.weight"] = [Piece("lm_head.weight")]
        return ours

    def ssm(self, ssm) -> dict[str, tuple]:
        """Of one mixer: name in ours, name in theirs."""
        dt_bias = "dt_proj.bias" if ssm.kind == "mamba" else "dt_bias"
        names = {"dynamics.A_log": "A_log", "dynamics.D": "D", "dynamics.dt_bias": dt_bias}
        same = {name for name in self.shapes_of_ssm(ssm, 1) if name not in names.values()}
        return {name: (name,) for name in same} | {name: (source,) for name, source in names.items()}

    def attention(self, attention) -> dict[str, tuple]:
        """Of one mixer: name in ours, name and rows in theirs."""
        queries, keys = attention.num_heads * attention.head_dim, attention.num_heads_kv * attention.head_dim
        names, start = {}, 0
        for name, size in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            for kind in ("weight", "bias") if attention.qkv_proj_bias else ("weight",):
                names[f"{name}.{kind}"] = (f"in_proj.{kind}", start, start + size)
            start += size
        for kind in ("weight", "bias"):
            if attention.d_conv:
                names[f"conv1d.{kind}"] = (f"conv1d.{kind}",)
            if kind == "weight" or attention.out_proj_bias:
                names[f"o_proj.{kind}"] = (f"out_proj.{kind}",)
        return names

    def shapes(self, config):
        found = read(config)
        size, norm = found.d_model, ("weight",) if found.rms_norm else ("weight", "bias")
        shapes = {"backbone.embedding.weight": (found.vocab, size)}
        for i, kind in enumerate(found.layers):
            at = f"backbone.layers.{i}."
            shapes |= {f"{at}norm.{name}": (size,) for name in norm}
            if kind == "full_attention":
                mixer = self.shapes_of_attention(found.attention, size)
            else:
                mixer = self.shapes_of_ssm(found.ssm, size)
            shapes |= {f"{at}mixer.{name}": shape for name, shape in mixer.items()}
            if found.mlp:
                shapes |= {f"{at}norm2.{name}": (size,) for name in norm}
                shapes |= {f"{at}mlp.fc1.weight": (2 * found.mlp, size), f"{at}mlp.fc2.weight": (size, found.mlp)}
        shapes |= {f"backbone.norm_f.{name}": (size,) for name in norm}
        if not found.tie_embeddings:
            shapes["lm_head.weight"] = (found.vocab, size)
        return shapes

    def shapes_of_ssm(self, ssm, size: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of the tensors of one mixer."""
        if ssm.kind == "mamba":
            projected, convolved, read_out = 2 * ssm.inner, ssm.inner, ssm.inner
            shapes = {
                "A_log": (ssm.inner, ssm.d_state),
                "D": (ssm.inner,),
                "x_proj.weight": (ssm.rank + 2 * ssm.d_state, ssm.inner),
                "dt_proj.weight": (ssm.inner, ssm.rank),
                "dt_proj.bias": (ssm.inner,),
            }
        else:
            convolved, read_out = ssm.inner + 2 * ssm.ngroups * ssm.d_state, ssm.branch + ssm.inner
            projected = 2 * ssm.branch + ssm.inner + convolved + ssm.heads
            shapes = {"dt_bias": (ssm.heads,), "A_log": (ssm.heads,)}
            shapes["D"] = (ssm.inner if ssm.D_has_hdim else ssm.heads,)
            if ssm.rmsnorm:
                shapes["norm.weight"] = (ssm.inner,)
        shapes |= {"in_proj.weight": (projected, size), "out_proj.weight": (size, read_out)}
        shapes["conv1d.weight"] = (convolved, 1, ssm.d_conv)
        if ssm.bias:
            shapes |= {"in_proj.bias": (projected,), "out_proj.bias": (size,)}
        if ssm.conv_bias:
            shapes["conv1d.bias"] = (convolved,)
        return shapes

    def shapes_of_attention(self, attention, size: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of the tensors of one mixer."""
        queries = attention.num_heads * attention.head_dim
        joint = queries + 2 * attention.num_heads_kv * attention.head_dim
        shapes = {"in_proj.weight": (joint, size), "out_proj.weight": (size, queries)}
        if attention.qkv_proj_bias:
            shapes["in_proj.bias"] = (joint,)
        if attention.out_proj_bias:
            shapes["out_proj.bias"] = (size,)
        if attention.d_conv:
            shapes |= {"conv1d.weight": (joint, 1, attention.d_conv), "conv1d.bias": (joint,)}
        return shapes

    def duplicates(self, config):
        return {"lm_head.weight": "backbone.embedding.weight"} if read(config).tie_embeddings else {}

    def original(self, config, folder):
        """Transformers' port, which has one name of another spelling, where the model is one that it was made for."""
        from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

        found = read(config)
        ssm = found.ssm
        odd = found.attention is not None or found.mlp or not found.rms_norm or type(ssm.expand) is not int
        if odd or (ssm.kind == "mamba2" and (ssm.branch or ssm.D_has_hdim or ssm.norm_before_gate or not ssm.rmsnorm)):
            raise Refusal("transformers has no implementation of this model to compare with.")
        fields = {
            "vocab_size": found.vocab,
            "hidden_size": found.d_model,
            "num_hidden_layers": found.n_layer,
            "state_size": ssm.d_state,
            "conv_kernel": ssm.d_conv,
            "expand": ssm.expand,
            "use_bias": ssm.bias,
            "use_conv_bias": ssm.conv_bias,
            "tie_word_embeddings": found.tie_embeddings,
            "residual_in_fp32": found.residual_in_fp32,
            "layer_norm_epsilon": EPSILON,
            "pad_token_id": None,
        }
        if ssm.kind == "mamba":
            model = MambaForCausalLM(MambaConfig(**fields, time_step_rank=ssm.rank))
        else:
            own = {"head_dim": ssm.headdim, "num_heads": ssm.heads, "n_groups": ssm.ngroups}
            model = Mamba2ForCausalLM(Mamba2Config(**fields, **own, time_step_limit=tuple(ssm.dt_limit)))
        stored = read_checkpoint(folder)
        names = {name: name.replace("backbone.embedding.", "backbone.embeddings.") for name in self.shapes(config)}
        weights = {new: stored[name].whole().float() for name, new in names.items()}
        model.load_state_dict(weights, strict=not found.tie_embeddings)  # tied, lm_head.weight is the embedding
        return model

    def ignored(self, config):
        table = r"backbone\.layers\.\d+\.mixer\.rotary_emb\.inv_freq"
        return {table: "a table that follows from rotary_emb_dim and rotary_emb_base"}
