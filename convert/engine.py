"""From a source to a folder: recognise it, say what every tensor is read from, write, compare."""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from . import ours
from .check import verify_conversion
from .core import Format, Piece, Refusal
from .formats import OURS, by_name, recognise
from .priming import prime
from .read import listed, read_checkpoint, read_json
from .source import CONFIGURATION, copy_along, locate
from .tensors import Assembled, Stretch
from .write import Target, appearing, check_destination, write_json, write_weights


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
MOST_LAYERS = 10_000
NEUTRAL = (  # fields of ours that say nothing about the logits
    "initializer_range use_cache pad_token_id bos_token_id eos_token_id time_step_min time_step_max time_step_floor "
    "innovation_loss_coef chunk_size unpadded_vocab_size"
)
OF_ATTENTION = (
    "num_attention_heads num_key_value_heads head_dim rope_parameters attention_bias use_qk_norm max_position_embeddings "
    "position_embedding_type rope_interleave softmax_scale key_multiplier attention_out_bias attention_conv_kernel"
)
OF_MLP = "hidden_act mlp_bias"
OF_SSM = "conv_kernel use_bias projectors_bias use_conv_bias mamba_hidden_act"
OF_EITHER_MAMBA = "state_size time_step_limit mixer_norm mixer_rms_eps"
OF_MAMBA = "expand time_step_rank mamba_intermediate_size"
OF_MAMBA2 = (
    "mamba_num_heads mamba_num_key_value_heads mamba_head_dim n_groups mamba_use_pos_emb mamba_rms_norm "
    "mamba_norm_before_gate mamba_norm_eps mamba_d_mlp D_has_hdim"
)
OF_MEMORY = (
    "eidetic_size eidetic_chunk_size eidetic_position innovation_signal innovation_predictor innovation_kernel "
    "innovation_half_life fading_span tie_attn_weights fading_query"
)
OF_EIDETIC = (
    "eidetic_chunk_size eidetic_position innovation_signal innovation_predictor innovation_kernel innovation_half_life"
)
OF_DELTA = (
    "use_short_conv use_v_conv use_gate kv_proj_rank kv_learnable_residual allow_neg_eigval num_iter ridge_strength "
    "bp_lambda use_alpha_connection use_beta_gate use_forgetting_gate use_forgetting_gate_kk gla_rescale"
)


