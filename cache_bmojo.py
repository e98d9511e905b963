"""The cache of B'MOJO: what one sequence needs to go on, of a size that does not grow with the sequence."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.cache_utils import Cache, CacheLayerMixin

from .configuration_bmojo import BMOJO_TYPES, DELTA_TYPES
from .numerics_bmojo import at_least_float32


_FINGERPRINT = (  # what a saved cache must agree on with the model that goes on with it
    "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim layers_block_type ssm_type sliding_window "
    "state_size conv_kernel expand mamba_num_heads mamba_head_dim n_groups mamba_num_key_value_heads "
    "mamba_intermediate_size mamba_use_pos_emb eidetic_size eidetic_chunk_size eidetic_position innovation_signal "
    "innovation_predictor innovation_kernel innovation_half_life fading_span tie_attn_weights use_qk_norm rope_parameters "
    "position_embedding_type rope_interleave key_multiplier attention_conv_kernel fading_query "
    "softmax_scale use_short_conv use_v_conv"
).split()
_FORMAT = "bmojo-cache-5"  # of saved caches
GROWING = ("full_key", "full_value")  # the tensors of a state that hold every column seen
ROOM = 64  # columns more than needed by which these grow, so that not every token copies them
_MAX_LOGGED_TOKENS = 1024  # rollback reaches at least one call back, and further while the log holds fewer tokens


def _differences(described: dict, config) -> str:
    """Fields in which a configuration differs from a description of one, in words."""
    now = json.loads(json.dumps({name: getattr(config, name) for name in _FINGERPRINT}))
    then = {name: described.get(name, getattr(type(config), name, None)) for name in now}  # an older file lacks fields
    fields = [name for name in now if then[name] != now[name]]
    return ", ".join(f"{name} ({then[name]} there, {now[name]} here)" for name in fields)


def state_shapes(config, layer_type: str, columns: int = 0) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name, shape of one row, and kind of every tensor in the state of a layer of that type.

    Kinds: "model", the dtype of the activations; "wide", that dtype but at least float32; "int64". The tensors "full_key"
    and "full_value" are the only ones that grow: their second axis is the number of columns seen.

    "window_innovation" and "eidetic_innovation" are what the memory's choice compares: with `innovation_half_life` what is left
    of innovations (`BMojoMixer.score`).

    Keys and values that a token may see lie in one tensor each, head first, so that one product reads them all: `memory_slots`
    says where. Those of fading tokens that are too new to be seen wait in another, "waiting_key" and "waiting_value".
    """
    kind = config.ssm_type if layer_type in (*BMOJO_TYPES, "hybrid") else layer_type
    shapes = {}
    if kind in ("mamba", "mamba2"):
        channels = sum(convolved_widths(config, kind))
        state = (channels,) if kind == "mamba" else (config.mamba_num_heads, config.mamba_head_dim)
        state = (*state, config.state_size)
        shapes["conv"] = ((config.conv_kernel - 1, channels), "model")
        shapes["ssm"] = (state, "wide")
    heads, head_dim = config.num_key_value_heads, config.head_dim
    if kind in DELTA_TYPES:
        if config.use_short_conv:
            shapes["conv"] = ((config.conv_kernel - 1, sum(convolved_widths(config, kind))), "model")
        shapes["ssm"] = ((config.num_attention_heads, head_dim, head_dim), "wide")
        if kind == "gated_kalmanet":
            shapes["kk_ssm"] = shapes["ssm"]
    if layer_type in ("full_attention", "hybrid"):
        shapes |= dict.fromkeys(GROWING, ((heads, columns, head_dim), "model"))
    if config.attention_conv_kernel and layer_type in ("full_attention", "sliding_attention", "hybrid"):
        channels = (config.num_attention_heads + 2 * heads) * head_dim
        shapes["qkv_conv"] = ((config.attention_conv_kernel - 1, channels), "model")
    slots = memory_slots(config, layer_type)
    if slots:
        total = max(part.stop for part in slots.values())
        shapes |= dict.fromkeys(("key", "value"), ((heads, total, head_dim), "model"))
    if waiting := sum(ring.waiting for ring in memory_rings(config, layer_type).values()):
        shapes |= dict.fromkeys(("waiting_key", "waiting_value"), ((heads, waiting, head_dim), "model"))
    if "eidetic" in slots:
        memory = config.eidetic_size
        shapes |= {"window_innovation": ((slots["window"].stop,), "wide")}
        shapes |= {"eidetic_innovation": ((memory,), "wide"), "eidetic_position": ((memory,), "int64")}
        if config.innovation_predictor in ("average", "exponential", "learnable"):
            shapes["history"] = ((config.innovation_kernel, config.hidden_size), "model")  # a ring
    return shapes


