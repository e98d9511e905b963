"""Our own side: the classes of this repository, what tensors a configuration means, and a model folder but for its weights."""

import functools
import sys
from pathlib import Path

import torch

from .core import Refusal
from .theirs import NEUTRAL


ROOT = Path(__file__).resolve().parent.parent  # this repository, itself a model folder
DYNAMICS = ("A_log", "D", "dt_bias")  # parameters of an SSM that stay in float32


@functools.cache
def load_class(reference: str):
    """A class of this repository, loaded as users of a model folder load it: "modeling_bmojo.BMojoForCausalLM"."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    return get_class_from_dynamic_module(reference, str(ROOT))


def make_config(fields: dict):
    """A BMojoConfig of these fields.

    Raises:
        Refusal: they make no valid configuration.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        return load_class("configuration_bmojo.BMojoConfig")(**fields)
    except (StrictDataclassError, ValueError) as error:
        raise Refusal(f"this is no configuration that B'MOJO has: {' '.join(str(error).split())}") from error


def read_config(fields: dict):
    """The BMojoConfig of our own config.json.

    Raises:
        Refusal: it has a field that is not known, or is no valid configuration.
    """
    config_class = load_class("configuration_bmojo.BMojoConfig")
    unknown = sorted(fields.keys() - config_class.__annotations__.keys() - NEUTRAL - {"auto_map"})
    if unknown:
        raise Refusal(
            f"config.json has {unknown[0]} = {fields[unknown[0]]!r}, which this version of B'MOJO does not know."
        )
    own = {name: value for name, value in fields.items() if name in config_class.__annotations__}
    return make_config(config_class._decode_special_floats(own))


def wanted(config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a model of this configuration has in its file."""
    model_class = load_class("modeling_bmojo.BMojoForCausalLM")
    with torch.device("meta"):
        model = model_class(config)
    tied = model_class._tied_weights_keys if config.tie_word_embeddings else {}
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def is_dynamics(name: str) -> bool:
    """Whether a tensor of ours is A_log, D or dt_bias."""
    return name.rpartition(".")[2] in DYNAMICS


def save_config_and_code(config, folder: Path, dtype: torch.dtype) -> None:
    """config.json, and the code that makes the folder load alone."""
    from transformers.dynamic_module_utils import custom_object_save

    model_class = load_class("modeling_bmojo.BMojoForCausalLM")
    code = sys.modules[model_class.__module__]
    config.architectures = [model_class.__name__]
    config.auto_map = dict(code.AUTO_MAP)
    config.dtype = dtype
    config.save_pretrained(folder)
    custom_object_save(model_class, folder)
    config.name_or_path = str(ROOT)  # where the kernels are
    code.copy_kernels(config, folder)
