"""Transformers whose blocks are ours: Llama, Mistral and Qwen3 as transformers has them."""

from . import theirs
from .core import Refusal, Renaming


ROPE_KEYS = {  # rotary parameters of the kinds whose frequencies do not depend on the length
    "default": "",
    "linear": "factor",
    "llama3": "factor original_max_position_embeddings low_freq_factor high_freq_factor",
    "yarn": "factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale mscale_all_dim truncate",
}
SAME = (  # the name and meaning that they have here
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "hidden_act max_position_embeddings rms_norm_eps initializer_range tie_word_embeddings use_cache"
)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def rope(parameters: dict) -> dict:
    """Rotary parameters that mean the same here.

    Raises:
        Refusal: of another kind, or with a key that this kind does not have.
    """
    found = {key: value for key, value in parameters.items() if key != "type"}
    kind = found.get("rope_type")
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        why = (
            "its frequencies change with the length of the text"
            if kind in ("dynamic", "longrope")
            else "not known here"
        )
        raise Refusal(f"rope_type is {kind!r}: {why}. Converted are {', '.join(map(repr, ROPE_KEYS))}.")
    if found.get("partial_rotary_factor") == 1:
        del found["partial_rotary_factor"]
    unknown = sorted(found.keys() - {"rope_type", "rope_theta", *ROPE_KEYS[kind].split()})
    if unknown:
        raise Refusal(
            f"rope_parameters has {unknown[0]} = {found[unknown[0]]!r}, which {kind!r} rotary embeddings have not."
        )
    return found


class Dense(Renaming):
    """What Llama, Mistral and Qwen3 share: names of tensors, and the fields that mean the same everywhere."""

    architecture: str
    own: str  # further fields that this family has
    biases = ()  # ours, of those that this family has under the same name

    @property
    def model_types(self):
        return (self.name,)

    def read(self, config: dict):
        used = f"{SAME} rope_parameters rope_theta rope_scaling {self.own}"
        found = theirs.read(config, self.name, used, "attention_dropout pretraining_tp")
        if found.head_dim is None or found.num_key_value_heads is None:
            raise Refusal("head_dim and num_key_value_heads must be numbers.")
        return found

    def layers(self, found) -> list[str]:
        """The kinds of all layers."""
        return ["full_attention"] * found.num_hidden_layers

    def to_bmojo(self, config):
        found = self.read(config)
        fields = {name: getattr(found, name) for name in SAME.split()}
        fields |= {"attention_bias": False, "mlp_bias": False} | {name: getattr(found, name) for name in self.biases}
        layers = self.layers(found)
        if "sliding_attention" in layers:
            fields["sliding_window"] = found.sliding_window
        return fields | {
            "layers_block_type": layers,
            "rope_parameters": rope(found.rope_parameters),
            "use_qk_norm": self.name == "qwen3",
            **theirs.special_tokens(found),
        }

    def from_bmojo(self, config):
        if config.intermediate_size is None:
            raise Refusal(f"intermediate_size is None: every layer of {self.name} has an MLP.")
        fields = {name: getattr(config, name) for name in SAME.split()}
        fields |= {name: getattr(config, name) for name in self.biases}
        fields |= {"rope_parameters": dict(config.rope_parameters), **theirs.special_tokens(config)}
        return theirs.write(self.name, self.architecture, fields | self.export_layers(config))

    def export_layers(self, config) -> dict:
        """Fields of theirs that say which kind the layers are."""
        self.only(config, "full_attention")
        return {}

    def only(self, config, *kinds: str):
        for number, kind in enumerate(config.layers_block_type):
            if kind not in kinds:
                allowed = " or ".join(map(repr, kinds))
                raise Refusal(f"layers_block_type has {kind!r} for layer {number}; {self.name} has {allowed} only.")

    def names(self, found) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name in our model, name and shape in theirs, of every tensor."""
        size, inner, depth = found.hidden_size, found.intermediate_size, found.head_dim
        queries, keys = found.num_attention_heads * depth, found.num_key_value_heads * depth
        sizes = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": size}
        embedding = (found.vocab_size, size)
        names = {name: (name, embedding) for name in ("model.embed_tokens.weight",)}
        for layer in range(found.num_hidden_layers):
            at = f"model.layers.{layer}."
            for name in PROJECTIONS:
                shape = (sizes[name], queries if name == "o_proj" else size)
                names[f"{at}mixer.{name}.weight"] = (f"{at}self_attn.{name}.weight", shape)
                if getattr(found, "attention_bias", False):
                    names[f"{at}mixer.{name}.bias"] = (f"{at}self_attn.{name}.bias", shape[:1])
            if self.name == "qwen3":
                for name in ("q_norm", "k_norm"):
                    names[f"{at}mixer.{name}.weight"] = (f"{at}self_attn.{name}.weight", (depth,))
            for name in MLP:
                shape = (size, inner) if name == "down_proj" else (inner, size)
                names[f"{at}mlp.{name}.weight"] = (f"{at}mlp.{name}.weight", shape)
                if getattr(found, "mlp_bias", False):
                    names[f"{at}mlp.{name}.bias"] = (f"{at}mlp.{name}.bias", shape[:1])
            for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
                names[at + name] = (at + name, (size,))
        names["model.norm.weight"] = ("model.norm.weight", (size,))
        if not found.tie_word_embeddings:
            names["lm_head.weight"] = ("lm_head.weight", embedding)
        return names

    def ignored(self, config):
        return {r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq": "a table that follows from rope_theta"}


class Llama(Dense):
    name, architecture = "llama", "LlamaForCausalLM"
    own = "attention_bias mlp_bias"
    biases = ("attention_bias", "mlp_bias")


class Mistral(Dense):
    name, architecture = "mistral", "MistralForCausalLM"
    own = "sliding_window"

    def layers(self, found):
        kind = "full_attention" if found.sliding_window is None else "sliding_attention"
        return [kind] * found.num_hidden_layers

    def export_layers(self, config):
        kind = config.layers_block_type[0]
        self.only(config, *({"full_attention", "sliding_attention"} & {kind} or {"sliding_attention"}))
        return {"sliding_window": config.sliding_window if kind == "sliding_attention" else None}


class Qwen3(Dense):
    name, architecture = "qwen3", "Qwen3ForCausalLM"
    own = "attention_bias use_sliding_window sliding_window max_window_layers layer_types"
    biases = ("attention_bias",)

    def layers(self, found):
        layers = list(found.layer_types)
        unknown = sorted(set(layers) - {"full_attention", "sliding_attention"})
        if unknown or len(layers) != found.num_hidden_layers:
            raise Refusal(
                f"layer_types is {layers} for {found.num_hidden_layers} layers; full_attention and "
                "sliding_attention are converted, one for every layer."
            )
        if "sliding_attention" in layers and found.sliding_window is None:
            raise Refusal(
                "layer_types has 'sliding_attention', but use_sliding_window or sliding_window says no window."
            )
        return layers

    def export_layers(self, config):
        self.only(config, "full_attention", "sliding_attention")
        layers = list(config.layers_block_type)
        slides = "sliding_attention" in layers
        return {
            "layer_types": layers,
            "max_window_layers": layers.index("sliding_attention") if slides else len(layers),
            "use_sliding_window": slides,
            "sliding_window": config.sliding_window if slides else None,
        }
