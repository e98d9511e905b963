"""Configuration of B'MOJO: names, defaults and checks of every field. No mathematics lives here."""

import math

import transformers
from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters


MINIMUM_TRANSFORMERS = (5, 23)  # what the tests run with: strict dataclass configs, caches that roll back
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < MINIMUM_TRANSFORMERS:
    raise ImportError(
        f"B'MOJO needs transformers {'.'.join(map(str, MINIMUM_TRANSFORMERS))} or newer, found "
        f"{transformers.__version__}: pip install -U transformers"
    )


AUTO_MAP = {
    "AutoConfig": "configuration_bmojo.BMojoConfig",
    "AutoModel": "modeling_bmojo.BMojoModel",
    "AutoModelForCausalLM": "modeling_bmojo.BMojoForCausalLM",
    "AutoModelForSequenceClassification": "modeling_bmojo.BMojoForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_bmojo.BMojoForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_bmojo.BMojoForQuestionAnswering",
}
DELTA_TYPES = ("gated_deltanet", "gated_kalmanet")  # the SSMs whose heads are those of attention
SSM_TYPES = ("mamba", "mamba2", *DELTA_TYPES)
BMOJO_TYPES = ("bmojo", "bmojo_f")
LAYER_TYPES = (*BMOJO_TYPES, *SSM_TYPES, "sliding_attention", "full_attention", "hybrid")
POSITION_EMBEDDING_TYPES = ("rope", "nope")
MIXER_NORMS = (None, "learned", "weightless")
EIDETIC_POSITIONS = ("constant", "rank")
LEARNED_CHOICES = ("average", "exponential", "learnable")  # predictors that look at the signal
INNOVATION_SIGNALS = ("ssm_output", "layer_input")
CONTROL_CHOICES = ("random", "recent", "oldest")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # the ones whose frequencies do not depend on the length


