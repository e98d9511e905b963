"""Priming: B'MOJO layers from a Transformer's attention layers, for continued training.

A primed layer keeps q, k, v and o. Its SSM is a Mamba2 whose heads are those of attention and whose state is as large as a
head: what a query asks for is the state's output vector (C from q_proj), what a key answers to its input vector (B from
k_proj), what a value carries its input (x from v_proj), and out_proj is o_proj. Grouped heads stay grouped. The convolution
passes the current token on; the gate is the mean of the transposed o_proj and of v_proj, repeated for its group; the rest is
initialised as for a new layer. Source: the Stage 0 initialisation of awslabs/hybrid-model-factory, by B'MOJO's authors.

How close that is: on a text no longer than the window, a primed layer sees what attention saw, so the logits equal the
original's. On a longer one they equal those of the original with sliding-window attention where the fading span is masked and
no eidetic memory is kept; what these two add is for training to use.
"""

from collections.abc import Callable, Iterable, Iterator

import torch

from . import ours
from .core import Refusal
from .read import listed
from .tensors import Assembled, Computed, Stretch


WINDOW, EIDETIC = 2048, 256
ATTENTION = ("full_attention", "sliding_attention")


def prime(
    config,
    tensors: dict[str, Stretch],
    *,
    layers: list[int] | None = None,
    every: int | None = None,
    window: int | None = None,
    eidetic: int | None = None,
    say: Callable[[str], None] = print,
):
    """The configuration and tensors of a model whose attention layers became B'MOJO layers.

    Args:
        config: a BMojoConfig with layers of attention only.
        tensors: its tensors by name.
        layers: numbers of the layers, from 0; None: all, or those that `every` says.
        every: prime layers 0, every, 2 * every and so on.
        window: w; None: that of the sliding layers, or 2048.
        eidetic: M; None: 256.
        say: takes lines for the user.

    Raises:
        Refusal: a layer is no attention layer or does not exist, or the options contradict each other or the model.
    """
    chosen = choose(config, layers, every)
    kinds = ["bmojo" if layer in chosen else kind for layer, kind in enumerate(config.layers_block_type)]
    slides = "sliding_attention" in config.layers_block_type
    window = (config.sliding_window if slides else WINDOW) if window is None else window
    if "sliding_attention" in kinds and window != config.sliding_window:
        raise Refusal(
            f"--window is {window}, and the sliding layers that are left have {config.sliding_window}: a model has one "
            "window. Prime them all, or leave --window out."
        )
    primed = ours.make_config(
        {name: getattr(config, name) for name in type(config).__annotations__}
        | {
            "layers_block_type": kinds,
            "sliding_window": window,
            "eidetic_size": EIDETIC if eidetic is None else eidetic,
            "ssm_type": "mamba2",
            "state_size": config.head_dim,
            "mamba_num_heads": config.num_attention_heads,
            "mamba_num_key_value_heads": config.num_key_value_heads,
            "mamba_head_dim": config.head_dim,
            "n_groups": config.num_attention_heads,
            "mixer_norm": "learned" if config.use_qk_norm else None,
            "mixer_rms_eps": config.rms_norm_eps,
            "use_bias": config.attention_bias,
            "projectors_bias": config.attention_out_bias,
        }
    )
    found = dict(tensors)
    for layer in chosen:
        found |= fading(primed, tensors, layer)
    say(f"B'MOJO layers are {listed(map(str, chosen), 100)}: window {window}, eidetic memory {primed.eidetic_size}.")
    return primed, found


