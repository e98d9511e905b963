"""B'MOJO in transformers: layers that answer each token from a window, a fading and an eidetic memory (arXiv 2407.06324)."""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.generation import GenerationMixin
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple, logging

from .attention_bmojo import MIXER_CLASSES, BMojoPredictor
from .cache_bmojo import BMojoCache, cache_bytes
from .call_bmojo import Call, PackedCall, make_step, step_plan, take_rows
from .configuration_bmojo import AUTO_MAP, BMojoConfig
from .cpu_bmojo import is_plain
from .kernels_bmojo import attach, copy_kernels, silu_gate
from .layout_bmojo import PackedLayout, read_layout, read_mask
from .linear_bmojo import project
from .norms_bmojo import BMojoLayerNorm, BMojoRMSNorm, block_norm
from .numerics_bmojo import at_least_float32, widen
from .ops_bmojo import rotary_table
from .ssm_bmojo import SSM_CLASSES, BMojoDecay, BMojoDynamics, BMojoHeadExpansion, BMojoTimeStepProjection


logger = logging.get_logger(__name__)

# What the installed transformers calls the cache in outputs and in generate(): 5.24 renamed it. Ours answers to both names.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def either_cache(cache, past_key_values):
    """The cache that was passed, or None; under both names only where it is one."""
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError(
            "Pass cache or past_key_values, not both: they are two names of one argument. (PEFT prefix tuning passes both: "
            "use prompt tuning.)"
        )
    return past_key_values if cache is None else cache


class _CacheName:
    """Outputs of transformers up to 5.23 under the new name, too; those of 5.24 know the old one by themselves."""

    if CACHE_NAME != "cache":

        @property
        def cache(self):
            return self.past_key_values


@dataclass
class BMojoModelOutput(_CacheName, BaseModelOutputWithPast):
    """Output of `BMojoModel`.

    Args:
        innovations: with `output_eidetic`, per layer the innovation of every token of the call, (batch, seq_len) in
            float32 or wider, 0 for padding; None for layers without eidetic memory.
        eidetic_positions: with `output_eidetic`, per layer the memory that every chunk of the call saw, (rows, chunks,
            eidetic_size) int64: positions in ascending order, counting the real tokens of a row (or of a packed
            document) from 0; -1 for empty places, which come first. The first chunk is the one of the first new token.
        predictor_loss: while training the learnable predictor, the sum over layers of its mean squared error.
    """

    innovations: tuple[torch.Tensor | None, ...] | None = None
    eidetic_positions: tuple[torch.Tensor | None, ...] | None = None
    predictor_loss: torch.Tensor | None = None


@dataclass
class BMojoCausalLMOutput(_CacheName, CausalLMOutputWithPast):
    """Output of `BMojoForCausalLM`: transformers' fields, and those of `BMojoModelOutput`."""

    innovations: tuple[torch.Tensor | None, ...] | None = None
    eidetic_positions: tuple[torch.Tensor | None, ...] | None = None


class BMojoMLP(nn.Module):
    block = (
        512  # tokens that a CPU takes at once where no gradient is recorded: what lies between stays near the cache
    )

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn, self.is_silu = ACT2FN[config.hidden_act], config.hidden_act in ("silu", "swish")
        self.multipliers = config.mlp_multipliers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] > self.block and x.device.type == "cpu" and not torch.is_grad_enabled():
            return torch.cat([self._forward(part) for part in x.split(self.block, 1)], 1)
        return self._forward(x)

    def _forward(self, x):
        gate, up = project(self.gate_proj, x), project(self.up_proj, x)
        if self.multipliers is not None:
            gate = gate * self.multipliers[0]
        if self.is_silu:
            inner = silu_gate(gate, up) if x.shape[1] > 1 else silu_gate.definition(gate, up)
        else:
            inner = self.act_fn(gate) * up
        out = project(self.down_proj, inner)
        return out if self.multipliers is None else out * self.multipliers[1]


def normed(norm: nn.Module, hidden_states: torch.Tensor, residual_in_fp32: bool) -> torch.Tensor:
    """The residual stream after a norm, in the dtype of the weights."""
    hidden_states = norm(hidden_states)
    return hidden_states.to(norm.weight.dtype) if residual_in_fp32 else hidden_states


class BMojoDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx: int):
        super().__init__()
        layer_type = config.layers_block_type[layer_idx]
        self.input_layernorm = block_norm(config)
        if layer_type in SSM_CLASSES:
            self.mixer = SSM_CLASSES[layer_type](config)
        else:
            self.mixer = MIXER_CLASSES[layer_type](config, layer_idx)
        self.mlp = None
        if config.intermediate_size is not None:
            self.post_attention_layernorm = block_norm(config)
            self.mlp = BMojoMLP(config)
        self.residual_in_fp32 = config.residual_in_fp32

    def forward(self, hidden_states, call: Call | PackedCall, state=None):
        """Returns the hidden states, the new state (None without cache), and what a bmojo mixer remembered."""
        mixer_input = normed(self.input_layernorm, hidden_states, self.residual_in_fp32)
        if isinstance(call, PackedCall):
            mixed, memory = call.mix(self.mixer, mixer_input)
            new_state = None
        else:
            mixed, new_state, memory = self.mixer(mixer_input, call, state)
            if call.state_only:
                return hidden_states, new_state, memory
        hidden_states = hidden_states + mixed
        if self.mlp is not None:
            mlp_input = normed(self.post_attention_layernorm, hidden_states, self.residual_in_fp32)
            hidden_states = hidden_states + self.mlp(mlp_input)
        return hidden_states, (None if state is None else new_state), memory