def convolved_widths(config, kind: str) -> list[int]:
    """Channels that the SSM's convolution runs over: of x for "mamba", of x, B and C for "mamba2", else of q, k and v."""
    if kind in DELTA_TYPES:
        parts = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
        taken = (3 if config.use_v_conv else 2) if config.use_short_conv else 0
        return [heads * config.head_dim for heads in parts[:taken]]
    if kind == "mamba":
        return [config.mamba_intermediate_size or config.expand * config.hidden_size]
    own = config.mamba_num_key_value_heads
    x, B = (config.mamba_num_heads, config.n_groups) if own is None else (own, own)
    return [x * config.mamba_head_dim, B * config.state_size, config.n_groups * config.state_size]


@dataclass(frozen=True)
class Ring:
    """Where the last `size` tokens of a row lie: the one at position p in slot p % size."""

    size: int
    waiting = 0  # slots, the last ones, that are not among those a token reads

    def slots(self, positions, last):
        """Slots of tokens at `positions` (rows or 1, n), of those that are held when the newest is at `last` (rows or 1, 1)."""
        return positions % self.size

    def positions(self, last):
        """Position held by each slot when the newest token is at `last` (rows or 1, 1); negative where empty."""
        return last - (last - torch.arange(self.size, device=last.device)) % self.size


@dataclass(frozen=True)
class FadingRing(Ring):
    """Where the last 2w fading tokens lie: in front those that are seen while a chunk lasts, behind them those that wait.

    A token is seen from age w on. So while the chunk of c tokens lasts that begins at s, tokens from s - w + c on are not:
    they wait, but for those of the chunk itself, each of which takes the slot of the token 2w before it, the last to see
    that one. When the next chunk begins, they exchange places with the c tokens that have waited longest. Both parts are
    rings on their own, of `front` = w + c and w - c slots.

    With `front` = 2w none waits, and c is w here.
    """

    front: int

    @property
    def waiting(self) -> int:
        return self.size - self.front

    @property
    def period(self) -> int:
        return self.front - self.size // 2

    def slots(self, positions, last):
        begun = last - last % self.period
        old = positions < begun
        front = torch.where(old, positions, positions - self.size) % self.front
        if not self.waiting:
            return front
        waits = old & (positions >= begun - self.waiting)
        return torch.where(waits, self.front + positions % self.waiting, front)

    def positions(self, last):
        begun = last - last % self.period
        front = Ring(self.front).positions(begun - self.waiting - 1)
        front = torch.where(front <= last - self.size, front + self.size, front)
        return torch.cat([front, Ring(self.waiting).positions(begun - 1)], 1) if self.waiting else front


def memory_rings(config, layer_type: str) -> dict[str, Ring]:
    """How the tokens of a layer lie in those of its memories that are rings, "window" and "fading", as far as it has them.

    The window holds w + c tokens where there is an eidetic memory, since a token that has left the window may wait c tokens
    for the next chunk boundary. Fading tokens wait where c is at most half of w.
    """
    window, chunk = config.sliding_window, config.eidetic_chunk_size
    if layer_type == "sliding_attention":
        return {"window": Ring(window)}
    if layer_type not in BMOJO_TYPES:
        return {}
    rings = {"window": Ring(window + (chunk if layer_type == "bmojo" and config.eidetic_size else 0))}
    if config.fading_span:
        rings["fading"] = FadingRing(2 * window, window + (chunk if 2 * chunk <= window else window))
    return rings