@dataclass
class Source:
    """A source as a model of ours.

    Attributes:
        folder: where it is.
        fields: its config.json.
        form: its format; None where it is a folder of ours.
        config: the BMojoConfig that it means.
        tensors: by our names, what each tensor is read from.
        dynamics: names of its own tensors that A_log, D and dt_bias of ours are made of.
    """

    folder: Path
    fields: dict
    form: Format | None
    config: object
    tensors: dict[str, Stretch]
    dynamics: set[str]


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: str | None = None,
    max_shard_size: str | int = "5GB",
    force: bool = False,
    verify: bool = False,
    tokenizer: str | Path | None = None,
    revision: str | None = None,
    to_bmojo: bool = False,
    layers: list[int] | None = None,
    every: int | None = None,
    window: int | None = None,
    eidetic: int | None = None,
    export: str | None = None,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> Path:
    """Convert a checkpoint to a folder that transformers loads.

    Args:
        source: a folder or a Hub id of one of the known formats; with `to_bmojo` or `export` a folder of ours as well.
        destination: the new folder.
        dtype: "float32", "float16", "bfloat16" or "float64" for all tensors but an SSM's A_log, D and dt_bias, which are
            then float32 at least. None keeps every tensor as it is stored.
        max_shard_size: of the weight files, in bytes or as "5GB".
        force: replace the destination, once the conversion has succeeded.
        verify: compare logits with the original implementation, where transformers has it.
        tokenizer: folder or Hub id to take the tokenizer from instead of the source.
        revision: of a Hub id.
        to_bmojo: make `bmojo` layers of attention layers, for continued training: see `priming`.
        layers, every, window, eidetic: arguments of `priming.prime`.
        export: the format to write, for a model that is such a special case.
        progress: show a bar.
        say: takes a line for everything that the user should know.

    Returns:
        The destination.

    Raises:
        Refusal: it cannot be done exactly; nothing is left behind.
        OSError: a file cannot be read or written (the disk is full); nothing is left behind.
    """
    options = {"layers": layers, "every": every, "window": window, "eidetic": eidetic}
    check_options(to_bmojo, export, dtype, options)
    limit, wanted, destination = size_in_bytes(max_shard_size), DTYPES.get(dtype), Path(destination)
    form = None if export is None else by_name(export)
    check_destination(destination.resolve(), force)
    folder = locate(str(source), revision)
    check_apart(folder, destination)
    tokenizer_folder = None if tokenizer is None else locate(str(tokenizer), weights=False)
    model = read_source(folder, say)
    if form is not None:
        config = model.config
        fields, tensors, dynamics = export_tensors(form, config, model.tensors)
        say(f"It is written as {form.name}.")
    else:
        config, tensors = our_tensors(model, folder, options if to_bmojo else None, say)
        dynamics = {name for name in tensors if ours.is_dynamics(name)}
    targets = [Target(name, part, target_dtype(part, wanted, name in dynamics)) for name, part in tensors.items()]
    main = wanted or main_dtype(targets, dynamics)

    with appearing(destination, force) as unfinished:
        write_weights(unfinished, targets, limit, progress)
        if form is not None:
            known = {"dtype": str(main).removeprefix("torch.")} if form.model_types else {}  # transformers' own files
            write_json(unfinished / CONFIGURATION, fields | known)
        else:
            ours.save_config_and_code(config, unfinished, main)
        along = copy_along(folder, tokenizer_folder, unfinished, model.fields.get("model_type"))
        if verify:
            exact = unchanged(model.config, config) if to_bmojo else None
            say(verify_conversion(model, unfinished, form, wanted, exact))
    size = sum(target.bytes for target in targets)
    say(
        f"{destination} has {len(targets)} tensors, {readable(size)}"
        + (f", and {', '.join(along)}." if along else ".")
    )
    return destination


def our_tensors(model, folder: Path, priming: dict | None, say: Callable[[str], None]):
    """Config and tensors of a model as ours, primed where `priming` has arguments for it."""
    config, tensors = model.config, model.tensors
    if priming is not None:
        config, tensors = prime(config, tensors, say=say, **priming)
    elif model.form is None:
        raise Refusal(f"{folder} is a B'MOJO folder already: --to-bmojo primes it, --export writes another format.")
    check_tensors(tensors, ours.wanted(config))
    return config, tensors


def unchanged(config, primed) -> int:
    """On how many tokens a primed model equals its source: as many as all windows hold."""
    windows = [primed.sliding_window]
    if "sliding_attention" in config.layers_block_type:
        windows.append(config.sliding_window)
    return min(windows)


def check_options(to_bmojo: bool, export: str | None, dtype: str | None, priming: dict) -> None:
    given = [f"--{name}" for name, value in priming.items() if value is not None]
    if given and not to_bmojo:
        raise Refusal(f"{given[0]} goes with --to-bmojo only.")
    if to_bmojo and export is not None:
        raise Refusal("--to-bmojo and --export exclude each other.")
    if dtype is not None and dtype not in DTYPES:
        raise Refusal(f"--dtype is {dtype!r}; choose from {', '.join(DTYPES)}.")


def check_apart(folder: Path, destination: Path) -> None:
    folder, destination = folder.resolve(), destination.resolve()
    if destination == folder or destination in folder.parents:
        raise Refusal(f"the destination {destination} is or holds the source {folder}: choose another.")


