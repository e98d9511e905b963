"""Reading checkpoints: what tensors a folder holds, and their elements in stretches. Nothing here runs code of a checkpoint."""

import json
import os
import pickle
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from .core import Refusal
from .tensors import CHUNK, Stretch


WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that is there counts; or NAME.index.json, of shards
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
OTHER_SIZES = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}  # in bytes
LONGEST_HEADER = 100_000_000  # bytes, as the safetensors library has it
MAPPED = 1 << 25  # bytes of a pickle that are read before it is mapped anew
SAFE_TORCH = (2, 6)  # below, weights_only=True can run code: CVE-2025-32434


def read_json(path: Path) -> dict:
    """A JSON object from a file.

    Raises:
        Refusal: there is no such file, or something else is in it.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise Refusal(f"{path} is missing.") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise Refusal(f"{path} is no valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise Refusal(f"{path} holds a {type(found).__name__}, not a JSON object.")
    return found


@dataclass
class InFile(Stretch):
    """A tensor in a safetensors file, from byte `offset` on; dtype None for what is no weight."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype | None

    def read(self, begin, end):
        size = self.dtype.itemsize
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset + begin * size)
            for start in range(begin, end, CHUNK):
                count = min(CHUNK, end - start)
                buffer = bytearray(count * size)
                left = memoryview(buffer)
                while left and (got := file.readinto(left)):
                    left = left[got:]
                if left:
                    raise Refusal(f"{self.path} ended while it was read.")
                yield torch.frombuffer(buffer, dtype=self.dtype)


@dataclass
class InPickle(Stretch):
    """A tensor in a pytorch_model.bin, which stays in its file (memory-mapped) until it is read."""

    files: "PickledFiles"
    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None

    def read(self, begin, end):
        tensor = self.files.load(self.path)[self.name]
        if not tensor.is_contiguous():
            yield from tensor.reshape(-1)[begin:end].split(CHUNK)
            return
        size = tensor.itemsize
        for start in range(begin, end, CHUNK):
            tensor = self.files.load(self.path)[self.name]
            yield tensor.view(-1)[start : min(start + CHUNK, end)]
            self.files.count(CHUNK * size)


class PickledFiles:
    """Loads .bin files safely, one at a time, and anew now and then: pages of a mapped file otherwise stay in memory."""

    def __init__(self):
        self._path, self._tensors, self._read = None, {}, 0

    def count(self, size: int) -> None:
        """So many bytes were read."""
        self._read += size
        if self._read > MAPPED:
            self._path, self._tensors, self._read = None, {}, 0

    def load(self, path: Path) -> dict[str, torch.Tensor]:
        """Name and tensor of everything in the file.

        Raises:
            Refusal: torch is too old to do this safely, the file is no plain dictionary of tensors, or it is damaged.
        """
        if path == self._path:
            return self._tensors
        version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
        if version < SAFE_TORCH:
            raise Refusal(
                f"{path} is a pickle, and torch {torch.__version__} can be made to run code by one even with "
                "weights_only=True: install torch 2.6 or newer, or convert the file to safetensors elsewhere."
            )
        self._path, self._tensors = None, {}
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            reason = next((line.strip() for line in str(error).splitlines() if "nsupported" in line), str(error))
            raise Refusal(
                f"{path} was refused: it asks for more than tensors when it is unpickled ({reason}). Such a file can run "
                "any program; it is not loaded in another way. Get the weights as safetensors."
            ) from error
        except Exception as error:  # a damaged pickle can make torch raise anything
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise Refusal(f"{path} cannot be read, it is damaged or older than torch 1.6: {reason}") from error
        if not isinstance(found, dict):
            raise Refusal(f"{path} holds a {type(found).__name__}, not a dictionary of tensors.")
        for name, tensor in found.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise Refusal(f"{path}: entry {name!r} is a {type(tensor).__name__}, not a tensor by name.")
            if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
                raise Refusal(f"{path}: {name} is no plain tensor but {tensor.layout}, {tensor.dtype}.")
        self._path, self._tensors = path, found
        return found