def memory_slots(config, layer_type: str) -> dict[str, slice]:
    """Which slots of a layer's keys and values belong to which memory: "window", "fading", "eidetic", as far as it has them.

    Of the `memory_rings` they are those that a token reads; what waits is in "waiting_key" and "waiting_value".
    """
    sizes = {name: ring.size - ring.waiting for name, ring in memory_rings(config, layer_type).items()}
    sizes["eidetic"] = config.eidetic_size if layer_type == "bmojo" else 0
    slots, start = {}, 0
    for name, size in sizes.items():
        if size:
            slots[name] = slice(start, start + size)
            start += size
    return slots


def new_state(config, layer_type: str, like: torch.Tensor, columns: int = 0) -> dict[str, torch.Tensor]:
    """The state before the first token, for the batch, dtype and device of `like` (batch, ...)."""
    kinds = {"model": like.dtype, "wide": at_least_float32(like), "int64": torch.int64}
    state = {}
    for name, (shape, kind) in state_shapes(config, layer_type, columns).items():
        state[name] = torch.zeros((like.shape[0], *shape), dtype=kinds[kind], device=like.device)
    if "eidetic_position" in state:
        state["eidetic_position"].fill_(-1)
        state["eidetic_innovation"].fill_(-torch.inf)
    return state


