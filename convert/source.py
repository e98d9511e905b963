"""Where a source is: a folder, or files fetched from the Hub; and what comes along besides weights."""

import json
import shutil
from pathlib import Path

from .core import Refusal
from .read import WEIGHTS, read_json, shards


TOKENIZER = (  # file names, * for anything
    "tokenizer*.json",
    "tokenizer.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
ALONG = ("generation_config.json", "LICENSE*", "NOTICE*", *TOKENIZER)
CONFIGURATION = "config.json"
INDICES = tuple(f"{name}.index.json" for name in WEIGHTS)


def locate(source: str, revision: str | None = None, weights: bool = True) -> Path:
    """The folder that holds a source; of a Hub repository only the files that a conversion reads are fetched.

    Raises:
        Refusal: there is no such folder, and no such repository that can be reached.
    """
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            raise Refusal(f"--revision {revision}: {source} is a folder, which has no revisions.")
        return folder
    if folder.exists():
        raise Refusal(f"{source} is a file; name the folder that it is in.")
    return fetch(source, revision, weights)


def fetch(repository: str, revision: str | None, weights: bool) -> Path:
    """Download to the Hub's cache, or find there, what is needed of a repository."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

    def download(*patterns: str) -> Path:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=[*patterns]))

    try:
        folder = download(CONFIGURATION, *ALONG, *(INDICES if weights else ()))
        revision = folder.name  # the commit, whatever the branch does meanwhile
        for single, index in zip(WEIGHTS, INDICES, strict=True) if weights else ():
            folder = download(single)
            if not (folder / single).is_file() and (folder / index).is_file():
                folder = download(*sorted(set(shards(folder / index).values())))
            if (folder / single).is_file() or (folder / index).is_file():
                break
    except HFValidationError as error:
        raise Refusal(f"there is no folder {repository}, and it cannot be a repository of the Hub: {error}") from error
    except RepositoryNotFoundError as error:
        raise Refusal(
            f"there is no folder {repository}, and no repository of this name on the Hub that you may read "
            "(`hf auth login` for private and gated ones)."
        ) from error
    except RevisionNotFoundError as error:
        raise Refusal(f"the Hub's {repository} has no revision {revision}.") from error
    except OSError as error:  # no network, and nothing in the cache
        raise Refusal(f"there is no folder {repository}, and the Hub is out of reach: {first_line(error)}") from error
    except HTTPError as error:
        raise Refusal(f"the download of {repository} broke off, run it again: {first_line(error)}") from error
    return folder


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def copy_along(source: Path, tokenizer: Path | None, destination: Path, model_type: str | None) -> list[str]:
    """Copy generation config, licence and tokenizer, the latter from another folder where one is given.

    Args:
        source: the folder that is converted.
        tokenizer: the folder of the tokenizer; None: the source, where it has one.
        destination: where to.
        model_type: what transformers chooses a tokenizer class by, where its files name none.

    Returns:
        Names of the files.

    Raises:
        Refusal: a tokenizer was asked for, and the folder has none; or it needs code of its own.
    """
    found = dict.fromkeys(files(source, ALONG), source)
    if tokenizer is not None:
        theirs = files(tokenizer, TOKENIZER)
        if not any(path.name.startswith(("tokenizer", "vocab", "spiece")) for path in theirs):
            raise Refusal(f"--tokenizer {tokenizer}: this folder holds no tokenizer.")
        own = set(files(source, TOKENIZER))
        found = {path: source for path in found if path not in own} | dict.fromkeys(theirs, tokenizer)
    for path, root in found.items():
        copy = destination / path.relative_to(root)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    name_tokenizer_class(destination / "tokenizer_config.json", model_type)
    return [path.name for path in found]


def name_tokenizer_class(path: Path, model_type: str | None) -> None:
    """Where a tokenizer_config.json leaves its class to the model's type, which changes, write it down."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    if not path.is_file():
        return
    fields = read_json(path)
    if fields.get("auto_map"):
        raise Refusal(
            f"{path.name} has auto_map, code of its own, which is not copied: name a tokenizer that needs none with --tokenizer."
        )
    if fields.get("tokenizer_class"):
        return
    fields["tokenizer_class"] = TOKENIZER_MAPPING_NAMES.get(model_type) or "PreTrainedTokenizerFast"
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
