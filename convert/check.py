"""Comparing logits of a conversion with those of the original implementation."""

from pathlib import Path

import torch

from .core import Format, Refusal
from .ours import load_class
from .read import read_json


LARGEST = 1e-4  # relative difference of the logits of a position: float32 and another order of sums explain 1e-5
LONGEST = 512  # ids


def verify_conversion(
    source, result: Path, exported: Format | None, dtype: torch.dtype | None, window: int | None
) -> str:
    """Compare source and result on random ids, in float32.

    Args:
        source: the `Source`.
        result: the folder that was written.
        exported: its format; None where it is ours.
        dtype: what the weights were converted to; the source's are rounded likewise.
        window: on how many tokens a primed model equals its source; None otherwise.

    Returns:
        A line for the user: the largest relative difference, or why there is nothing to compare with.

    Raises:
        Refusal: the difference is too large.
    """
    try:
        theirs, made = load_source(source), load_result(result, exported)
    except Refusal as reason:
        return f"Not verified: {reason}"
    if dtype is not None:
        round_to(theirs, dtype, source.dynamics)
    ids = random_ids(source.config, window)
    want = logits(theirs, ids)
    got = logits(made, ids)
    if got.shape != want.shape:
        raise Refusal(
            f"verification failed: logits have shape {tuple(got.shape)}, the original's {tuple(want.shape)}."
        )
    difference = ((got - want).norm(dim=-1) / want.norm(dim=-1)).max().item()
    if not difference <= LARGEST:
        raise Refusal(f"verification failed: logits differ from the original's by {difference:.3g} (relative).")
    what = f"{ids.shape[0]} x {ids.shape[1]} random ids"
    return f"Verified on {what}: the largest relative difference of a position's logits is {difference:.2g}."


def random_ids(config, window: int | None) -> torch.Tensor:
    """Ids, always the same for a vocabulary; more than the model's window where that is small, no more than `window`."""
    length = 64
    if "sliding_attention" in config.layers_block_type:
        length = min(LONGEST, 2 * config.sliding_window + length)
    length = length if window is None else min(length, window)
    return torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=ids, use_cache=False).logits.float()


def load_result(folder: Path, exported: Format | None):
    """A folder that was just written, in float32, as users load it."""
    from transformers import AutoModelForCausalLM

    if exported is not None:
        return exported.original(read_json(folder / "config.json"), folder)
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, trust_remote_code=True)


def load_source(source):
    """The source in float32: by transformers, or by the code of this repository, never by code that came with it."""
    if source.form is not None:
        return source.form.original(source.fields, source.folder)
    return load_class("modeling_bmojo.BMojoForCausalLM").from_pretrained(str(source.folder), dtype=torch.float32)


@torch.no_grad()
def round_to(model, dtype: torch.dtype, keep: set[str]) -> None:
    """Round all parameters but those of these names to what the dtype can hold."""
    for name, parameter in model.named_parameters():
        if name not in keep:
            parameter.copy_(parameter.to(dtype))
