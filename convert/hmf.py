"""The authors' checkpoints: awslabs/hybrid-model-factory, Qwen3 with B'MOJO-F layers, bare SSMs and windowed attention.

What the fields mean and where tensors lie is written in `formats/hmf_checkpoint.md` of the project's shared folder. Fused
checkpoints of their first training stage become the standard model that their own tool makes of them.
"""

import json
import re
import warnings
from types import SimpleNamespace

from . import theirs
from .core import Format, Piece, Refusal
from .llama import MLP, PROJECTIONS, rope


SAME = (  # the name and meaning that they have here
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "hidden_act max_position_embeddings rms_norm_eps initializer_range tie_word_embeddings use_cache attention_bias"
)
SISTERS = ("hybrid_qwen2", "hybrid_qwen3_moe", "hybrid_llama", "hybrid_ministral3", "hybrid_qwen2_5_vl")
OWN = (  # fields that transformers' Qwen3 does not have, or has with another meaning
    "layer_types",
    "hybrid_override_pattern",
    "bmojo_config",
    "mamba2_config",
    "gka_config",
    "gdn_config",
    "swa_config",
)
KINDS = {
    "*": "full_attention",
    "SWA": "sliding_attention",
    "BMF": "bmojo",
    "M2": "mamba2",
    "GKA": "gated_kalmanet",
    "GDN": "gated_deltanet",
}
SYMBOLS = {kind: symbol for symbol, kind in KINDS.items()}
MIXERS = {  # spellings of bmojo_config.ssm_mixer
    "mamba2": "mamba2",
    "gdn": "gated_deltanet",
    "gated_deltanet": "gated_deltanet",
    "gka": "gated_kalmanet",
    "gated_kalmanet": "gated_kalmanet",
    "parallel_latent_sketch": "gated_kalmanet",
}
PREFIXES = {"mamba2": "mamba.", "gated_deltanet": "gdn.", "gated_kalmanet": "gka."}
BLOCKS = {"mamba2": "mamba2_config", "gated_deltanet": "gdn_config", "gated_kalmanet": "gka_config"}

# of each block: fields with their type and default (... where it must be given), and copies of other fields
FLAG, COUNT, NUMBER, RANK, TEXT = "true or false", "a whole number", "a number", "null or a whole number", "a string"
BMOJO = {"window_size": (COUNT, ...), "tie_attn_weights": (FLAG, ...), "ssm_mixer": (TEXT, "mamba2")}
MAMBA2 = {"use_qk_norm": (FLAG, True), "use_pos_emb": (FLAG, False)}
GDN = {
    "use_gate": (FLAG, True),
    "use_short_conv": (FLAG, True),
    "allow_neg_eigval": (FLAG, False),
    "conv_size": (COUNT, 4),
    "conv_bias": (FLAG, False),
    "norm_eps": (NUMBER, 1e-5),
    "kv_proj_rank": (RANK, None),
    "kv_learnable_residual": (FLAG, False),
}
GKA = {
    "conv_size": (COUNT, 4),
    "num_iter": (COUNT, 30),
    "ridge_strength": (NUMBER, 0.02),
    "norm_eps": (NUMBER, 1e-6),
    "use_alpha_connection": (FLAG, True),
    "use_v_conv": (FLAG, True),
    "use_forgetting_gate": (FLAG, True),
    "use_forgetting_gate_kk": (FLAG, True),
    "use_beta_gate": (FLAG, True),
    "use_gate": (FLAG, True),
    "gla_rescale": (FLAG, True),
    "solver_type": (TEXT, "chebyshev"),
    "bp_lambda": (FLAG, True),
    "kv_proj_rank": (RANK, None),
    "kv_learnable_residual": (FLAG, False),
}
INFORMATION = {  # entries that their code works out again from the top level
    "bmojo_config": "hidden_size num_heads num_key_value_heads head_dim rms_norm_eps",
    "mamba2_config": "d_model d_inner d_xb hidden_act intermediate_size n_layer rms_norm_eps ssm_cfg hidden_size",
    "gka_config": "chunk_size",
    "gdn_config": "chunk_size",
    "swa_config": "hidden_size num_heads num_key_value_heads head_dim rms_norm_eps",
}
OFF = ("xb_learnable_residual",)  # entries of variants that are not converted, which false switches off as null does
COPIES = {  # entries of gka_config and gdn_config that must agree with the top level
    "hidden_size": "hidden_size",
    "head_dim": "head_dim",
    "num_q_heads": "num_attention_heads",
    "num_k_heads": "num_key_value_heads",
    "num_v_heads": "num_key_value_heads",
}
GATED_NORM_EPS, BC_NORM_EPS = 1e-5, 1e-6  # fixed in their Mamba2


