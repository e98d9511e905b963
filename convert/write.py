"""Writing: tensors into safetensors shards as they are read, and a folder that appears complete or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .core import Refusal
from .ours import ROOT
from .read import DTYPES
from .tensors import Stretch


CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass
class Target:
    """A tensor to be written under `name`, as `dtype`."""

    name: str
    tensor: Stretch
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.tensor.numel * self.dtype.itemsize


def split(targets: list[Target], limit: int) -> list[list[Target]]:
    """Targets in shards of at most `limit` bytes, in their order; one that is larger gets a shard of its own."""
    shards, size = [[]], 0
    for target in targets:
        if shards[-1] and size + target.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(target)
        size += target.bytes
    return shards


def write_weights(folder: Path, targets: list[Target], limit: int, progress: bool = True) -> None:
    """Write model.safetensors, or shards of at most `limit` bytes and their index, reading every tensor once.

    Raises:
        Refusal: a value is not finite.
        OSError: the disk is full, for instance.
    """
    shards = split(targets, limit)
    total = sum(target.bytes for target in targets)
    weight_map = {}
    with tqdm(total=total, unit="B", unit_scale=True, disable=not progress, desc="writing") as bar:
        for number, shard in enumerate(shards, 1):
            single = len(shards) == 1
            name = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_file(folder / name, shard, bar)
            weight_map |= {target.name: name for target in shard}
    if len(shards) > 1:
        parameters = sum(target.tensor.numel for target in targets)
        metadata = {"total_parameters": parameters, "total_size": total}
        write_json(folder / "model.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map})


def write_file(path: Path, targets: list[Target], bar: tqdm) -> None:
    """One safetensors file: the header, which only needs shapes and dtypes, then the tensors as they come."""
    targets = sorted(targets, key=lambda target: -target.dtype.itemsize)  # keeps every tensor aligned
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for target in targets:
        header[target.name] = {
            "dtype": CODES[target.dtype],
            "shape": list(target.tensor.shape),
            "data_offsets": [at, at + target.bytes],
        }
        at += target.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=0) as file:
        write_all(file, len(text).to_bytes(8, "little") + text)
        for target in targets:
            written = 0
            for part in target.tensor.read(0, target.tensor.numel):
                cast = part.to(target.dtype)
                if not cast.isfinite().all():
                    say_not_finite(target, part)
                write_all(file, cast.contiguous().view(torch.uint8).numpy())
                written += cast.numel() * cast.itemsize
                bar.update(cast.numel() * cast.itemsize)
            if written != target.bytes:
                raise RuntimeError(f"{target.name} has {target.bytes} bytes, {written} were written.")
        os.fsync(file.fileno())  # a disk that is full may say so only now


def write_all(file, data) -> None:
    """All of the bytes, where one call may take only some of them."""
    left = memoryview(data).cast("B")
    while left:
        left = left[file.write(left) :]


def say_not_finite(target: Target, part: torch.Tensor):
    if part.isfinite().all():
        raise Refusal(
            f"{target.name} holds {part.abs().max().item():g}, too large for {target.dtype}: choose another --dtype."
        )
    raise Refusal(f"{target.name} holds values that are not finite (inf or nan): the checkpoint is damaged.")


def write_json(path: Path, fields: dict) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def appearing(destination: Path, force: bool) -> Iterator[Path]:
    """A folder to write to, beside the destination, that takes its place once the block has ended well.

    Whatever ends the block otherwise leaves the destination as it was and nothing beside it.

    Raises:
        Refusal: the destination exists, and `force` is not given or it is no model folder.
    """
    destination = destination.resolve()
    check_destination(destination, force)
    made = make_parents(destination.parent)
    unfinished = None
    try:
        unfinished = Path(tempfile.mkdtemp(prefix=f".{destination.name}.unfinished-", dir=destination.parent))
        mask = os.umask(0)
        os.umask(mask)
        unfinished.chmod(0o777 & ~mask)  # mkdtemp's folders are for their owner alone
        yield unfinished
        replace(unfinished, destination, force)
    except BaseException:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
        for folder in made:
            folder.rmdir()
        raise


def check_destination(destination: Path, force: bool) -> None:
    if not destination.exists():
        return
    if not force:
        raise Refusal(f"{destination} exists: choose another destination, or replace it with --force.")
    if (destination / ".git").exists() or destination in (ROOT, *ROOT.parents, Path.cwd(), *Path.cwd().parents):
        raise Refusal(
            f"{destination} is a checkout, or holds this program or the working directory: --force does not replace it."
        )
    if not destination.is_dir() or (any(destination.iterdir()) and not (destination / "config.json").is_file()):
        raise Refusal(f"{destination} is no model folder (it has no config.json): --force does not replace it.")


def make_parents(folder: Path) -> list[Path]:
    """Make a folder; returns what had to be made for it, the innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def replace(finished: Path, destination: Path, force: bool) -> None:
    """Give the folder its name. What has that name, with force, is removed only once that has worked."""
    if not destination.exists():
        finished.rename(destination)
        return
    check_destination(destination, force)  # it may have come since
    aside = Path(tempfile.mkdtemp(prefix=f".{destination.name}.replaced-", dir=destination.parent))
    old = aside / destination.name
    try:
        destination.rename(old)
        finished.rename(destination)
    except BaseException:
        if old.exists() and not destination.exists():
            old.rename(destination)
        aside.rmdir()
        raise
    shutil.rmtree(aside)