def read_header(path: Path) -> dict[str, InFile]:
    """What a safetensors file holds.

    Raises:
        Refusal: the file is truncated, too long, or its header contradicts itself.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LONGEST_HEADER):
                raise Refusal(f"{path} is truncated or no safetensors file: {size} bytes, header of {length}.")
            header = json.loads(file.read(length).decode("utf-8"))
    except FileNotFoundError as error:
        raise Refusal(f"{path} is missing.") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise Refusal(f"{path} is no safetensors file: its header is no JSON ({error}).") from error
    found, spans = {}, []
    try:
        header.pop("__metadata__", None)
        for name, entry in header.items():
            code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            numbers = [*shape, begin, end]
            if not all(type(number) is int and number >= 0 for number in numbers):
                raise ValueError(f"{name} has shape {shape}, offsets {begin}, {end}")
            width = DTYPES[code].itemsize if code in DTYPES else OTHER_SIZES.get(code)
            if width is not None and prod(shape) * width != end - begin:
                raise ValueError(f"{name}, {code} {shape}, has {end - begin} bytes")
            found[name] = InFile(path, 8 + length + begin, shape, DTYPES.get(code))
            spans.append((begin, end))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Refusal(f"{path} is no safetensors file: its header is malformed ({error}).") from error
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise Refusal(f"{path} is damaged: its tensors overlap or leave holes at byte {at} of the data.")
        at = end
    if size != 8 + length + at:
        what = "is truncated" if size < 8 + length + at else "is longer than its header says"
        raise Refusal(f"{path} {what}: {8 + length + at} bytes are announced, {size} are there.")
    return found


def shards(index: Path) -> dict[str, str]:
    """An index's map: name of a tensor to that of the file beside it that holds it.

    Raises:
        Refusal: the index is malformed or points elsewhere.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise Refusal(f"{index} has no weight_map.")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith((".safetensors", ".bin")):
            raise Refusal(f"{index} names {file!r}, which is no weight file beside it.")
    return weight_map


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The files of a folder that hold its weights, safetensors before pickles, and the index's map from name to file.

    Raises:
        Refusal: there are none, or the index is malformed or names files that are missing.
    """
    for name in WEIGHTS:
        path, index = folder / name, folder / f"{name}.index.json"
        if path.is_file():
            return [path], {}
        if index.is_file():
            weight_map = shards(index)
            missing = sorted({file for file in weight_map.values() if not (folder / file).is_file()})
            if missing:
                raise Refusal(f"{index} names shards that are missing: {', '.join(missing)}. Download them again.")
            return [folder / file for file in sorted(set(weight_map.values()))], weight_map
    raise Refusal(f"{folder} holds no weights: neither {' nor '.join(WEIGHTS)}, nor an index of shards of one.")


def read_checkpoint(folder: Path) -> dict[str, Stretch]:
    """Every tensor of a folder by name.

    Raises:
        Refusal: as `weight_files`, `read_header` and `PickledFiles.load`; or index and shards disagree.
    """
    files, weight_map = weight_files(folder)
    pickles, found = PickledFiles(), {}
    for path in files:
        if path.suffix == ".safetensors":
            inside = read_header(path)
        else:
            inside = {}
            for name, tensor in pickles.load(path).items():
                dtype = tensor.dtype if tensor.dtype in DTYPES.values() else None
                inside[name] = InPickle(pickles, path, name, tuple(tensor.shape), dtype)
        for name, tensor in inside.items():
            if name in found and weight_map.get(name) != path.name:
                if name in weight_map:
                    continue
                raise Refusal(
                    f"{name} is in {path.name} and in another shard, and the index does not say which counts."
                )
            found[name] = tensor
    absent = sorted(name for name in weight_map if name not in found)
    if absent:
        raise Refusal(f"The index of {folder} names tensors that no shard holds: {listed(absent)}.")
    return found


def listed(names, most: int = 8) -> str:
    """Names in a row, the first few of many."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