class BMojoPreTrainedModel(PreTrainedModel):
    config: BMojoConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BMojoDecoderLayer"]
    _keep_in_fp32_modules_strict = ["dynamics"]  # as files have them, where weights are loaded in half precision
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True  # of the two names that transformers sets by itself; the layers choose their own formulation
    _is_stateful = False  # the cache rolls back exactly: see BMojoCache.crop
    _can_compile_fullgraph = True

    def __init__(self, config, *args, **kwargs):
        config.validate()  # again: its fields may have been set since it was made
        super().__init__(config, *args, **kwargs)
        attach(config)

    @torch.no_grad()
    def _init_weights(self, module):
        """Transformers calls this for modules with parameters of their own only: every clause is about such a module."""
        std = self.config.initializer_range
        if isinstance(module, BMojoTimeStepProjection):
            init.uniform_(module.weight, -(module.in_features**-0.5), module.in_features**-0.5)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            init.normal_(module.weight, mean=0.0, std=std)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv1d):
            bound = module.kernel_size[0] ** -0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (BMojoDynamics, BMojoDecay, BMojoHeadExpansion)):
            module.initialise()
        elif isinstance(module, BMojoRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, BMojoLayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, BMojoPredictor):
            init.constant_(module.weight, 1 / module.weight.shape[0])

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers; also writes the whole auto_map and the kernels folder, so that the folder loads alone."""
        auto_map = getattr(self.config, "auto_map", None) or {}
        if not any("--" in name for name in auto_map.values()):  # code in another repository stays there
            self.config.auto_map = auto_map | AUTO_MAP  # a tokenizer's entry is the user's own
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.is_remote_code() and kwargs.get("is_main_process", True):
            copy_kernels(self.config, save_directory)

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        """What save_pretrained(push_to_hub=True) calls before it returns: the kernels have to be there by then."""
        if self.is_remote_code():
            copy_kernels(self.config, working_dir)
            if os.path.isdir(kernels := os.path.join(working_dir, "kernels")):
                os.utime(kernels)  # a folder counts as modified by its own time
        return super()._upload_modified_files(working_dir, *args, **kwargs)


class BMojoModel(BMojoPreTrainedModel):
    """The stack of layers, from token ids to normalised hidden states."""

    prefill_piece = 2048  # tokens: on a CPU 32768 take no longer than in one piece, and two fifths of the memory
    prefill_apart = 256  # from so many tokens on the last one has a step of its own, where its output alone is wanted

    def __init__(self, config: BMojoConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([BMojoDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = block_norm(config)
        self.gradient_checkpointing = False
        self.embedding_multiplier, self.residual_in_fp32 = config.embedding_multiplier, config.residual_in_fp32
        self.plan, self.chunk = step_plan(config), config.eidetic_chunk_size
        self.layer_types = list(config.layers_block_type)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: BMojoCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_eidetic: bool | None = None,
        seq_idx: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        return_dict: bool | None = None,
        past_key_values: BMojoCache | None = None,
        outputs_to_keep: int | None = None,
        **kwargs,
    ) -> BMojoModelOutput | tuple:
        """Run the layers.

        Args:
            input_ids: (batch, seq_len), or inputs_embeds: (batch, seq_len, hidden_size); one of them.
            attention_mask: (batch, seq_len) or (batch, past + seq_len), 1 for tokens, 0 for padding on any side.
            position_ids: (batch or 1, seq_len). Only where they restart counts: a new packed document begins there.
                Positions themselves are counted from the tokens.
            cache: a `BMojoCache`; made here where None and use_cache.
            output_eidetic: also return innovations and eidetic positions: see `BMojoModelOutput`.
            seq_idx, cu_seq_lens_q: other ways to say where packed documents begin: (batch, seq_len) document numbers;
                (documents + 1,) offsets into a batch of one row.
            past_key_values: the cache under its old name.
            outputs_to_keep: return the last hidden states of the last so many columns alone; None: of all. Who reads a prompt
                wants 1 of them, or 0: the last layer then makes nothing of the other tokens but its state (for 1 on a CPU).

        Raises:
            ValueError: an input is malformed, contradicts another, or asks for what the model has not.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        _check_arguments(self.config, output_attentions, cu_seq_lens_q, cu_seq_lens_k, outputs_to_keep, kwargs)
        inputs_embeds = self.embed(input_ids, inputs_embeds)
        if self.residual_in_fp32:
            inputs_embeds = widen(inputs_embeds)
        cache = either_cache(cache, past_key_values)
        asked_for_cache, use_cache = use_cache, self._use_cache(use_cache, cache)
        seen, past = 0, None
        if cache is not None:
            _check_cache(cache, self.config)
            seen, past = cache.seen_tokens, cache.begin(inputs_embeds)
        tokens = read_mask(attention_mask, *inputs_embeds.shape[:2], seen, past if seen else None)
        layout = read_layout(tokens, inputs_embeds, position_ids, seq_idx, cu_seq_lens_q, has_past=seen > 0)
        packed = isinstance(layout, PackedLayout)
        if packed and (cache is not None or asked_for_cache):
            raise ValueError("Packed documents can't be read into a cache: pass cache=None, use_cache=False.")
        if cache is None and use_cache and not packed:
            cache = BMojoCache(self.config)

        if packed:
            rows = layout.from_rows(inputs_embeds)  # whatever padding holds ends here
            call = PackedCall.of(layout, lambda group: self._call(rows, *group.index.shape[1:], group.lengths))
            hidden_states, all_hidden_states, memories, *_ = self._run_layers(rows, call, None, output_hidden_states)
        else:
            rows = inputs_embeds if layout is None else layout.to_rows(inputs_embeds)
            whole = bool(output_hidden_states or output_eidetic)
            found = self._read(rows, layout, tokens, cache, whole, outputs_to_keep)
            hidden_states, all_hidden_states, memories = found

        back = (lambda x: x) if layout is None else layout.from_rows
        last_hidden_state = normed(self.norm, hidden_states, self.residual_in_fp32)
        if hidden_states.shape[1] == rows.shape[1]:  # else only what is wanted was made
            last_hidden_state = back(last_hidden_state)
        losses = [memory["loss"] for memory in memories if "loss" in memory]
        output = BMojoModelOutput(
            last_hidden_state=_last_columns(last_hidden_state, outputs_to_keep),
            hidden_states=(*map(back, all_hidden_states), last_hidden_state) if output_hidden_states else None,
            predictor_loss=(sum(loss.to(losses[0].device) for loss in losses) if losses and self.training else None),
            **{CACHE_NAME: cache if use_cache else None},
            **(_shown(memories, back) if output_eidetic else {}),
        )
        return output if return_dict in (None, True) else output.to_tuple()

    def embed(self, input_ids, inputs_embeds):
        """Embeddings of the ids, or the embeddings given; checks both."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is not None:
            if inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != self.config.hidden_size:
                raise ValueError(
                    f"inputs_embeds has shape {tuple(inputs_embeds.shape)}; expected (batch, seq_len, "
                    f"{self.config.hidden_size})."
                )
            return inputs_embeds
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; expected (batch, seq_len).")
        if is_plain(input_ids) and input_ids.numel() and input_ids.device.type != "meta":
            few = input_ids.flatten() if input_ids.numel() <= 16 else torch.stack(input_ids.aminmax())
            ids = few.tolist()  # the one time that a GPU is asked
            low, high = min(ids), max(ids)
            size = getattr(self.embed_tokens, "num_embeddings", None)  # a module around it (PEFT's) looks after itself
            if size is not None and (low < 0 or high >= size):
                raise ValueError(
                    f"input_ids run from {low} to {high}; the vocabulary has ids 0 to {size - 1}. Is the tokenizer the model's?"
                )
        embeds = self.embed_tokens(input_ids)
        return embeds if self.embedding_multiplier == 1 else embeds * self.embedding_multiplier

    def _use_cache(self, use_cache, cache) -> bool:
        if use_cache is None:
            use_cache = cache is not None or (self.config.use_cache and not self.training)
        if use_cache and self.gradient_checkpointing and self.training:
            logger.warning_once("use_cache=True does not go with gradient checkpointing: no cache is returned.")
            return False
        return use_cache

    def _read(self, rows, layout, tokens, cache, whole: bool, outputs_to_keep: int | None):
        """Run the layers on rows (rows, seq_len, hidden_size) and store what the cache needs.

        A long text that goes into a cache without gradients is read in pieces, which bounds memory and is as exact as
        any other split of a sequence, unless `whole` says that the outputs of the layers are wanted for all of it. Where
        the last column's output alone is wanted it is a piece of its own, if that pays.

        Returns:
            The last hidden states (of the columns to keep alone where others were not made), the inputs of all layers and
            what they remembered (of the last piece).
        """
        plain = cache is None or cache.is_recording_past() or torch.is_grad_enabled() or torch.compiler.is_compiling()
        splits = not (plain or whole)
        size = self.prefill_piece if splits else rows.shape[1]
        apart = outputs_to_keep == 1 and splits and rows.is_cpu and rows.shape[1] >= self.prefill_apart
        apart = apart and (tokens is None or bool(tokens[:, -1].all()))
        none_kept = outputs_to_keep == 0 and splits
        pieces = _pieces(rows, None if layout is None else layout.lengths, size, apart)
        parts = []
        for number, (piece, lengths) in enumerate(pieces, 1):
            past = None if cache is None else cache.begin(piece)
            call = self._call(piece, piece.shape[1], lengths, cache, past)
            state_only = none_kept or (apart and number < len(pieces))
            if cache is not None:
                cache.unfinished = call.in_place
            hidden_states, kept, memories, states, replays = self._run_layers(piece, call, cache, whole, state_only)
            if cache is not None:
                read = tokens if len(pieces) == 1 else call.real()  # in pieces: places in the row, which count alike
                cache.store(states, piece.shape[1], read, replays)
            parts.append(hidden_states[:, :0] if state_only else hidden_states)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1), kept, memories

    def _call(self, like, seq_len: int, lengths=None, cache=None, past=None) -> Call:
        """What the layers share.

        Args:
            like: activations, for their dtype and device.
            seq_len: columns of the rows.
            lengths: real tokens of every row; None: all are.
            cache: a BMojoCache, or None.
            past: the rows' lengths in the cache, None without.
        """
        table, compiling = partial(self._rotary_table, at_least_float32(like)), torch.compiler.is_compiling()
        in_place = cache is not None and not cache.is_recording_past() and not torch.is_grad_enabled()
        fixed_columns = cache is not None and cache.max_cache_len is not None
        any_mode = compiling or torch.is_inference_mode_enabled()
        counted = cache is not None and not compiling
        columns = {"columns": cache.seen_tokens + seq_len, "even": cache.even} if counted else {}
        single = past is not None and seq_len == 1
        if single and cache.even and lengths is None and not compiling and not torch.is_grad_enabled():
            scaling, step, lead = self._prepared_step(like, cache, table)
            positions = past[:, None]
            cos, sin = table(positions) if self.plan.turns_alone else (None, None)
            rotation = table, cos, sin, scaling
            return Call(
                *(past, None, positions, *rotation, in_place, any_mode, fixed_columns, None, lead, step), **columns
            )
        _, scaling = rotary_frequencies(self.config)
        positions = torch.arange(seq_len, device=like.device)[None]
        if cache is not None and cache.seen_tokens == 0 and seq_len > 1:
            past = None  # every row begins here: no ring is read
        phase, lead = None, 0
        if past is not None:
            positions = positions + past[:, None]
            phase, lead = past[:, None] % self.chunk, self.chunk - 1
            if cache.even:
                lead = cache.seen_tokens % self.chunk
            elif not compiling and like.device.type == "cpu":
                lead = int(phase.max())
        cos, sin = (None, None) if single and not self.plan.turns_alone else table(positions)
        call = Call(
            *(past, lengths, positions, table, cos, sin, scaling, in_place, any_mode, fixed_columns, phase, lead),
            step=None,
            **columns,
        )
        if single:
            boundary = phase == 0
            if lengths is not None:  # a row without a new token stays before its boundary
                boundary = boundary & (lengths[:, None] > 0)
            if not compiling and (cache.even or like.device.type == "cpu"):
                begins = lead == 0 if cache.even else bool(boundary.any())
                boundary = boundary if begins else None
            call.step = make_step(self.plan, past, like, table, scaling)
            call.step.boundary = boundary
            for name, mask in call.step.mask.items():
                call.step.mask[name] = mask.repeat_interleave(self.plan.num_key_value_heads, 0)
        return call

    def _rotary_table(self, dtype, positions, inverse=False):
        """`Call.table`, in that dtype."""
        inv_freq, scaling = rotary_frequencies(self.config, positions.device)
        cos, sin = rotary_table(positions, inv_freq, 1 / scaling if inverse else scaling, dtype)
        if cos.shape[-1] < self.plan.head_dim:
            cos = F.pad(cos, (0, self.plan.head_dim - cos.shape[-1]), value=1.0)
        return (cos, -sin) if inverse else (cos, sin)

    def _prepared_step(self, like, cache, table):
        """For one token of rows that are all as far: the factor on the rotary table, the step, and how far it is in its chunk.

        The steps of a chunk are worked out together, and kept in the cache.
        """
        phase = cache.seen_tokens % self.chunk
        start = cache.seen_tokens - phase
        rows = like.shape[0]
        which = start, rows, like.dtype, like.device, torch.is_inference_mode_enabled()
        if cache.steps[0] != which:
            _, scaling = rotary_frequencies(self.config)
            past = torch.arange(start, start + self.chunk, device=like.device)
            step = make_step(self.plan, past, like, table, scaling)
            short = start + self.chunk <= self.plan.sliding_window and like.is_cpu
            cache.steps = which, (scaling, step.split(rows, start + self.chunk if short else None))
        scaling, steps = cache.steps[1]
        return scaling, steps[phase], phase

    def _run_layers(self, hidden_states, call: Call, cache, keep_hidden: bool, state_only: bool = False):
        """Hidden states, the inputs of all layers if kept, what they remembered, their states, and how to replay them.

        With `state_only` nothing is made of the hidden states that the last layer alone would need.
        """
        if not hidden_states.numel():  # no token: no layer runs, no state changes
            states = None if cache is None else [layer.state for layer in cache.layers]
            return hidden_states, [hidden_states] * len(self.layers), [{}] * len(self.layers), states, None
        if keep_hidden or not _skips_autograd(call, hidden_states):
            return self._each_layer(hidden_states, call, cache, keep_hidden, state_only)
        with torch.inference_mode():  # a tenth of a token's time would go into what autograd keeps
            hidden_states, kept, memories, states, replays = self._each_layer(hidden_states, call, cache, False)
        for state in states:
            for name, tensor in state.items():
                if tensor.is_inference():
                    state[name] = tensor.clone()
        return hidden_states, kept, memories, states, replays

    def _each_layer(self, hidden_states, call: Call, cache, keep_hidden: bool, state_only: bool = False):
        """As `_run_layers`, in the mode that is on."""
        kept, memories, states, replays = [], [], [], []
        recording = cache is not None and cache.is_recording_past()
        for layer_idx, layer in enumerate(self.layers):
            if keep_hidden:
                kept.append(hidden_states)
            state = None
            if cache is not None:
                like = hidden_states  # what the mixer's input is like
                if self.residual_in_fp32 and like.dtype is not layer.input_layernorm.weight.dtype:
                    like = like[:, :0].to(layer.input_layernorm.weight.dtype)
                state = cache.layer_state(layer_idx, self.layer_types[layer_idx], like)
                if recording:
                    replays.append(partial(_replay, layer, hidden_states.detach(), call, state))
            if state_only and layer is self.layers[-1]:
                call = call.but(state_only=True)
            # read-only, and no dict, whose tensors FSDP's mixed precision would round on their way into a layer
            held = None if state is None else MappingProxyType(state)
            hidden_states, state, memory = layer(hidden_states, call, held)
            states.append(state)
            memories.append(memory)
        return hidden_states, kept, memories, states, replays or None


def _shown(memories: list[dict], back: Callable) -> dict[str, tuple]:
    """What `output_eidetic` asks for, of every layer."""
    found = [memory.get("innovation") for memory in memories]
    return {
        "innovations": tuple(None if innovation is None else back(innovation) for innovation in found),
        "eidetic_positions": tuple(memory.get("positions") for memory in memories),
    }


def _last_columns(x: torch.Tensor, count: int | None) -> torch.Tensor:
    """The last so many columns of (batch, seq_len, ...); all for None."""
    return x if count is None else x[:, max(0, x.shape[1] - count) :]


def _columns_to_keep(logits_to_keep: int | torch.Tensor) -> slice | torch.Tensor:
    """The columns of which logits are wanted, as an index."""
    if not isinstance(logits_to_keep, int):
        return logits_to_keep
    if logits_to_keep < 0:
        raise ValueError(
            f"logits_to_keep is {logits_to_keep}; it must be 0 (all columns), a number of the last ones, or indices."
        )
    return slice(-logits_to_keep or None, None)


def _pieces(rows: torch.Tensor, lengths: torch.Tensor | None, size: int, apart: bool) -> list[tuple]:
    """Rows (rows, seq_len, hidden_size) in pieces of `size` columns, each with the real tokens that its rows have there.

    With `apart` the last token of every row, which has one, is the last piece.
    """
    last = []
    if apart:
        last = [(rows[:, -1:] if lengths is None else take_rows(rows, lengths[:, None] - 1), None)]
        rows, lengths = rows[:, :-1], None if lengths is None else lengths - 1
    parts = rows.split(size, 1) if rows.shape[1] > size else (rows,)
    if lengths is None:
        return [*((part, None) for part in parts), *last]
    real = [(lengths - number * size).clamp(min=0, max=part.shape[1]) for number, part in enumerate(parts)]
    return [*zip(parts, real, strict=True), *last]


def _skips_autograd(call: Call, hidden_states) -> bool:
    """Whether this is a single token on a CPU that nothing looks through: no gradient, compiler, transform or subclass."""
    single = not isinstance(call, PackedCall) and call.step is not None and hidden_states.device.type == "cpu"
    return single and is_plain(hidden_states) and not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@torch.no_grad()
def _replay(layer, hidden_states, call: Call, state, lengths):
    """The state of a layer after only the first `lengths` tokens of a call."""
    shorter = call.but(lengths=lengths.to(hidden_states.device), in_place=False)
    return layer.mixer(normed(layer.input_layernorm, hidden_states, layer.residual_in_fp32), shorter, state)[1]


def _check_cache(cache, config):
    if not hasattr(cache, "layer_state"):
        raise ValueError(
            f"cache is a {type(cache).__name__}; B'MOJO keeps more than keys and values and needs its own "
            "BMojoCache(model.config), or None. (PEFT prefix tuning passes such a cache: use prompt tuning.)"
        )
    cache.check_model(config)


def _check_arguments(config, output_attentions, cu_seq_lens_q, cu_seq_lens_k, outputs_to_keep, kwargs):
    """Refuse what would otherwise be ignored."""
    if outputs_to_keep is not None and outputs_to_keep < 0:
        raise ValueError(
            f"outputs_to_keep is {outputs_to_keep}; it counts the last columns: 0 or more, or None for all."
        )
    if output_attentions or (output_attentions is None and config.output_attentions):
        raise ValueError(
            "output_attentions is not supported: a query's keys differ from layer to layer and are no positions of the input. "
            "output_eidetic=True returns what every layer remembers."
        )
    if (cu_seq_lens_q is None) != (cu_seq_lens_k is None) and cu_seq_lens_q is None:
        raise ValueError("cu_seq_lens_k was passed without cu_seq_lens_q; pass cu_seq_lens_q.")
    if cu_seq_lens_k is not None and not torch.equal(cu_seq_lens_q, cu_seq_lens_k):
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k differ; queries and keys of B'MOJO are the same documents.")
    known = {"max_length_q", "max_length_k", "num_items_in_batch"}  # hints to kernels, and to the loss
    unknown = sorted(name for name, value in kwargs.items() if name not in known and value is not None)
    if unknown:
        raise ValueError(
            f"B'MOJO's forward does not know {', '.join(unknown)}; remove it, or use one of its documented arguments."
        )


@functools.lru_cache(maxsize=32)
def _default_frequencies(theta: float, rotary_dim: int) -> tuple[float, ...]:
    return tuple(theta ** -(pair / rotary_dim) for pair in range(0, rotary_dim, 2))


_on_gpus: dict[tuple, torch.Tensor] = {}  # default frequencies, by theta, rotary_dim and device


def rotary_frequencies(config, device: torch.device | None = None) -> tuple[torch.Tensor, float]:
    """inv_freq (rotary_dim / 2,) and the factor on cos and sin, from the config at use: no buffer that a cast could round.

    Those of the default type stay on a GPU that they have been asked for on: a copy at every call would wait for it.
    """
    parameters, rotary_dim = config.rope_parameters, config.rotary_dim
    if parameters["rope_type"] == "default" or not rotary_dim:
        key = float(parameters["rope_theta"]), rotary_dim, device
        if device is None or device.type != "cuda":
            return torch.tensor(_default_frequencies(*key[:2]), dtype=torch.float64, device="cpu"), 1.0
        found = _on_gpus.get(key)
        if found is None:
            with torch.inference_mode(False):  # where a first call may be, and a later one not
                found = torch.tensor(_default_frequencies(*key[:2]), dtype=torch.float64, device=device)
            if is_plain(found):  # no tensor of a trace, which would break whatever runs after it
                _on_gpus[key] = found
        return found, 1.0
    return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"))


class BMojoForCausalLM(BMojoPreTrainedModel, GenerationMixin):
    """B'MOJO with a language-modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: BMojoConfig):
        super().__init__(config)
        self.model = BMojoModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head_multiplier = config.lm_head_multiplier
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: BMojoCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_eidetic: bool | None = None,
        seq_idx: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        past_key_values: BMojoCache | None = None,
        **kwargs,
    ) -> BMojoCausalLMOutput | tuple:
        """Logits, and the loss where labels are given.

        Args:
            labels: (batch, seq_len), shifted inside; -100 is ignored. So are padding and the first token of every row or
                packed document, which nothing of its own predicts. logits_to_keep must then be 0.
            logits_to_keep: only the last so many logits, or those at these indices; 0 keeps all. 1 saves the last layer's work
                on a long prompt too (`outputs_to_keep` of `BMojoModel.forward`).
            kwargs: for the loss (`num_items_in_batch`, `shift_labels`).

        The other arguments and the errors are those of `BMojoModel.forward`.
        """
        loss_kwargs = {name: kwargs.pop(name) for name in ("num_items_in_batch", "shift_labels") if name in kwargs}
        wants_one = isinstance(logits_to_keep, int) and logits_to_keep == 1 and labels is None
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=either_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_eidetic=output_eidetic,
            seq_idx=seq_idx,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
            outputs_to_keep=1 if wants_one else None,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        logits = project(self.lm_head, hidden_states[:, _columns_to_keep(logits_to_keep)])
        if self.lm_head_multiplier != 1:
            logits = logits * self.lm_head_multiplier

        loss = None
        if labels is not None:
            if logits.shape[1] != labels.shape[1]:
                raise ValueError(
                    f"labels have {labels.shape[1]} columns, logits_to_keep leaves {logits.shape[1]} logits: leave it 0."
                )
            tokens = read_mask(attention_mask, *hidden_states.shape[:2], _seen_before(attention_mask, hidden_states))
            layout = read_layout(tokens, hidden_states, position_ids, seq_idx, cu_seq_lens_q)
            if layout is not None and loss_kwargs.get("shift_labels") is None:
                # the next token of the row or document, not of the column
                loss_kwargs["shift_labels"] = layout.shift_labels(labels.to(hidden_states.device))
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_kwargs)
            if outputs.predictor_loss is not None:
                share = _share_of_batch(labels, **loss_kwargs)
                loss = loss + share * self.config.innovation_loss_coef * outputs.predictor_loss.to(
                    loss.device, loss.dtype
                )
        return BMojoCausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            innovations=outputs.innovations,
            eidetic_positions=outputs.eidetic_positions,
            **{CACHE_NAME: outputs.cache},
        )

    def generate(self, *args, cache=None, past_key_values=None, **kwargs):
        """As in transformers; a `BMojoCache` to go on from is taken under either name."""
        if (given := either_cache(cache, past_key_values)) is not None:
            kwargs[CACHE_NAME] = given
        recorded = isinstance(given, BMojoCache) and given.is_recording_past()
        settings = vars(kwargs.get("generation_config") or self.generation_config) | kwargs
        names = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
        assisted = any(settings.get(name) is not None for name in names)
        output = super().generate(*args, **kwargs)
        for used in (given, getattr(output, CACHE_NAME, None)):
            if assisted and not recorded and isinstance(used, BMojoCache):  # the record was begun for it: it ends here
                used.stop_past_recording()
        return output

    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, is_first_iteration=False, **kwargs):
        """As in transformers, and the cache under both names: PEFT 0.21, which looks for it, knows the old one only.

        Raises:
            ValueError: the columns of the attention mask are not those of the filled cache and the input together.
        """
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        for name in ("tokenizer", "assistant_tokenizer"):  # for stop strings and token healing, not for the model
            inputs.pop(name, None)
        if CACHE_NAME in inputs:
            inputs["cache"] = inputs["past_key_values"] = inputs[CACHE_NAME]
            # where it is PEFT's, no mask has its virtual tokens yet
            if is_first_iteration and "prepare_inputs_for_generation" not in vars(self):
                _fit_to_cache(inputs)
        return inputs

    def generate_batch(self, *args, **kwargs):
        raise NotImplementedError(_NO_CONTINUOUS_BATCHING)

    def init_continuous_batching(self, *args, **kwargs):
        raise NotImplementedError(_NO_CONTINUOUS_BATCHING)

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args, **kwargs
    ):
        """generate() makes a BMojoCache; `cache_implementation` may be None, "dynamic" or "static"."""
        wanted = generation_config.cache_implementation
        if model_kwargs.get(CACHE_NAME) is not None or generation_config.use_cache is False:
            return super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args, **kwargs
            )
        if wanted not in (None, "dynamic", "static"):
            raise ValueError(
                f"cache_implementation={wanted!r} is not supported: B'MOJO's cache is of fixed size already. Use None, or "
                "'static' for static shapes (torch.compile)."
            )
        columns = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
        cache = BMojoCache(self.config, max_cache_len=columns if wanted == "static" else None)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs[CACHE_NAME] = cache
        return None

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, **kwargs):
        """The 2-D mask as it is: B'MOJO makes the others itself, also where generate() compiles."""
        return attention_mask