def read_block(config: dict, name: str, fields: dict, copies: dict) -> SimpleNamespace:
    """The values of one nested block of config.json, defaults filled in.

    Args:
        config: the fields of config.json.
        name: of the block; one that is missing has the defaults.
        fields: what it may hold, with type and default.
        copies: further entries and the value that each must have.

    Raises:
        Refusal: an entry is unknown, missing, of a wrong type, or contradicts the top level; names it.
    """
    block = config.get(name)
    block = {} if block is None else block
    if not isinstance(block, dict):
        raise Refusal(f"{name} is {json.dumps(block)[:200]}; it must be a group of fields.")
    for key, value in block.items():
        if key in copies and value not in (None, copies[key]):
            raise Refusal(f"{name}.{key} is {json.dumps(value)}, the model's own is {copies[key]!r}; they must agree.")
        known = key in fields or key in copies or key in INFORMATION[name].split()
        off = value is None or (value is False and key in OFF)
        if not known and not off:
            raise Refusal(
                f"{name}.{key} is {json.dumps(value)[:200]}, which this converter does not know: it could change the logits."
            )
    nested = block.get("ssm_cfg") if name == "mamba2_config" else None
    if nested is not None and not isinstance(nested, dict):
        raise Refusal(f"{name}.ssm_cfg is {json.dumps(nested)[:200]}; it must be a group of fields.")
    for key, value in (nested or {}).items():
        if key not in ("expand", "ngroups", "d_state") and value is not None:
            raise Refusal(f"{name}.ssm_cfg.{key} is {json.dumps(value)[:200]}: its effect is not known.")
    found = {key: check_type(name, key, block.get(key), *expected) for key, expected in fields.items()}
    return SimpleNamespace(**found)


def check_type(block: str, key: str, value, kind: str, default):
    if value is None and kind != RANK:
        if default is ...:
            raise Refusal(f"{block}.{key} is missing; it must be {kind}.")
        return default
    fits = {
        FLAG: type(value) is bool,
        COUNT: type(value) is int and value >= 0,
        NUMBER: type(value) in (int, float) and 0 < value < float("inf"),
        RANK: value is None or (type(value) is int and value > 0),
        TEXT: type(value) is str,
    }
    if not fits[kind]:
        raise Refusal(f"{block}.{key} is {json.dumps(value)[:200]}; it must be {kind}.")
    return float(value) if kind == NUMBER else value


def standard(symbol: str) -> tuple[str, str | None]:
    """The symbol of a layer in the standard model, and of the mixer that taught it in a fused one: "BMF*" gives "BMF", "*".

    Raises:
        Refusal: there is no such symbol.
    """
    teacher, student = None, symbol
    if symbol == "*DA":
        student = "*"
    elif ">" in symbol:
        teacher, student = symbol.split(">", 1)
    elif len(symbol) > 1 and symbol.endswith("*"):
        teacher, student = "*", symbol[:-1]
    if student not in KINDS or (teacher is not None and (teacher not in KINDS or student == "*")):
        raise Refusal(
            f"hybrid_override_pattern has the layer {symbol!r}; known are {', '.join(KINDS)}, and fused ones of them such "
            "as *DA, BMF* and GDN>GKA."
        )
    return student, teacher


