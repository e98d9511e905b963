"""The formats that are known. A new one is a module with a `Format` and a line here; the first that recognises a source wins."""

from pathlib import Path

from .core import Format, Refusal
from .falcon_h1 import FalconH1
from .falcon_mamba import FalconMamba
from .hmf import HMF
from .jamba import Jamba
from .llama import Llama, Mistral, Qwen3
from .mamba import Mamba, Mamba2
from .native import Native


FORMATS: tuple[Format, ...] = (
    Llama(),
    Mistral(),
    Qwen3(),
    Mamba(),
    Mamba2(),
    FalconMamba(),
    Jamba(),
    FalconH1(),
    Native(),
    HMF(),
)
OURS = "bmojo"


def recognise(config: dict, folder: Path) -> Format:
    """The format of a source folder with this config.json.

    Raises:
        Refusal: it is none of them; lists those that are known.
    """
    for form in FORMATS:
        if form.recognises(config, folder):
            return form
    kind = config.get("model_type")
    what = f"is of model_type {kind!r}" if kind else "names no model_type and has the layout of no known format"
    raise Refusal(f"{folder / 'config.json'} {what}. Known are {', '.join(form.name for form in FORMATS)}.")


def by_name(name: str) -> Format:
    """The format that is called so.

    Raises:
        Refusal: none is.
    """
    for form in FORMATS:
        if form.name == name:
            return form
    raise Refusal(f"there is no format {name!r}; known are {', '.join(form.name for form in FORMATS)}.")