_NO_CONTINUOUS_BATCHING = (
    "Continuous batching (generate_batch, cache_implementation='paged') is not supported: it pages keys and values, and "
    "B'MOJO's cache is of fixed size. Pass a padded batch to generate()."
)


def _fit_to_cache(inputs: dict) -> None:
    """Leave of what generate() would read the columns that the cache does not hold.

    transformers hands over all of them in the first step of assisted decoding from a filled cache, and where it holds all.
    """
    cache, mask, positions = inputs["cache"], inputs.get("attention_mask"), inputs.get("position_ids")
    if not isinstance(cache, BMojoCache) or not cache.seen_tokens or (mask is None and positions is None):
        return
    name = "input_ids" if inputs.get("input_ids") is not None else "inputs_embeds"
    # a mask of ones alone has been dropped, and then tokens stand at their columns
    given, columns = inputs[name].shape[1], int(positions.max()) + 1 if mask is None else mask.shape[-1]
    new = columns - cache.seen_tokens
    if new < 1 or given < new:
        raise ValueError(
            f"The cache holds {cache.seen_tokens} tokens of each row, of {columns} in all (so many has attention_mask, or what was "
            "passed to generate() without one): no token is left to read, or one is missing. To go on from a cache pass all "
            "tokens, more than it holds; or the new ones alone with an attention_mask for old and new ones together."
        )
    if given > new:
        inputs[name] = inputs[name][:, -new:]
        if inputs.get("position_ids") is not None:
            inputs["position_ids"] = inputs["position_ids"][..., -new:]