class HMF(Format):
    """`hybrid_qwen3`, standard or fused."""

    name = "hmf"
    model_types = ("hybrid_qwen3", *SISTERS)

    def read(self, config: dict) -> SimpleNamespace:
        """Their configuration: the fields of Qwen3 that count, and what follows from the others.

        Returns:
            Beside fields of Qwen3: `layers` and `teachers`, symbols (None for no teacher); `ssm_type`, None without SSMs, and
            `own`, the block of its options; `window`; `tied`, whether fading keys share the window's projections.

        Raises:
            Refusal: as `Format.to_bmojo`.
        """
        if config.get("model_type") != "hybrid_qwen3":
            raise Refusal(
                f"model_type is {config.get('model_type')!r}: of hybrid-model-factory only 'hybrid_qwen3' is converted, "
                "the sister types could not be compared with the original."
            )
        plain = {name: value for name, value in config.items() if name not in OWN}
        used = f"{SAME} rope_parameters rope_theta rope_scaling attention_dropout"
        found = theirs.read(plain, "qwen3", used, "sliding_window use_sliding_window max_window_layers", self.name)
        if found.attention_dropout:
            raise Refusal(
                f"attention_dropout is {found.attention_dropout}; it acts in their eval mode, too: set it to 0."
            )
        if found.hidden_act not in ("silu", "swish"):
            raise Refusal(f"hidden_act is {found.hidden_act!r}; {self.name} is converted with 'silu'.")
        read = SimpleNamespace(**{name: getattr(found, name) for name in SAME.split()})
        read.rope_parameters, read.special_tokens = rope(found.rope_parameters), theirs.special_tokens(found)
        if read.rope_parameters["rope_type"] != "default":
            raise Refusal(
                f"rope_type is {read.rope_parameters['rope_type']!r}; {self.name} is converted with 'default'."
            )
        self.read_layers(config, read)
        self.read_mixers(config, read)
        return read

    def read_layers(self, config: dict, read: SimpleNamespace) -> None:
        pattern = config.get("hybrid_override_pattern")
        if not isinstance(pattern, str) or not pattern:
            raise Refusal(
                f"hybrid_override_pattern is {json.dumps(pattern)[:200]}; it must name the layers, as in '*-BMF-*-BMF'."
            )
        pairs = [standard(symbol) for symbol in pattern.split("-")]
        if len(pairs) != read.num_hidden_layers:
            raise Refusal(
                f"hybrid_override_pattern names {len(pairs)} layers, num_hidden_layers is {read.num_hidden_layers}."
            )
        read.layers, read.teachers = ([*column] for column in zip(*pairs, strict=True))

    def read_mixers(self, config: dict, read: SimpleNamespace) -> None:
        kinds = {KINDS[symbol] for symbol in read.layers}
        ssm_types, windows, read.tied = kinds & BLOCKS.keys(), set(), True
        if "bmojo" in kinds:
            bmojo = read_block(config, "bmojo_config", BMOJO, {})
            mixer = bmojo.ssm_mixer.lower()
            if mixer not in MIXERS:
                raise Refusal(f"bmojo_config.ssm_mixer is {bmojo.ssm_mixer!r}; known are {', '.join(MIXERS)}.")
            ssm_types, read.tied = ssm_types | {MIXERS[mixer]}, bmojo.tie_attn_weights
            windows.add(bmojo.window_size)
        if "sliding_attention" in kinds:
            windows.add(read_block(config, "swa_config", {"window_size": (COUNT, ...)}, {}).window_size)
        if len(ssm_types) > 1:
            raise Refusal(
                f"hybrid_override_pattern and bmojo_config.ssm_mixer mix {' and '.join(sorted(ssm_types))}: a model has SSMs "
                "of one kind, in their own serving plugin as well."
            )
        if len(windows) > 1:
            raise Refusal(
                f"bmojo_config.window_size and swa_config.window_size differ, {bmojo.window_size} and "
                f"{(windows - {bmojo.window_size}).pop()}: here all layers of a model have one sliding_window."
            )
        read.window = windows.pop() if windows else None
        read.ssm_type = ssm_types.pop() if ssm_types else None
        if read.ssm_type == "mamba2":
            read.own = read_block(config, "mamba2_config", MAMBA2, {})
        elif read.ssm_type is not None:
            copies = {name: getattr(read, source) for name, source in COPIES.items()}
            fields = GKA if read.ssm_type == "gated_kalmanet" else GDN
            read.own = read_block(config, BLOCKS[read.ssm_type], fields, copies)
        if read.ssm_type == "gated_kalmanet" and read.own.solver_type != "chebyshev":
            raise Refusal(f"gka_config.solver_type is {read.own.solver_type!r}; only 'chebyshev' is converted.")

    # -- configurations ------------------------------------------------------------------------------------------------

    def to_bmojo(self, config):
        read = self.read(config)
        fields = {name: getattr(read, name) for name in SAME.split()}
        fields |= {
            "rope_parameters": read.rope_parameters,
            "mlp_bias": False,
            "use_qk_norm": True,
            "layers_block_type": [KINDS[symbol] for symbol in read.layers],
            **read.special_tokens,
        }
        if read.window is not None:
            fields["sliding_window"] = read.window
            if read.window > 1 and read.window & (read.window + 1) == 0:
                warnings.warn(
                    f"window_size is {read.window}, one less than a power of two: it is taken literally, as by the code that "
                    "trains such models; the authors' serving plugin adds 1.",
                    stacklevel=2,
                )
        if "BMF" in read.layers:
            fields |= {
                "ssm_type": read.ssm_type,
                "eidetic_size": 0,
                "fading_span": True,
                "tie_attn_weights": read.tied,
                "fading_query": not read.tied,
            }
        return fields | (self.ssm_fields(read) if read.ssm_type is not None else {})

    def ssm_fields(self, read) -> dict:
        own = read.own
        if read.ssm_type == "mamba2":
            return {
                "use_bias": False,
                "use_conv_bias": True,
                "conv_kernel": 4,
                "mamba_num_heads": read.num_attention_heads,
                "mamba_head_dim": read.head_dim,
                "n_groups": read.num_attention_heads,
                "state_size": read.head_dim,
                "mamba_num_key_value_heads": read.num_key_value_heads,
                "mixer_norm": "learned" if own.use_qk_norm else None,
                "mixer_rms_eps": BC_NORM_EPS,
                "mamba_use_pos_emb": own.use_pos_emb,
                "mamba_rms_norm": True,
                "mamba_norm_before_gate": False,
                "mamba_norm_eps": GATED_NORM_EPS,
            }
        fields = {
            "use_bias": False,
            "conv_kernel": own.conv_size,
            "mamba_norm_eps": None if own.norm_eps == read.rms_norm_eps else own.norm_eps,
            "use_gate": own.use_gate,
            "kv_proj_rank": own.kv_proj_rank,
            "kv_learnable_residual": own.kv_learnable_residual and own.kv_proj_rank is not None,
        }
        if read.ssm_type == "gated_deltanet":
            same = "use_short_conv allow_neg_eigval"
            fields |= {"use_conv_bias": own.conv_bias, "use_v_conv": True}
        else:
            same = (
                "num_iter ridge_strength bp_lambda use_alpha_connection use_v_conv use_beta_gate use_forgetting_gate "
                "use_forgetting_gate_kk gla_rescale"
            )
            fields |= {"use_conv_bias": False, "use_short_conv": True}
        return fields | {name: getattr(own, name) for name in same.split()}

    def from_bmojo(self, config):
        for number, kind in enumerate(config.layers_block_type):
            if kind not in SYMBOLS:
                raise Refusal(
                    f"layers_block_type has {kind!r} for layer {number}; {self.name} has {', '.join(map(repr, SYMBOLS))}."
                )
        layers = [SYMBOLS[kind] for kind in config.layers_block_type]
        if config.intermediate_size is None:
            raise Refusal(f"intermediate_size is None: every layer of {self.name} has an MLP.")
        fields = {
            "architectures": ["HybridQwen3ForCausalLM"],
            "model_type": "hybrid_qwen3",
            **{name: getattr(config, name) for name in SAME.split()},
            "rope_parameters": dict(config.rope_parameters),
            **theirs.special_tokens(config),
            "attention_dropout": 0.0,
            "sliding_window": None,
            "use_sliding_window": False,
            "hybrid_override_pattern": "-".join(layers),
            "layer_types": layers,
        }
        if "BMF" in layers:
            self.export_bmojo(config, fields)
        if "SWA" in layers:
            fields["swa_config"] = {"window_size": config.sliding_window}
        if len(config.ssm_types) > 1:
            raise Refusal(
                f"layers_block_type and ssm_type mix {' and '.join(sorted(config.ssm_types))}; {self.name} has SSMs of one kind."
            )
        for ssm_type in config.ssm_types:
            fields[BLOCKS[ssm_type]] = self.export_ssm(config, ssm_type)
        return fields

    def export_bmojo(self, config, fields: dict) -> None:
        if config.ssm_type not in BLOCKS:
            raise Refusal(f"ssm_type is {config.ssm_type!r}; {self.name} has {', '.join(map(repr, BLOCKS))}.")
        if config.eidetic_size:
            raise Refusal(f"eidetic_size is {config.eidetic_size}; layers of {self.name} have no eidetic memory.")
        fields["bmojo_config"] = {
            "window_size": config.sliding_window,
            "tie_attn_weights": config.tie_attn_weights,
            "ssm_mixer": {"mamba2": "mamba2", "gated_deltanet": "gdn", "gated_kalmanet": "gka"}[config.ssm_type],
            "hidden_size": config.hidden_size,
            "num_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "rms_norm_eps": config.rms_norm_eps,
        }

    def export_ssm(self, config, ssm_type: str) -> dict:
        """The block of the SSM's options; the engine compares what it means with the configuration."""
        if ssm_type == "mamba2":
            heads, head_dim = config.num_attention_heads, config.head_dim
            return {
                "use_qk_norm": config.mixer_norm is not None,
                "use_pos_emb": config.mamba_use_pos_emb,
                "d_model": config.hidden_size,
                "d_inner": heads * head_dim,
                "d_xb": config.num_key_value_heads * head_dim,
                "hidden_act": config.hidden_act,
                "intermediate_size": config.intermediate_size,
                "n_layer": config.num_hidden_layers,
                "rms_norm_eps": config.rms_norm_eps,
                "ssm_cfg": {"d_state": head_dim, "expand": 1, "ngroups": heads},
            }
        other = {  # under another name
            "conv_size": config.conv_kernel,
            "conv_bias": config.use_conv_bias,
            "norm_eps": config.rms_norm_eps if config.mamba_norm_eps is None else config.mamba_norm_eps,
            "solver_type": "chebyshev",
        }
        fields = GDN if ssm_type == "gated_deltanet" else GKA
        block = {name: other[name] if name in other else getattr(config, name) for name in fields}
        if ssm_type == "gated_kalmanet":
            block["chunk_size"] = 64  # their default; of their kernels' speed alone
        return block | {name: getattr(config, source) for name, source in COPIES.items()}

    # -- tensors -------------------------------------------------------------------------------------------------------

    def layout(self, config: dict) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
        """By our name the tensors of theirs that follow each other in it, with their shapes."""
        read = self.read(config)
        size, inner = read.hidden_size, read.intermediate_size
        names = {"model.embed_tokens.weight": [("model.embed_tokens.weight", (read.vocab_size, size))]}
        for number, symbol in enumerate(read.layers):
            at = f"model.layers.{number}."
            for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
                names[at + name] = [(at + name, (size,))]
            for name in MLP:
                shape = (size, inner) if name == "down_proj" else (inner, size)
                names[f"{at}mlp.{name}.weight"] = [(f"{at}mlp.{name}.weight", shape)]
            for ours, parts in self.mixer(read, symbol).items():
                names[f"{at}mixer.{ours}"] = [(at + name, shape) for name, shape in parts]
        names["model.norm.weight"] = [("model.norm.weight", (size,))]
        if not read.tie_word_embeddings:
            names["lm_head.weight"] = [("lm_head.weight", (read.vocab_size, size))]
        return names

    def mixer(self, read, symbol: str) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
        """As `layout`, for the mixer of a layer."""
        if symbol == "*":
            return self.attention(read, "self_attn.")
        if symbol == "SWA":
            return self.attention(read, "swa.")
        if symbol != "BMF":
            return self.ssm(read, PREFIXES[read.ssm_type])
        names = self.attention(read, "bmojo_f.bmojo_attn.")
        if not read.tied:
            again = self.attention(read, "bmojo_f.bmojo_attn.", "_")
            names |= {f"fading_{ours}": parts for ours, parts in again.items() if not ours.startswith("o_proj")}
        ssm = self.ssm(read, f"bmojo_f.{PREFIXES[read.ssm_type]}")
        return names | {f"fading.{ours}": parts for ours, parts in ssm.items()}

    def attention(self, read, prefix: str, suffix: str = ""):
        queries, keys = read.num_attention_heads * read.head_dim, read.num_key_value_heads * read.head_dim
        sizes = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": read.hidden_size}
        names = {}
        for name in PROJECTIONS:
            shape = (sizes[name], queries if name == "o_proj" else read.hidden_size)
            names[f"{name}.weight"] = [(f"{prefix}{name}{suffix}.weight", shape)]
            if read.attention_bias:
                names[f"{name}.bias"] = [(f"{prefix}{name}{suffix}.bias", shape[:1])]
        for name in ("q_norm", "k_norm"):
            names[f"{name}.weight"] = [(f"{prefix}{name}{suffix}.weight", (read.head_dim,))]
        return names

    def ssm(self, read, prefix: str):
        own, size, heads, depth = read.own, read.hidden_size, read.num_attention_heads, read.head_dim
        queries, keys = heads * depth, read.num_key_value_heads * depth
        names = {f"dynamics.{name}": [(prefix + name, (heads,))] for name in ("A_log", "dt_bias")}
        if read.ssm_type == "mamba2":
            convolved = queries + 2 * keys
            shapes = {
                "in_proj.weight": (queries + convolved + heads, size),
                "conv1d.weight": (convolved, 1, 4),
                "conv1d.bias": (convolved,),
                "norm.weight": (queries,),
                "out_proj.weight": (size, queries),
            }
            if own.use_qk_norm:
                shapes |= {"B_norm.weight": (depth,), "C_norm.weight": (depth,)}
            names["dynamics.D"] = [(f"{prefix}D", (heads,))]
            return names | {name: [(prefix + name, shape)] for name, shape in shapes.items()}

        is_delta = read.ssm_type == "gated_deltanet"
        widths = {"q": queries, "k": keys, "v": keys}
        rows = {f"{name}_proj": width for name, width in widths.items()}
        if own.use_gate:
            rows["g_proj"] = queries
        rows |= {"gk_proj": heads, "b_proj": heads} if is_delta else {"a_proj": heads}
        names["in_proj.weight"] = [(f"{prefix}{name}.weight", (width, size)) for name, width in rows.items()]
        if not is_delta:
            for name, used in (("b_proj", own.use_beta_gate), ("alpha_proj", own.use_alpha_connection)):
                if used:
                    names[f"{name}.weight"] = [(f"{prefix}{name}.weight", (heads, size))]
                    names[f"{name}.bias"] = [(f"{prefix}{name}.bias", (heads,))]
        elif not own.use_short_conv:
            widths = {}
        if not is_delta and not own.use_v_conv:
            del widths["v"]
        if widths:
            taps = own.conv_size
            names["conv1d.weight"] = [(f"{prefix}{n}_conv1d.weight", (w, 1, taps)) for n, w in widths.items()]
            if is_delta and own.conv_bias:
                names["conv1d.bias"] = [(f"{prefix}{n}_conv1d.bias", (w,)) for n, w in widths.items()]
        names["norm.weight"] = [(f"{prefix}o_norm.weight", (depth,))]
        names["out_proj.weight"] = [(f"{prefix}o_proj.weight", (size, queries))]
        if own.kv_proj_rank is not None and queries > keys:
            for name in ("k", "v"):
                low, high = (own.kv_proj_rank, keys), (queries, own.kv_proj_rank)
                names[f"expand_{name}.down_proj.weight"] = [(f"{prefix}proj_{name}.linearA.weight", low)]
                names[f"expand_{name}.up_proj.weight"] = [(f"{prefix}proj_{name}.linearB.weight", high)]
                if own.kv_learnable_residual:
                    shape = (heads, read.num_key_value_heads)
                    names[f"expand_{name}.mixture"] = [(f"{prefix}{name}_rep", shape)]
        return names

    def tensors(self, config):
        return {ours: [Piece(name) for name, _ in parts] for ours, parts in self.layout(config).items()}

    def shapes(self, config):
        return dict(part for parts in self.layout(config).values() for part in parts)

    def duplicates(self, config):
        return {"lm_head.weight": "model.embed_tokens.weight"} if self.read(config).tie_word_embeddings else {}

    def ignored(self, config):
        """What only the teacher of a fused layer uses: its attention, and the mixer before the ">"."""
        read, found = self.read(config), {}
        for number, (symbol, teacher) in enumerate(zip(read.layers, read.teachers, strict=True)):
            if teacher is None:
                continue
            prefixes = {"self_attn."}
            if teacher != "*":
                own = "bmojo_f." if teacher == "BMF" else "swa." if teacher == "SWA" else PREFIXES[KINDS[teacher]]
                prefixes.add(own)
            for prefix in sorted(prefixes):
                reason = f"the teacher's part of a fused layer, which becomes {symbol!r} as in their standard form"
                found[re.escape(f"model.layers.{number}.{prefix}") + ".*"] = reason
        return found