def choose(config, layers: list[int] | None, every: int | None) -> list[int]:
    """Numbers of the layers to prime, in order."""
    if layers is not None and every is not None:
        raise Refusal("--layers and --every exclude each other.")
    if every is not None and every < 1:
        raise Refusal(f"--every is {every}; it must be at least 1.")
    others = sorted(set(config.layers_block_type) - set(ATTENTION))
    if others:
        raise Refusal(f"the model has {' and '.join(others)} layers; only Transformers are primed.")
    everything = range(config.num_hidden_layers)
    chosen = sorted(set(everything[:: every or 1] if layers is None else layers))
    for layer in chosen:
        if layer not in everything:
            raise Refusal(f"--layers names {layer}; the model has layers 0 to {config.num_hidden_layers - 1}.")
    if not chosen:
        raise Refusal("--layers names no layer.")
    return chosen


def fading(config, tensors: dict[str, Stretch], layer: int) -> dict[str, Stretch]:
    """The SSM of a primed layer, by name."""
    at = f"model.layers.{layer}.mixer."
    query, key, value, output = (tensors[f"{at}{name}_proj.weight"] for name in "qkvo")
    heads, keys, depth, size = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.hidden_size,
    )
    inner, convolved, taps = heads * depth, depth * (heads + 2 * keys), config.conv_kernel

    def make(shape: tuple[int, ...], blocks: Callable[[], Iterable[torch.Tensor]], dtype=value.dtype) -> Computed:
        return Computed(shape, dtype, blocks)

    def gate() -> Iterator[torch.Tensor]:
        """Head by head the mean of o_proj's columns, transposed, and of the rows of v_proj that the head reads."""
        columns, values = output.whole().view(size, heads, depth), value.whole().view(keys, depth, size)
        for head in range(heads):
            yield (widen(columns[:, head].T) + widen(values[head // (heads // keys)])) / 2

    def gate_bias() -> Iterator[torch.Tensor]:
        yield tensors[f"{at}v_proj.bias"].whole().view(keys, depth).repeat_interleave(heads // keys, 0) / 2

    def time_steps() -> Iterator[torch.Tensor]:
        yield torch.randn(heads, size, generator=torch.Generator().manual_seed(layer)) * config.initializer_range

    def current_tap() -> Iterator[torch.Tensor]:
        yield torch.eye(taps)[-1].expand(convolved, taps)

    made = {
        "in_proj.weight": stack(make((inner, size), gate), value, key, query, make((heads, size), time_steps)),
        "conv1d.weight": make((convolved, 1, taps), current_tap),
        "norm.weight": make((inner,), lambda: [torch.ones(inner)]),
        "out_proj.weight": output,
    }
    if config.use_conv_bias:
        made["conv1d.bias"] = make((convolved,), lambda: [torch.zeros(convolved)])
    if config.use_bias:
        copied = [tensors[f"{at}{name}_proj.bias"] for name in "vkq"]
        made["in_proj.bias"] = stack(make((inner,), gate_bias), *copied, make((heads,), lambda: [torch.zeros(heads)]))
    if config.projectors_bias:
        made["out_proj.bias"] = tensors[f"{at}o_proj.bias"]
    if config.use_qk_norm:
        made |= {"B_norm.weight": tensors[f"{at}k_norm.weight"], "C_norm.weight": tensors[f"{at}q_norm.weight"]}
    for name, tensor in dynamics(config, layer).items():
        made[f"dynamics.{name}"] = make(tuple(tensor.shape), lambda tensor=tensor: [tensor], torch.float32)
    return {f"{at}fading.{name}": tensor for name, tensor in made.items()}


def widen(x: torch.Tensor) -> torch.Tensor:
    """In float32, or as it is where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def stack(*parts: Stretch) -> Assembled:
    """Tensors one after the other along the first axis."""
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return Assembled(shape, [(part, 0, part.shape[0]) for part in parts])


def dynamics(config, layer: int) -> dict[str, torch.Tensor]:
    """A_log, D and dt_bias as a new layer has them, always the same for a layer."""
    module = ours.load_class("ssm_bmojo.BMojoDynamics")(config, "mamba2")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(layer)
        module.initialise()
    return {name: tensor.detach() for name, tensor in module.named_parameters()}