class BMojoCacheLayer(CacheLayerMixin):
    """The state of one layer: tensors by name, batch first, as `state_shapes` lists them; empty before the first call."""

    is_croppable = True
    supports_early_init = False

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.state: dict[str, torch.Tensor] = {}
        self.record_past = False  # transformers itself turns it off when it hands a cache back

    def lazy_initialization(self, key_states, value_states):
        raise NotImplementedError("A BMojoCache is filled by the model's forward, not by keys and values.")

    def update(self, key_states, value_states, *args, **kwargs):
        raise NotImplementedError("A BMojoCache is filled by the model's forward, not by keys and values.")

    def get_seq_length(self) -> int:
        raise NotImplementedError("Layers of a BMojoCache share one count: ask the cache, not the layer.")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise NotImplementedError("B'MOJO makes its own masks from the positions of the tokens.")

    def get_max_length(self) -> int:
        return -1

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every tensor of the state by function(tensor)."""
        self.state = {name: function(tensor) for name, tensor in self.state.items()}

    def offload(self):
        self.map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self):
        raise NotImplementedError("A BMojoCache does not move its layers between devices.")


class BMojoCache(Cache):
    """The cache of a B'MOJO model, passed as `cache` and returned by it.

    Bytes for a batch of `rows` (equal to `num_bytes()`; s bytes per activation, W = 4, or 8 in float64; kv =
    num_key_value_heads * head_dim; w, c, M as `sliding_window`, `eidetic_chunk_size`, `eidetic_size`):

        rows * (8 + sum over layers of
            bmojo               2 kv s (w + c) + W (w + c) + 2 kv s 2w + M (2 kv s + W + 8) + innovation_kernel hidden_size s
                                + the bytes of its SSM; with M = 0: as bmojo_f
            bmojo_f             2 kv s w + 2 kv s 2w + the bytes of its SSM
            mamba2              (conv_kernel - 1) (heads head_dim + 2 n_groups state_size) s + heads head_dim state_size W;
                                with g = mamba_num_key_value_heads the middle factor is g (head_dim + state_size) + n_groups state_size
            mamba               (conv_kernel - 1) inner s + inner state_size W, inner = expand hidden_size or mamba_intermediate_size
            gated_deltanet      (conv_kernel - 1) (num_attention_heads + 2 num_key_value_heads) head_dim s
                                + num_attention_heads head_dim^2 W
            gated_kalmanet      the same, its second term twice
            sliding_attention   2 kv s w
            full_attention      2 kv s (columns seen, or max_cache_len)
            hybrid              that, and the bytes of its SSM)

    (without `fading_span` they have no 2w term; under a control predictor no innovation_kernel term; without
    `use_v_conv` or `use_short_conv` what is not convolved is not kept; with `attention_conv_kernel` K the last three have
    (K - 1) (num_attention_heads head_dim + 2 kv) s more)
    so it is allocated whole at the first call and does not grow, unless there are `full_attention` or `hybrid` layers.

    Args:
        config: the model's configuration.
        max_cache_len: columns reserved for `full_attention` and `hybrid` layers, which then do not grow either and refuse more.
            Such a cache has static shapes, as `cache_implementation="static"` and torch.compile need.

    Attributes:
        lengths: real tokens seen by each row, int64 (batch,); None before the first call.
        seen_tokens: columns seen, padding included.
        even: whether all columns seen were tokens, so that `seen_tokens` is the length of every row.
    """

    def __init__(self, config, max_cache_len: int | None = None):
        super().__init__(layers=[BMojoCacheLayer() for _ in config.layers_block_type])
        self.config = config
        self.max_cache_len = max_cache_len
        self.lengths: torch.Tensor | None = None
        self.seen_tokens, self.even = 0, True
        self.steps = None, None  # the model's tables for the tokens of the current chunk, and what they hold for
        self.unfinished = False  # a call writes the states in place, and has not come to its end
        self._log: list[dict] = []

    # -- what the model calls ------------------------------------------------------------------------------------------

    def check_model(self, config) -> None:
        """Refuse to go on under another configuration than the cache was made for."""
        if config is self.config:
            return
        described = json.loads(json.dumps({name: getattr(self.config, name) for name in _FINGERPRINT}))
        if differing := _differences(described, config):
            raise ValueError(f"cache belongs to a model with another configuration: {differing}.")

    def begin(self, like: torch.Tensor) -> torch.Tensor:
        """Check that a call with the activations `like` (batch, seq_len, ...) fits; returns the rows' lengths so far."""
        batch, seq_len = like.shape[:2]
        if self.unfinished:
            raise RuntimeError(
                "The last call with this cache was interrupted while it wrote the states; they belong to no length. reset() "
                "it and read the text again, or go on from a copy (copy.deepcopy) that was made before."
            )
        if self.lengths is None:
            self.lengths = torch.zeros(batch, dtype=torch.int64, device=like.device)
        if self.lengths.shape[0] != batch:
            raise ValueError(
                f"cache holds a batch of {self.lengths.shape[0]}, the input is a batch of {batch}. Repeat or "
                "select its rows (batch_repeat_interleave, batch_select_indices), or reset() it."
            )
        if self.max_cache_len is not None and self.seen_tokens + seq_len > self.max_cache_len:
            raise ValueError(
                f"max_cache_len is {self.max_cache_len}; {self.seen_tokens} columns are in the cache and {seq_len} more "
                "do not fit. Use a larger max_cache_len, or a cache without one."
            )
        return self.lengths.to(like.device)

    def layer_state(self, layer_idx: int, layer_type: str, like: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state of a layer, made for the batch, dtype and device of `like` at the first call."""
        layer = self.layers[layer_idx]
        if not layer.state:
            inferring = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
            with torch.inference_mode(False) if inferring else nullcontext():
                layer.state = new_state(self.config, layer_type, like, self.max_cache_len or 0)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # autograd saves no inference tensors
            layer.map(lambda tensor: tensor.clone() if tensor.is_inference() else tensor)
        return layer.state

    def store(self, states: list[dict[str, torch.Tensor]], columns: int, tokens, replays: list[Callable] | None):
        """Take the states after a call.

        Args:
            states: of every layer.
            columns: of the call.
            tokens: which of them were real tokens, bool (batch, columns); None: all.
            replays: for every layer a function from new lengths (batch,) to the state after only so many tokens of
                the call; needed while recording.
        """
        self.even, self.unfinished = self.even and tokens is None, False
        if self.is_recording_past() and columns:
            if tokens is None:
                tokens = torch.ones(len(self.lengths), columns, dtype=torch.bool, device=self.lengths.device)
            before = [layer.state for layer in self.layers]
            self._log.append({"before": before, "lengths": self.lengths, "tokens": tokens, "replays": replays})
            while len(self._log) > 1 and sum(call["tokens"].shape[1] for call in self._log) > _MAX_LOGGED_TOKENS:
                self._log.pop(0)
        elif columns:
            self._log = []  # what it holds no longer ends where the cache does
        for layer, state in zip(self.layers, states, strict=True):
            layer.state = state
        self.lengths = self.lengths + (columns if tokens is None else tokens.sum(1).to(self.lengths.device))
        self.seen_tokens = self.seen_tokens + columns

    # -- the interface of transformers.Cache ----------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen so far, padding included: what a 2-D attention mask over past and new columns counts."""
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.seen_tokens + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1 if self.max_cache_len is None else self.max_cache_len

    @property
    def batch_size(self) -> int:
        return -1 if self.lengths is None else self.lengths.shape[0]

    @property
    def is_compileable(self) -> bool:
        """Static shapes were asked for, and no log grows; without, `generate` on a GPU would compile by itself."""
        return self.max_cache_len is not None and not self.is_recording_past()

    @property
    def is_initialized(self) -> bool:
        return self.lengths is not None

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.seen_tokens > 0

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        raise NotImplementedError("A BMojoCache is filled by the model's forward, not by keys and values.")

    def reset(self) -> None:
        """Forget every sequence; the next call may have another batch size."""
        for layer in self.layers:
            layer.state = {}
        self.lengths, self.seen_tokens, self.even, self._log = None, 0, True, []
        self.steps, self.unfinished = (None, None), False

    def _change_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for layer in self.layers:
            layer.map(function)
        if self.lengths is not None:
            self.lengths = function(self.lengths)
        self._log = []  # a log of other rows could not be rolled back

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._change_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if indices.dtype == torch.bool:
            indices = indices.nonzero().squeeze(-1)
        self._change_rows(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def __getstate__(self):
        """Without the log, as `__deepcopy__`, and the tables of the chunk: views, each of which would take all its memory along."""
        return self.__dict__ | {"steps": (None, None), "_log": []}

    def __deepcopy__(self, memo) -> "BMojoCache":
        """A copy with tensors of its own, and an empty log: it can't be rolled back behind the copy."""
        twin = type(self)(self.config, self.max_cache_len)
        twin.seen_tokens, twin.even, twin.unfinished = self.seen_tokens, self.even, self.unfinished
        twin.lengths = None if self.lengths is None else self.lengths.clone()
        for layer, own in zip(self.layers, twin.layers, strict=True):
            own.state = {name: tensor.clone() for name, tensor in layer.state.items()}
            own.record_past = layer.record_past
        return twin

    # -- rollback ------------------------------------------------------------------------------------------------------

    def activate_past_recording(self) -> None:
        """From now on keep what `crop` needs: the states before the last calls, and the inputs of those calls."""
        for layer in self.layers:
            layer.record_past = True

    def stop_past_recording(self) -> None:
        """Keep nothing for `crop` any more, and forget what was kept."""
        for layer in self.layers:
            layer.record_past = False
        self._log = []

    def is_recording_past(self, layer_idx: int = 0) -> bool:
        return self.layers[layer_idx].record_past

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove columns as if they had never been seen, and drop the log before them.

        Args:
            tokens_to_remove: 0 or negative, as transformers counts. 0 only drops the log.

        Raises:
            ValueError: a positive count, or more columns than the log holds.
            RuntimeError: `activate_past_recording` was not called before the columns were.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of columns to remove, got {tokens_to_remove}.")
        remove = -tokens_to_remove
        if remove and not self.is_recording_past():
            raise RuntimeError(
                "crop needs a record of the past: call activate_past_recording() before the calls to undo."
            )
        logged = sum(call["tokens"].shape[1] for call in self._log)
        if remove > logged:
            raise ValueError(f"crop was asked to remove {remove} columns, the log holds the last {logged}.")
        while remove:
            call = self._log.pop()
            columns = call["tokens"].shape[1]
            kept = call["tokens"][:, : max(0, columns - remove)]
            lengths = kept.sum(1)
            self.seen_tokens -= min(remove, columns)
            for layer, before, replay in zip(self.layers, call["before"], call["replays"], strict=True):
                layer.state = before if remove >= columns else replay(lengths)
                grown = layer.state["full_key"].shape[2] if "full_key" in layer.state else 0
                if self.max_cache_len is None and grown > self.seen_tokens + ROOM:  # give back the columns, too
                    shorter = {name: layer.state[name][:, :, : self.seen_tokens].clone() for name in GROWING}
                    layer.state = layer.state | shorter
            self.lengths = call["lengths"] + lengths.to(call["lengths"].device)
            remove -= min(remove, columns)
        self._log = []

    # -- size and storage ----------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the cache by name, batch first; of what grows the columns that have been seen."""
        named = {f"layers.{i}.{name}": t for i, layer in enumerate(self.layers) for name, t in layer.state.items()}
        if self.max_cache_len is None:
            named = {k: t[:, :, : self.seen_tokens] if k.endswith(GROWING) else t for k, t in named.items()}
        return named if self.lengths is None else {"lengths": self.lengths, **named}

    def num_bytes(self) -> int:
        """Bytes of all tensors: see the formula above.

        Not counted are the log of a recording cache, the columns (64 at most) that keys of full attention have to spare, and
        the model's tables for the tokens of a chunk, `steps`, one for the whole cache and of a constant size.
        """
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def save(self, path) -> None:
        """Write the cache to a safetensors file, so that a long prompt is read once.

        Raises:
            ValueError: nothing has been seen yet.
        """
        if self.lengths is None:
            raise ValueError("The cache is empty: run the model with cache=cache before save().")
        metadata = {
            "format": _FORMAT,
            "seen_tokens": str(self.seen_tokens),
            "max_cache_len": json.dumps(self.max_cache_len),
            "config": json.dumps({name: getattr(self.config, name) for name in _FINGERPRINT}),
        }
        save_file({name: tensor.contiguous() for name, tensor in self.tensors().items()}, str(path), metadata)

    @classmethod
    def load(cls, path, config, device: str | torch.device = "cpu") -> "BMojoCache":
        """Read a cache that `save` wrote.

        Args:
            path: the safetensors file.
            config: of the model that goes on with it.
            device: where the tensors go; for a model spread over several devices, each layer's state follows its input.

        Raises:
            ValueError: the file is no saved cache, or of a model with another configuration.
        """
        try:
            opened = safe_open(str(path), framework="pt", device=str(device))
        except SafetensorError as error:
            raise ValueError(f"{path} was not written by BMojoCache.save: {error}") from error
        with opened as file:
            metadata = file.metadata() or {}
            found = metadata.get("format", "")
            if found != _FORMAT:
                older = found.startswith("bmojo-cache-")
                why = f"holds a cache of another version ({found}, not {_FORMAT}): read its text again"
                raise ValueError(f"{path} {why if older else 'was not written by BMojoCache.save'}.")
            if differing := _differences(json.loads(metadata["config"]), config):
                raise ValueError(f"{path} belongs to a model with another configuration: {differing}.")
            cache = cls(config, max_cache_len=json.loads(metadata["max_cache_len"]))
            cache.seen_tokens = int(metadata["seen_tokens"])
            for name in file.keys():  # noqa: SIM118 - a safetensors file is not iterable
                if name == "lengths":
                    cache.lengths = file.get_tensor(name)
                    cache.even = bool((cache.lengths == cache.seen_tokens).all())
                else:
                    _, layer_idx, tensor_name = name.split(".")
                    cache.layers[int(layer_idx)].state[tensor_name] = file.get_tensor(name)
        return cache


def cache_bytes(config, rows: int, dtype: torch.dtype, columns: int = 0) -> int:
    """What `BMojoCache.num_bytes()` will be, from the configuration alone.

    Args:
        config: the model's configuration.
        rows: batch size.
        dtype: of the activations.
        columns: seen by `full_attention` and `hybrid` layers (or max_cache_len); without effect on other layers.
    """
    sizes = {
        "model": dtype.itemsize,
        "wide": torch.promote_types(dtype, torch.float32).itemsize,
        "int64": torch.int64.itemsize,
    }
    total = torch.int64.itemsize
    for layer_type in config.layers_block_type:
        for shape, kind in state_shapes(config, layer_type, columns).values():
            total += torch.Size(shape).numel() * sizes[kind]
    return rows * total
