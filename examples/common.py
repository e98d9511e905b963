"""What the example programs share: finding and reading texts, checking options, loading a model, saving a tokenizer."""

import argparse
import gzip
import json
import zlib
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput


ROOT = Path(__file__).resolve().parent.parent  # this repository, itself a model folder


def find_text_files(folder: str | Path) -> list[Path]:
    """Return the .txt and .txt.gz files under ``folder``, sorted by path; not what macOS puts beside them."""
    folder = Path(folder)
    if not folder.is_dir():
        raise SystemExit(f"There is no folder {folder}: name one that holds .txt or .txt.gz files.")
    found = (path for path in folder.rglob("*") if path.name.endswith((".txt", ".txt.gz")))
    files = sorted(path for path in found if path.is_file() and not path.name.startswith("._"))
    if not files:
        raise SystemExit(f"The folder {folder} holds no .txt or .txt.gz file.")
    return files


def read_text(path: Path) -> str:
    """Read one file as UTF-8, its line ends as they are."""
    opener = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise SystemExit(
            f"{path} is no UTF-8 text ({error.reason} at byte {error.start}): convert it first."
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise SystemExit(f"{path} cannot be read: {error}") from error


def check_numbers(parser: argparse.ArgumentParser, options: argparse.Namespace, **least: float):
    """End with an error where an option is below the least number that is named for it; None is no number."""
    for name, number in least.items():
        value = getattr(options, name)
        if value is not None and not value >= number:
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be at least {number}.")


def check_fields(config_class, fields: dict, where: str):
    """End with an error where a field is none of a config's."""
    known = {*config_class.__annotations__, *vars(config_class()), *config_class().to_dict()}
    if unknown := sorted(fields.keys() - known - {"auto_map", "_name_or_path", "torch_dtype"}):
        raise SystemExit(f"{where} has the field {unknown[0]!r}, which a {config_class.__name__} does not have.")


def write_json(path: Path, content):
    """Write a JSON file so that it is whole or absent; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def load_model(name: str, dtype: str = "float32") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer from a folder or the Hub, onto the GPU where there is one."""
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise SystemExit(f"There is no folder {name}: name a model's folder, or its id on the Hub.")
    if Path(name).is_dir() and not (Path(name) / "config.json").exists():
        raise SystemExit(f"The folder {name} holds no config.json, so no model: name another with --model.")
    try:
        model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, dtype=getattr(torch, dtype))
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)  # it reads the config too
    except (OSError, ValueError) as error:
        raise SystemExit(f"{name} cannot be loaded as a model with its tokenizer: {error}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


CHOICES = {  # of what a trained model's memory holds: fields of its config
    "innovation": {},
    **{choice: {"innovation_predictor": choice} for choice in ("random", "recent", "oldest")},
    "none": {"eidetic_size": 0},
}
OTHER_CHOICES = (
    "ssm_output, layer_input (the signal whose innovation chooses), half-life=TOKENS, half-life=none, size=PLACES, "
    "layers=2,3 (those with a memory), layers=all; or several with + between them"
)


def memory_fields(choice: str) -> dict:
    """Fields of a config that say what fills the memory, for a name of `CHOICES` or of `OTHER_CHOICES`.

    "layers" stands for a field that depends on the model: numbers of the layers that have a memory, or None for all.
    """
    first, _, others = choice.partition("+")
    if others:
        return memory_fields(first) | memory_fields(others)
    if choice in CHOICES:
        return CHOICES[choice]
    if choice in ("ssm_output", "layer_input"):
        return {"innovation_signal": choice}
    name, _, value = choice.partition("=")
    if name == "half-life" and (value == "none" or value.isdecimal()):
        return {"innovation_half_life": None if value == "none" else int(value)}
    if name == "size" and value.isdecimal():
        return {"eidetic_size": int(value)}
    if name == "layers" and (value == "all" or all(number.isdecimal() for number in value.split(","))):
        return {"layers": None if value == "all" else {int(number) for number in value.split(",")}}
    raise argparse.ArgumentTypeError(f"{choice!r} is none of {', '.join(CHOICES)}, {OTHER_CHOICES}")


def memory_choice(choice: str) -> str:
    """The choice, for argparse, which says what is allowed where it is no choice."""
    memory_fields(choice)
    return choice


def add_choices(parser: argparse.ArgumentParser, what: str):
    """The option --choices: what fills the memory, one row of a table each."""
    known = f"{what} (default: {' '.join(CHOICES)}); also {OTHER_CHOICES}"
    parser.add_argument("--choices", nargs="+", type=memory_choice, default=list(CHOICES), help=known)


def can_choose(model: PreTrainedModel, choices: list[str]) -> bool:
    """Whether other choices make other memories: some layer has one, or a choice gives it one."""
    kinds = getattr(model.config, "layers_block_type", ())
    given = "bmojo_f" in kinds and any("layers=" in choice for choice in choices)
    return bool(getattr(model.config, "eidetic_size", 0)) and ("bmojo" in kinds or given)


def change_memory(model: PreTrainedModel, choice: str) -> PreTrainedModel:
    """A copy of the model, ready to read, its memory filled by another choice (`memory_fields`); the weights are the same."""
    fields = dict(memory_fields(choice))
    if "layers" in fields:
        numbers, kinds = fields.pop("layers"), list(model.config.layers_block_type)
        if numbers and max(numbers) >= len(kinds):
            raise SystemExit(
                f"The choice {choice!r} names layer {max(numbers)}; the layers are 0 to {len(kinds) - 1}."
            )
        without = sorted(number for number in numbers or () if kinds[number] not in ("bmojo", "bmojo_f"))
        if without:
            raise SystemExit(
                f"The choice {choice!r} names layer {without[0]}, which is {kinds[without[0]]!r} and can't have a memory."
            )
        for number, kind in enumerate(kinds):
            if kind in ("bmojo", "bmojo_f"):
                kinds[number] = "bmojo" if numbers is None or number in numbers else "bmojo_f"
        fields["layers_block_type"] = kinds
    config = type(model.config).from_dict(model.config.to_dict() | fields)
    changed = type(model)(config)
    known = changed.state_dict().keys()
    changed.load_state_dict({key: weight for key, weight in model.state_dict().items() if key in known})
    return changed.to(model.device).eval()


def cache_argument(outputs: ModelOutput) -> dict:
    """Return the cache in a model's outputs under the name of the argument that takes it: `cache` since transformers 5.24."""
    (name,) = {"cache", "cache_params", "past_key_values"} & set(outputs)
    return {name: outputs[name]}


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path):
    """Save a tokenizer under the class name that every version of transformers knows; version 5 has its own."""
    tokenizer.save_pretrained(folder)
    path = Path(folder) / "tokenizer_config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name in ("is_local", "local_files_only"):  # how it was loaded, which is no property of it
        fields.pop(name, None)
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