@strict
class BMojoConfig(PreTrainedConfig):
    r"""Configuration of a B'MOJO model (arXiv 2407.06324).

    Fields that transformers already names mean here what they mean there. The others:

    Args:
        layers_block_type (`list[str]`, *optional*): the mixer of every layer, one of `"bmojo"`, `"bmojo_f"`, `"mamba"`,
            `"mamba2"`, `"gated_deltanet"`, `"gated_kalmanet"`, `"sliding_attention"`, `"full_attention"`, `"hybrid"`. All
            `"bmojo"` where None. A `"bmojo_f"` layer is one without eidetic memory, whatever `eidetic_size` says (the paper's
            B'MOJO-F), with the same weights but a learnable predictor's. A `"hybrid"` layer is that of Falcon-H1: full
            attention and the SSM of `ssm_type` read the same input, and their outputs are added.
        intermediate_size (`int`, *optional*): width of the SwiGLU MLP; None for layers without MLP, as in Mamba.
        initializer_range (`float`, *optional*): standard deviation of embeddings and projections; where None
            `hidden_size ** -0.5`, since the usual 0.02 stalls small models on associative recall.
        sliding_window (`int`): w, how many last tokens a query sees exactly, itself included.
        position_embedding_type (`str`): `"rope"`, or `"nope"` for attention that knows no positions, as Jamba's.
        rope_parameters (`dict`, *optional*): as in transformers; with a `partial_rotary_factor` only the first
            `int(head_dim * partial_rotary_factor)` entries of a head are rotated.
        rope_interleave (`bool`): rotate neighbours, entries 2i and 2i + 1, and not entries i and i + half (as DeepSeek-V3).
        softmax_scale (`float`, *optional*): factor on the scores of attention; `head_dim ** -0.5` where None.
        key_multiplier (`float`): factor on the keys, after their norm.
        attention_bias (`bool`): bias of the query, key and value projections, and of the output's unless that is said in
            attention_out_bias (`bool`, *optional*).
        attention_conv_kernel (`int`): taps of a causal depthwise convolution, with bias and without activation, over queries,
            keys and values before norm and rotation (`d_conv` of state-spaces/mamba's attention); 0: none. Not for
            `bmojo` layers.
        rms_norm (`bool`): False: LayerNorm with bias, and rms_norm_eps for its epsilon, around the mixers and at the end.
        residual_in_fp32 (`bool`): keep the residual stream in float32 where the weights are of half precision.
        unpadded_vocab_size (`int`, *optional*): tokens of the tokenizer, where the rows of the embedding from there to
            vocab_size only fill it up; None: all are tokens. Logits exist for all.
        embedding_multiplier, lm_head_multiplier (`float`): factors on the embeddings of `input_ids` and on the logits.
        mlp_multipliers (`list[float]`, *optional*): factors on the gate before its activation, and on the MLP's output.
        attention_in_multiplier, attention_out_multiplier, ssm_in_multiplier, ssm_out_multiplier (`float`): factors on the
            inputs and outputs of attention and SSM of `hybrid` layers.
        ssm_multipliers (`list[float]`, *optional*): factors on the parts z, x, B, C, dt of `mamba2`'s input projection.
        projectors_bias (`bool`, *optional*): bias of the SSM's output projection; where None `use_bias`, which is that of its
            input projection, too.
        ssm_type (`str`): the fading memory of a `bmojo` layer, and the SSM of a `hybrid` one: `"mamba2"` (SSD, a scalar decay
            per head), `"mamba"` (S6, a decay per channel and state), `"gated_deltanet"` (arXiv 2412.06464) or `"gated_kalmanet"` (the authors'
            ridge regression on the past). The last two have the heads of attention, a state of head_dim x head_dim for each
            of them (GKA: two), and share with Mamba `conv_kernel`, `use_conv_bias`, `use_bias` and `chunk_size`.
        state_size (`int`, *optional*): SSM state per channel; 64 for `mamba2`, 16 for `mamba` where None. A list of layers
            that mixes both kinds of SSM shares it.
        mamba_num_heads, mamba_head_dim, n_groups: heads of `mamba2`, channels per head, groups that share B and C.
        mamba_num_key_value_heads (`int`, *optional*): so many heads of x and B in `mamba2`, each repeated for several
            heads of C after the convolution, as keys and values are in attention; n_groups must then be mamba_num_heads. None:
            x has mamba_num_heads, B has n_groups.
        mamba_intermediate_size (`int`, *optional*): inner width of `mamba`; `expand * hidden_size` where None. That of
            `mamba2` is mamba_num_heads * mamba_head_dim.
        mamba_d_mlp (`int`): width of a gated MLP inside the `mamba2` mixer, beside the SSM; 0 for none.
        mamba_hidden_act (`str`): activation after the SSM's convolution. Its gates are silu.
        mixer_norm (`str`, *optional*): RMSNorm inside the SSM: `"learned"`, or `"weightless"` as in Falcon-Mamba. In `mamba` on
            dt, B and C (as in Jamba), in `mamba2` on B and C per head, before the convolution. None: no norm.
        mixer_rms_eps (`float`): its epsilon.
        mamba_use_pos_emb (`bool`): rotary positions on B and C of `mamba2` before the convolution, from the same table as
            attention's; state_size must then be head_dim.
        mamba_rms_norm (`bool`): whether `mamba2` normalises its gated output, in n_groups groups.
        mamba_norm_before_gate (`bool`): where mamba_rms_norm, whether the norm comes before the gate instead of behind it.
        mamba_norm_eps (`float`, *optional*): epsilon of that norm, and of the output norm of GDN and GKA; rms_norm_eps where None.
        D_has_hdim (`bool`): D of `mamba2` has an entry for every channel instead of every head.
        time_step_limit (`list[float]`, *optional*): the SSM's time step is clamped to this range, whose upper end may be
            infinite; None: no limit.
        chunk_size (`int`): tokens per block of the SSM scan. Changes speed, not results.
        use_short_conv (`bool`): GDN and GKA: a short convolution before the silu of queries, keys and values.
        use_v_conv (`bool`): GDN and GKA: the convolution and its silu are for values, too, which else have neither.
        use_gate (`bool`): GDN and GKA: silu of a projection gates the normed output.
        kv_proj_rank (`int`, *optional*): GDN and GKA with fewer key-value heads than heads: rank of what is added to the
            repeated keys and values; None: nothing.
        kv_learnable_residual (`bool`): with kv_proj_rank, heads are learned mixtures of the key-value heads, no repetitions.
        allow_neg_eigval (`bool`): GDN: beta is in 0 to 2, so that a write may turn the state's sign.
        num_iter, ridge_strength: GKA: steps of Chebyshev's iteration, and lambda divided by the norm of the keys' covariance.
        bp_lambda (`bool`): GKA: gradients go through lambda.
        use_alpha_connection, use_beta_gate, use_forgetting_gate, use_forgetting_gate_kk, gla_rescale (`bool`): GKA: a learned
            mixture of query and solution, not the solution; keys and values scaled by a gate; decay of the memory and of the
            covariance (the latter needs the former); outputs times head_dim ** -0.5.
        eidetic_size (`int`): M, how many past tokens the long-term eidetic memory of a `"bmojo"` layer holds. 0 is B'MOJO-F.
        eidetic_chunk_size (`int`): c, the memory changes every c tokens.
        eidetic_position (`str`): at what distance a query sees the memory: `"constant"`, all at 2w, or `"rank"`, the r-th
            newest at 2w + r.
        innovation_signal (`str`): what is predicted: `"ssm_output"`, as in the paper, or `"layer_input"`, what the layer reads.
        innovation_predictor (`str`): what predicts the next value of the signal, hence what counts as surprising: `"average"`,
            `"exponential"`, `"learnable"`; or the controls `"random"`, `"recent"`, `"oldest"` that do not look at it.
        innovation_kernel (`int`): how many previous values the predictor sees.
        innovation_half_life (`int` or `float`, *optional*): after how many tokens an innovation counts half of what it did, against
            newer ones, when the memory chooses what to keep; None, as in the paper: it counts for ever. `"recent"` and
            `"oldest"` go by age alone.
        innovation_loss_coef (`float`): weight of the learnable predictor's own error in the loss of `BMojoForCausalLM`. A
            trainer that computes the loss itself (TRL's fused head, label smoothing) leaves the predictor as it is.
        fading_span (`bool`): whether attention sees the fading tokens. Needed by predictors of the SSM's output.
        tie_attn_weights (`bool`): fading keys and values share the projections of the window's.
        fading_query (`bool`): with untied weights, fading keys are read by queries of their own (a projection of the same
            input, and norms of queries and keys, of their own).
        use_qk_norm (`bool`): RMSNorm per head on queries and keys before rotary, as in Qwen3.

    Raises:
        ValueError: (as StrictDataclassClassValidationError) a value is impossible or contradicts another; the
            message names the field, the value and what is allowed.
    """

    model_type = "bmojo"
    keys_to_ignore_at_inference = ["cache", "past_key_values", "innovations", "eidetic_positions"]

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int | None = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    initializer_range: float | None = None
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    use_qk_norm: bool = False
    position_embedding_type: str = "rope"
    rope_interleave: bool = False
    softmax_scale: float | None = None
    key_multiplier: float = 1.0
    attention_out_bias: bool | None = None
    attention_conv_kernel: int = 0
    rms_norm: bool = True
    residual_in_fp32: bool = False
    unpadded_vocab_size: int | None = None
    embedding_multiplier: float = 1.0
    lm_head_multiplier: float = 1.0
    mlp_multipliers: list[float] | tuple[float, ...] | None = None
    attention_in_multiplier: float = 1.0
    attention_out_multiplier: float = 1.0
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    layers_block_type: list[str] | None = None
    sliding_window: int = 512

    ssm_type: str = "mamba2"
    state_size: int | None = None
    conv_kernel: int = 4
    expand: int = 2
    mamba_num_heads: int | None = None
    mamba_head_dim: int = 64
    n_groups: int = 1
    mamba_num_key_value_heads: int | None = None
    mamba_intermediate_size: int | None = None
    mamba_d_mlp: int = 0
    mamba_hidden_act: str = "silu"
    mixer_norm: str | None = None
    mixer_rms_eps: float = 1e-6
    mamba_use_pos_emb: bool = False
    mamba_rms_norm: bool = True
    mamba_norm_before_gate: bool = False
    mamba_norm_eps: float | None = None
    D_has_hdim: bool = False
    time_step_rank: int | None = None
    time_step_limit: list[float | dict] | tuple[float, ...] | None = None
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    use_bias: bool = False
    use_conv_bias: bool = True
    projectors_bias: bool | None = None
    ssm_in_multiplier: float = 1.0
    ssm_out_multiplier: float = 1.0
    ssm_multipliers: list[float] | tuple[float, ...] | None = None
    chunk_size: int = 64

    use_short_conv: bool = True
    use_v_conv: bool = True
    use_gate: bool = True
    kv_proj_rank: int | None = None
    kv_learnable_residual: bool = False
    allow_neg_eigval: bool = False
    num_iter: int = 30
    ridge_strength: float = 0.02
    bp_lambda: bool = True
    use_alpha_connection: bool = True
    use_beta_gate: bool = True
    use_forgetting_gate: bool = True
    use_forgetting_gate_kk: bool = True
    gla_rescale: bool = True

    eidetic_size: int = 128
    eidetic_chunk_size: int = 64
    eidetic_position: str = "constant"
    innovation_signal: str = "ssm_output"
    innovation_predictor: str = "average"
    innovation_kernel: int = 8
    innovation_half_life: int | float | None = None
    innovation_loss_coef: float = 0.01
    fading_span: bool = True
    tie_attn_weights: bool = True
    fading_query: bool = False

    def __post_init__(self, **kwargs):
        if self.rope_parameters is None and not kwargs.get("rope_scaling"):
            self.rope_parameters = {"rope_type": "default", "rope_theta": kwargs.pop("rope_theta", 10000.0)}
        if self.layers_block_type is None:
            self.layers_block_type = ["bmojo"] * self.num_hidden_layers
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.has_heads and self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}; "
                    "change one of them or set head_dim."
                )
            self.head_dim = max(2, self.hidden_size // max(1, self.num_attention_heads))
        if self.state_size is None:
            self.state_size = 16 if self.ssm_types == {"mamba"} else 64
        if self.mamba_num_heads is None:
            self.mamba_num_heads = self.expand * self.hidden_size // max(1, self.mamba_head_dim)
            if "mamba2" not in self.ssm_types:
                self.mamba_num_heads = max(1, self.mamba_num_heads)  # means nothing
        if self.time_step_rank is None:
            self.time_step_rank = math.ceil(self.hidden_size / 16)
        if self.time_step_limit is not None:
            # transformers writes an infinite bound as this dict, since JSON has none, and reads it back from files only
            bounds = [math.inf if bound == {"__float__": "Infinity"} else bound for bound in self.time_step_limit]
            if any(isinstance(bound, dict) for bound in bounds):
                raise ValueError(
                    f"time_step_limit is {bounds}; it must be None or two numbers, 0 <= lowest < highest."
                )
            self.time_step_limit = [float(bound) for bound in bounds]
        for name in ("mlp_multipliers", "ssm_multipliers"):
            if getattr(self, name) is not None:
                setattr(self, name, [float(factor) for factor in getattr(self, name)])
        if self.attention_out_bias is None:
            self.attention_out_bias = self.attention_bias
        if self.projectors_bias is None:
            self.projectors_bias = self.use_bias
        if self.initializer_range is None:
            self.initializer_range = max(1, self.hidden_size) ** -0.5
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers, whose `kwargs` are set after the checks: checked again."""
        found = super().from_dict(config_dict, **kwargs)
        (found[0] if isinstance(found, tuple) else found).validate()
        return found

    @property
    def has_attention(self) -> bool:
        """Whether any layer attends."""
        return not set(self.layers_block_type) <= set(SSM_TYPES)

    @property
    def has_bmojo(self) -> bool:
        """Whether any layer is one of B'MOJO, with or without eidetic memory."""
        return not set(self.layers_block_type).isdisjoint(BMOJO_TYPES)

    @property
    def has_heads(self) -> bool:
        """Whether any layer has the heads of attention; where none has, num_attention_heads and head_dim mean nothing."""
        return self.has_attention or bool(self.ssm_types & set(DELTA_TYPES))

    @property
    def ssm_types(self) -> set[str]:
        """The kinds of SSM in the model's layers: a subset of SSM_TYPES."""
        mixed = (*BMOJO_TYPES, "hybrid")
        return {self.ssm_type if kind in mixed else kind for kind in self.layers_block_type} & set(SSM_TYPES)

    @property
    def rotary_dim(self) -> int:
        """How many entries of a head are rotated, the first ones."""
        if self.position_embedding_type == "nope":
            return 0
        return int(self.head_dim * self.rope_parameters.get("partial_rotary_factor", 1.0))

    def validate_rope(self):
        """Part of validation: transformers' checks of rotary parameters and head_dim, where anything is rotated."""
        if (self.has_attention and self.position_embedding_type != "nope") or self.mamba_use_pos_emb:
            super().validate_rope()
        else:
            self.rope_parameters.setdefault("rope_type", "default")

    def validate_output_attentions(self):
        """Part of validation: nothing, for transformers' advice (another attn_implementation) helps no one here; forward refuses it."""

    def validate_architecture(self):
        """Part of `@strict`-powered validation: every value on its own, then the ones that contradict each other."""
        self._check_ranges()
        self._check_choices()
        self._check_divisions()
        self._check_factors()
        self._check_memory()

    def _check_ranges(self):
        at_least_one = (
            "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim sliding_window "
            "max_position_embeddings state_size conv_kernel expand mamba_num_heads mamba_head_dim n_groups "
            "time_step_rank chunk_size eidetic_chunk_size innovation_kernel"
        )
        for name in at_least_one.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.intermediate_size is not None and self.intermediate_size < 1:
            raise ValueError(f"intermediate_size is {self.intermediate_size}; use None for layers without MLP.")
        if self.eidetic_size < 0:
            raise ValueError(f"eidetic_size is {self.eidetic_size}; it must be 0 (no eidetic memory) or more.")
        if self.mamba_d_mlp < 0:
            raise ValueError(f"mamba_d_mlp is {self.mamba_d_mlp}; it must be 0 (no MLP inside the mixer) or more.")
        for name in ("mamba_num_key_value_heads", "mamba_intermediate_size", "kv_proj_rank"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be None or at least 1.")
        if self.num_iter < 0:
            raise ValueError(f"num_iter is {self.num_iter}; it must be 0 (queries as they are) or more.")
        positive = (
            "rms_norm_eps initializer_range time_step_min time_step_max time_step_floor mixer_rms_eps mamba_norm_eps "
            "ridge_strength"
        )
        for name in positive.split():
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive and finite.")
        if not 0 <= self.innovation_loss_coef < math.inf:
            raise ValueError(f"innovation_loss_coef is {self.innovation_loss_coef}; it must be 0 or more, and finite.")
        if self.time_step_min > self.time_step_max:
            raise ValueError(f"time_step_min {self.time_step_min} is above time_step_max {self.time_step_max}.")
        limit = self.time_step_limit
        if limit is not None and not (len(limit) == 2 and 0 <= limit[0] < limit[1]):
            raise ValueError(f"time_step_limit is {limit}; it must be None or two numbers, 0 <= lowest < highest.")
        for name in ("pad_token_id", "bos_token_id"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(f"{name} is {getattr(self, name)}; ids run from 0 to vocab_size - 1.")

    def _check_choices(self):
        if len(self.layers_block_type) != self.num_hidden_layers:
            raise ValueError(
                f"layers_block_type names {len(self.layers_block_type)} layers, num_hidden_layers is "
                f"{self.num_hidden_layers}; they must agree."
            )
        choices = [("layers_block_type", kind, LAYER_TYPES) for kind in self.layers_block_type] + [
            ("ssm_type", self.ssm_type, SSM_TYPES),
            ("position_embedding_type", self.position_embedding_type, POSITION_EMBEDDING_TYPES),
            ("mixer_norm", self.mixer_norm, MIXER_NORMS),
            ("eidetic_position", self.eidetic_position, EIDETIC_POSITIONS),
            ("innovation_predictor", self.innovation_predictor, LEARNED_CHOICES + CONTROL_CHOICES),
            ("innovation_signal", self.innovation_signal, INNOVATION_SIGNALS),
            ("rope_parameters['rope_type']", self.rope_parameters.get("rope_type", "default"), ROPE_TYPES),
        ]
        for name, value, allowed in choices:
            if value not in allowed:
                raise ValueError(f"{name} has {value!r}; allowed are {', '.join(map(repr, allowed))}.")
        for name in ("hidden_act", "mamba_hidden_act"):
            if getattr(self, name) not in ACT2FN:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; allowed are transformers' {', '.join(sorted(ACT2FN))}."
                )
        theta = self.rope_parameters.get("rope_theta")
        if theta is None or not 0 < theta < math.inf:
            raise ValueError(
                f"rope_parameters['rope_theta'] is {theta}; it must be positive and finite (10000.0 without another reason)."
            )
        factor = self.rope_parameters.get("partial_rotary_factor", 1.0)
        if not 0 < factor <= 1:
            raise ValueError(
                f"rope_parameters['partial_rotary_factor'] is {factor}; it must be above 0 and at most 1. Attention without "
                "rotation is position_embedding_type='nope'."
            )

    def _check_divisions(self):
        if self.has_heads and self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}."
            )
        if self.has_attention and self.rotary_dim % 2:
            factor = self.rope_parameters.get("partial_rotary_factor", 1.0)
            raise ValueError(
                f"head_dim is {self.head_dim} and rope_parameters['partial_rotary_factor'] {factor}: rotary embeddings need an "
                f"even number of entries to rotate, not {self.rotary_dim}."
            )
        if "mamba2" in self.ssm_types and self.mamba_num_heads % self.n_groups:
            raise ValueError(
                f"mamba_num_heads {self.mamba_num_heads} is not a multiple of n_groups {self.n_groups}; heads of a group "
                "share B and C."
            )
        if "mamba2" in self.ssm_types:
            self._check_mamba2_heads()

    def _check_mamba2_heads(self):
        grouped = self.mamba_num_key_value_heads
        if grouped is not None and (self.mamba_num_heads % grouped or self.n_groups != self.mamba_num_heads):
            raise ValueError(
                f"mamba_num_key_value_heads is {grouped}: it must divide mamba_num_heads {self.mamba_num_heads}, and "
                f"n_groups {self.n_groups} must equal that, since every head then has a C of its own."
            )
        if self.mamba_use_pos_emb and self.state_size != self.head_dim:
            raise ValueError(
                f"mamba_use_pos_emb: B and C share attention's rotary table, so state_size {self.state_size} must be "
                f"head_dim {self.head_dim}."
            )
        if self.mamba_use_pos_emb and (self.rope_interleave or self.position_embedding_type != "rope"):
            raise ValueError(
                "mamba_use_pos_emb rotates B and C by halves: it needs position_embedding_type='rope' and "
                "rope_interleave=False."
            )
        if self.mamba_use_pos_emb and self.rotary_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embeddings need an even number.")

    def _check_factors(self):
        factors = "key embedding lm_head attention_in attention_out ssm_in ssm_out"
        for name in [f"{part}_multiplier" for part in factors.split()]:
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be finite.")
        for name, parts in (("mlp_multipliers", "gate, output"), ("ssm_multipliers", "z, x, B, C, dt")):
            values = getattr(self, name)
            if values is not None and not (len(values) == parts.count(",") + 1 and all(map(math.isfinite, values))):
                raise ValueError(f"{name} is {values}; it must be None or finite factors for {parts}.")
        for part in ("attention_in", "attention_out", "ssm_in", "ssm_out"):
            if getattr(self, f"{part}_multiplier") != 1 and "hybrid" not in self.layers_block_type:
                raise ValueError(
                    f"{part}_multiplier is {getattr(self, f'{part}_multiplier')}, but only 'hybrid' layers have it and "
                    "layers_block_type names none; it must be 1."
                )
        if self.ssm_multipliers is not None and "mamba2" not in self.ssm_types:
            raise ValueError(
                f"ssm_multipliers is {self.ssm_multipliers}, but no layer has a mamba2 SSM; it must be None."
            )
        if self.mlp_multipliers is not None and self.intermediate_size is None:
            raise ValueError(f"mlp_multipliers is {self.mlp_multipliers}, but no layer has an MLP; it must be None.")
        if self.softmax_scale is not None and not 0 < self.softmax_scale < math.inf:
            raise ValueError(f"softmax_scale is {self.softmax_scale}; it must be None, or positive and finite.")
        if self.attention_conv_kernel < 0 or (self.attention_conv_kernel and self.has_bmojo):
            raise ValueError(
                f"attention_conv_kernel is {self.attention_conv_kernel}; it must be 0 (none) or more, and 0 where a layer is "
                "'bmojo' or 'bmojo_f': fading tokens share the projections, and would have no convolution of their own."
            )
        if self.unpadded_vocab_size is not None and not 1 <= self.unpadded_vocab_size <= self.vocab_size:
            raise ValueError(
                f"unpadded_vocab_size is {self.unpadded_vocab_size}; it must be None, or 1 to vocab_size {self.vocab_size}."
            )

    def _check_memory(self):
        if self.innovation_half_life is not None and not 0 < self.innovation_half_life < math.inf:
            raise ValueError(
                f"innovation_half_life is {self.innovation_half_life}; it must be None (an innovation counts for ever), or a "
                "number of tokens above 0."
            )
        if self.fading_query and (self.tie_attn_weights or not self.fading_span):
            raise ValueError(
                "fading_query=True gives fading keys queries of their own, which needs tie_attn_weights=False and "
                f"fading_span=True; they are {self.tie_attn_weights} and {self.fading_span}."
            )
        if self.kv_learnable_residual and self.kv_proj_rank is None:
            raise ValueError("kv_learnable_residual=True needs a kv_proj_rank; it is None.")
        if not self.has_bmojo:
            return
        remembers = bool(self.eidetic_size) and "bmojo" in self.layers_block_type
        looks = self.innovation_predictor in LEARNED_CHOICES and self.innovation_signal == "ssm_output"
        if remembers and not self.fading_span and looks:
            raise ValueError(
                f"innovation_predictor {self.innovation_predictor!r} with fading_span=False: the choice of tokens passes "
                "no gradient, so the SSM would stay untrained and its innovations random. Set fading_span=True, "
                f"innovation_signal='layer_input', one of the controls {', '.join(map(repr, CONTROL_CHOICES))}, or "
                "eidetic_size=0."
            )
        if not self.fading_span and (not self.eidetic_size or "bmojo_f" in self.layers_block_type):
            raise ValueError(
                "fading_span=False leaves a layer 'bmojo_f', or 'bmojo' with eidetic_size=0, only its "
                "window; use 'sliding_attention' in layers_block_type."
            )


__all__ = ["BMojoConfig"]