def size_in_bytes(size: str | int) -> int:
    """Bytes that a size such as "5GB" means; K, M, G and T are powers of 1000.

    Raises:
        Refusal: it is no size, or none above zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", str(size), re.IGNORECASE)
    found = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if found < 1:
        raise Refusal(f"--max-shard-size is {size!r}; give a number of bytes such as 5GB or 200MB.")
    return found


def readable(size: int) -> str:
    """Bytes as people read them: "2.14 GB"."""
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if size >= 10**power:
            return f"{size / 10**power:.3g} {unit}"
    return f"{size} bytes"


def target_dtype(tensor: Stretch, wanted: torch.dtype | None, is_dynamics: bool) -> torch.dtype:
    if wanted is None:
        return tensor.dtype
    return torch.promote_types(wanted, torch.float32) if is_dynamics else wanted


def main_dtype(targets: list[Target], dynamics: set[str]) -> torch.dtype:
    """The dtype of most elements."""
    counts = {}
    for target in targets:
        if target.name not in dynamics:
            counts[target.dtype] = counts.get(target.dtype, 0) + target.tensor.numel
    return max(counts, key=counts.get)


# ----------------------------------------------------------------------------------------------------------------------
# Reading a source as a model of ours
# ----------------------------------------------------------------------------------------------------------------------


def read_source(folder: Path, say: Callable[[str], None]) -> Source:
    """What a folder holds.

    Raises:
        Refusal: no format recognises it, or its files do not hold what its config.json means.
    """
    fields = read_json(folder / CONFIGURATION)
    if fields.get("quantization_config"):
        raise Refusal("config.json has a quantization_config: quantised weights are not converted.")
    for name in ("num_hidden_layers", "n_layer"):  # before anything is made of them
        if isinstance(fields.get(name), int) and fields[name] > MOST_LAYERS:
            raise Refusal(f"config.json has {name} = {fields[name]}; no more than {MOST_LAYERS} are converted.")
    if fields.get("model_type") == OURS:
        say(f"{folder} is a B'MOJO folder.")
        config, stored = ours.read_config(fields), read_checkpoint(folder)
        tied = {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}
        drop_unused(stored, set(stored) - set(tied), tied, {}, say)
        check_floating(stored)
        check_tensors(stored, ours.wanted(config))
        return Source(folder, fields, None, config, stored, {n for n in stored if ours.is_dynamics(n)})
    form = recognise(fields, folder)
    say(f"{folder} is {form.name}.")
    config = ours.make_config(form.to_bmojo(fields))
    mapping, stored = form.tensors(fields), read_checkpoint(folder)
    used = {piece.name for pieces in mapping.values() for piece in pieces}
    missing = sorted(used - stored.keys())
    if missing:
        raise Refusal(f"the checkpoint lacks {len(missing)} tensors that its config.json means: {listed(missing)}.")
    check_rotary_tables(stored, config)
    drop_unused(stored, used, form.duplicates(fields), form.ignored(fields), say)
    check_floating(stored)
    check_tensors(stored, form.shapes(fields), "config.json")
    check_cover(mapping, stored)
    wanted = ours.wanted(config)
    check_names(mapping, wanted)
    tensors = {name: join(pieces, stored, wanted[name]) for name, pieces in mapping.items()}
    dynamics = {piece.name for name, pieces in mapping.items() if ours.is_dynamics(name) for piece in pieces}
    return Source(folder, fields, form, config, {name: tensors[name] for name in wanted}, dynamics)


def check_rotary_tables(stored: dict[str, Stretch], config) -> None:
    """Compare the frequencies that old files hold, and nothing is made of, with those that the configuration means.

    Raises:
        Refusal: they differ by more than half precision explains.
    """
    for name, tensor in stored.items():
        if name.endswith("rotary_emb.inv_freq"):
            want = ours.load_class("modeling_bmojo.rotary_frequencies")(config)[0].float()
            found = tensor.whole().float() if tensor.dtype is not None and tensor.shape == want.shape else None
            if found is None or not torch.allclose(found, want, rtol=1e-2, atol=1e-7):
                raise Refusal(
                    f"{name} does not hold the rotary frequencies that config.json means; one of them is wrong."
                )


def drop_unused(stored: dict[str, Stretch], used: set[str], duplicates: dict, ignored: dict, say: Callable) -> None:
    """Take tensors out that nothing is made of, and say so.

    Raises:
        Refusal: one of them is not known to be superfluous, or differs from what it should repeat.
    """
    unknown, reasons = [], {}
    for name in sorted(stored.keys() - used):
        reason = next((why for key, why in ignored.items() if name == key or re.fullmatch(key, name)), None)
        if name in duplicates:
            other = duplicates[name]
            if other not in stored or not equal(stored[name], stored[other]):
                raise Refusal(f"{name} should repeat {other}, since the embeddings are tied, but differs from it.")
            reason = f"repeats {other}"
        if reason is None:
            unknown.append(name)
        else:
            reasons.setdefault(reason, []).append(name)
            del stored[name]
    if unknown:
        raise Refusal(
            f"the checkpoint holds {len(unknown)} tensors that its config.json does not mean: {listed(unknown)}."
        )
    for reason, names in reasons.items():
        say(f"Not used ({reason}): {', '.join(names)}.")


def equal(one: Stretch, other: Stretch) -> bool:
    """Whether two tensors hold the same."""
    if one.shape != other.shape or one.dtype != other.dtype or one.dtype is None:
        return False
    pairs = zip(one.read(0, one.numel), other.read(0, other.numel), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def check_floating(stored: dict[str, Stretch]) -> None:
    odd = [name for name, tensor in stored.items() if tensor.dtype is None]
    if odd:
        raise Refusal(
            f"these tensors are no float64, float32, float16 or bfloat16 numbers (quantised?): {listed(odd)}."
        )


def check_names(found, wanted) -> None:
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or unknown:
        what = [
            f"{len(names)} {kind}: {listed(names)}"
            for kind, names in (("missing", missing), ("unknown", unknown))
            if names
        ]
        raise Refusal(f"the tensors are not those of the model: {'; '.join(what)}.")


def check_tensors(
    found: dict[str, Stretch], wanted: dict[str, tuple[int, ...]], by: str = "the configuration"
) -> None:
    """Compare names and shapes.

    Raises:
        Refusal: something is missing, unknown or of another shape; names it.
    """
    check_names(found, wanted)
    for name, shape in wanted.items():
        if tuple(found[name].shape) != tuple(shape):
            raise Refusal(f"{name} has shape {tuple(found[name].shape)}, {by} means {tuple(shape)}.")


def rows(piece: Piece, tensor: Stretch) -> tuple[int, int]:
    """First row and last row + 1 of a piece."""
    return piece.start, tensor.shape[0] if piece.stop is None else piece.stop


def check_cover(mapping: dict[str, list[Piece]], stored: dict[str, Stretch]) -> None:
    """Every row of every tensor is used once: a mistake in a format otherwise."""
    spans = {name: [] for name in stored}
    for pieces in mapping.values():
        for piece in pieces:
            spans[piece.name].append(rows(piece, stored[piece.name]))
    for name, used in spans.items():
        at = 0
        for start, stop in sorted(used):
            if start != at:
                raise RuntimeError(f"the format uses rows of {name} twice or not at all: {sorted(used)}.")
            at = stop
        if at != stored[name].shape[0]:
            raise RuntimeError(f"the format uses {at} of the {stored[name].shape[0]} rows of {name}.")


def join(pieces: list[Piece], stored: dict[str, Stretch], shape: tuple[int, ...]) -> Assembled:
    """The tensor that pieces make, which must have this shape."""
    count = 0
    for piece in pieces:
        tensor = stored[piece.name]
        start, stop = rows(piece, tensor)
        seen = piece.shape or (stop - start, *tensor.shape[1:])
        if tuple(seen[1:]) != tuple(shape[1:]):
            raise RuntimeError(f"{piece} has shape {seen}, a part of {shape} was expected.")
        count += seen[0]
    if count != shape[0]:
        raise RuntimeError(f"{pieces} have {count} rows together, {shape} was expected.")
    return Assembled(tuple(shape), [(stored[p.name], *rows(p, stored[p.name])) for p in pieces])


# ----------------------------------------------------------------------------------------------------------------------
# The way back
# ----------------------------------------------------------------------------------------------------------------------


def export_tensors(form: Format, config, tensors: dict[str, Stretch]):
    """A model of ours in another format.

    Returns:
        Their config.json, their tensors, and the names of those that are made of A_log, D or dt_bias.

    Raises:
        Refusal: the model is no special case of the format; names the field.
    """
    config = same_without_memory(config)
    fields = form.from_bmojo(config)
    check_special_case(form, config, ours.make_config(form.to_bmojo(fields)))
    shapes, parts, dynamics = form.shapes(fields), {}, set()
    for name, pieces in form.tensors(fields).items():
        at = 0
        for piece in pieces:
            stop = shapes[piece.name][0] if piece.stop is None else piece.stop
            count = stop - piece.start if piece.shape is None else piece.shape[0]
            parts.setdefault(piece.name, []).append((piece.start, stop, tensors[name], at, at + count))
            if ours.is_dynamics(name):
                dynamics.add(piece.name)
            at += count
        if at != tensors[name].shape[0]:
            raise RuntimeError(f"{form.name} takes {at} of the {tensors[name].shape[0]} rows of {name}.")
    found = {}
    for name, shape in shapes.items():
        taken = sorted(parts[name], key=lambda part: part[0])
        ends = [0, *(part[1] for part in taken)]
        if [part[0] for part in taken] != ends[:-1] or ends[-1] != shape[0]:
            raise RuntimeError(f"{form.name} fills rows {[part[:2] for part in taken]} of {name}, {shape}.")
        found[name] = Assembled(tuple(shape), [part[2:] for part in taken])
    return fields, found, dynamics


def same_without_memory(config):
    """The configuration with layers 'bmojo_f' as what they equal, 'bmojo' with eidetic_size=0, which formats know."""
    layers, same = config.layers_block_type, copy.copy(config)
    if "bmojo_f" in layers:
        same.eidetic_size = config.eidetic_size if "bmojo" in layers else 0
        same.layers_block_type = ["bmojo" if kind == "bmojo_f" else kind for kind in layers]
    return same


def check_special_case(form: Format, config, same) -> None:
    """Compare a configuration with what the exported one means to us, but for fields that this model does not read.

    Raises:
        Refusal: they differ; names the field.
    """
    layers = set(config.layers_block_type)
    unread = NEUTRAL.split()
    for names, is_read in (
        (OF_ATTENTION, config.has_attention),
        ("sliding_window", config.has_bmojo or "sliding_attention" in layers),
        (OF_MLP, config.intermediate_size is not None),
        (OF_SSM, config.ssm_types),
        (OF_EITHER_MAMBA, config.ssm_types & {"mamba", "mamba2"}),
        (OF_MAMBA, "mamba" in config.ssm_types),
        (OF_MAMBA2, "mamba2" in config.ssm_types),
        ("ssm_type", config.has_bmojo or "hybrid" in layers),
        (OF_MEMORY, config.has_bmojo),
        (OF_EIDETIC, "bmojo" in layers and config.eidetic_size),
        (OF_DELTA, config.ssm_types & {"gated_deltanet", "gated_kalmanet"}),
    ):
        unread += [] if is_read else names.split()
    for name in type(config).__annotations__:
        if name not in unread and getattr(config, name) != getattr(same, name):
            raise Refusal(
                f"the model is no special case of {form.name}: {name} is {getattr(config, name)!r}, {form.name} means "
                f"{getattr(same, name)!r}."
            )