def _share_of_batch(labels, num_items_in_batch=None, shift_labels=None):
    """What part of a batch, whose micro-batches' losses are added up, this call is: 1 where it is all."""
    if num_items_in_batch is None:
        return 1
    counted = (labels[:, 1:] if shift_labels is None else shift_labels) != -100
    return counted.sum() / num_items_in_batch


def _seen_before(attention_mask, hidden_states) -> int:
    """Columns of the mask that belong to the past."""
    return 0 if attention_mask is None else max(0, attention_mask.shape[-1] - hidden_states.shape[1])


class _HeadOnModel:
    """Builds a head's base model from the class beside it: transformers' generic heads ask AutoModel, which knows no remote code."""

    def _build(self, config):
        PreTrainedModel.__init__(self, config)
        attach(config)
        self.model = BMojoModel(config)


class BMojoForSequenceClassification(_HeadOnModel, GenericForSequenceClassification, BMojoPreTrainedModel):
    def __init__(self, config):
        self._build(config)
        self.num_labels = config.num_labels
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class BMojoForTokenClassification(_HeadOnModel, GenericForTokenClassification, BMojoPreTrainedModel):
    def __init__(self, config):
        self._build(config)
        self.num_labels = config.num_labels
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", None) or 0.0)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class BMojoForQuestionAnswering(_HeadOnModel, GenericForQuestionAnswering, BMojoPreTrainedModel):
    def __init__(self, config):
        self._build(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


def get_parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Groups for an optimizer: weight decay on matrices, none on A_log, D, dt_bias, norms and biases.

    Works on the model and on a PEFT wrapper of it; leaves out frozen parameters.

    Example:
        >>> optimizer = torch.optim.AdamW(get_parameter_groups(model, weight_decay=0.1), lr=1e-3)
    """
    decayed, exempt = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            dynamics = any(part in ("A_log", "D", "dt_bias") for part in name.split("."))
            (exempt if dynamics or parameter.dim() < 2 else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]


__all__ = [
    "BMojoCache",
    "BMojoForCausalLM",
    "BMojoForQuestionAnswering",
    "BMojoForSequenceClassification",
    "BMojoForTokenClassification",
    "BMojoModel",
    "BMojoPreTrainedModel",
    "cache_bytes",
    "get_parameter_groups",
]
