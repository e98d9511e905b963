"""The face of `kernels/`: finds the folder of Triton kernels wherever the model was loaded from, and chooses by device.

transformers carries the Python files beside the model, but no folder. Python calls every module with a `__path__` a
package, so this one points its own at the folder and `kernels/ssd_scan.py` becomes `<this module>.ssd_scan`, under a name
of ours in a checkout, a local model folder and the Hub's cache alike. `kernels/` itself has no `__init__.py`: it would
shadow Hugging Face's `kernels` package for every Python that starts in the repository's root.

Environment variable `BMOJO_KERNELS`: "auto" (default) runs a kernel where one ships that GPUs have run before, and the tensors are on one; "torch"
runs none; "definition" runs the definitions of `ops_bmojo` and `delta_ops_bmojo` only, not their other forms either, but for those of one
row in `cpu_bmojo`, which are not chosen here; "triton" requires the kernel
of every op that has one at the end of this file, on the CPU too under `TRITON_INTERPRET=1`.
"""

import functools
import os
import re
import shutil
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers.utils import logging

from .cpu_bmojo import (
    blocked_causal_conv,
    blocked_memory_attention,
    blocked_prediction_error,
    blocked_rms_norm,
    blocked_rotate,
    blocked_selective_scan,
    blocked_silu_gate,
    blocked_ssd_scan,
    is_plain,
)
from .delta_ops_bmojo import chunked_delta_scan, chunked_kalman_scan, delta_scan, kalman_scan
from .ops_bmojo import (
    cache_attention,
    causal_conv,
    memory_attention,
    prediction_error,
    rms_norm,
    rotate,
    running_selection,
    selective_scan,
    selective_step,
    silu_gate,
    ssd_scan,
    ssd_step,
    update_memory,
)


logger = logging.get_logger("transformers.bmojo")  # below "transformers": TRANSFORMERS_VERBOSITY=info shows its lines

_NO_TRITON = "triton 3.4 or newer is not installed (`pip install -U triton`)"
MODES = ("auto", "torch", "triton", "definition")
# files of kernels/ that no GPU has run yet: only BMOJO_KERNELS=triton does
UNPROVEN = {"attention", "conv", "innovation", "selective", "ssd", "step"}
_HERE = Path(__file__).resolve().parent
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_loaded: dict[str, Callable] = {}  # the kernels in use, by name
_told: set[str] = set()  # devices for which it was said why no kernel runs
__path__ = [str(_HERE / "kernels")] if (_HERE / "kernels").is_dir() else []  # next to this file: a checkout


def attach(config) -> None:
    """Point `__path__` at the kernels folder of the model that `config` was loaded with.

    Fetches from the Hub at once, so that a cache filled on a machine without GPU is complete; imports nothing. Without a
    folder the definitions run. Says so only where there may be one that cannot be reached.
    """
    if any(map(os.path.isdir, __path__)):
        return
    code, elsewhere, _ = (getattr(config, "auto_map", None) or {}).get("AutoConfig", "").partition("--")
    source = code if elsewhere else config.name_or_path
    if not source:  # a model made from a config: nothing to go by
        return
    try:
        root = source if os.path.isdir(source) else _fetch(source)
    except (OSError, ValueError) as error:  # offline, no access, or a name that is neither a folder nor a Hub id
        why = type(error).__name__  # not its text: a request's id in it would make every warning a new one
        logger.warning_once(f"kernels/ of {source} is out of reach ({why}); B'MOJO runs in plain torch.")
        return
    folder = os.path.abspath(os.path.join(root, "kernels"))
    if os.path.isdir(folder):
        __path__[:] = [folder]


@functools.cache
def _fetch(repository: str) -> str:
    """The local copy of a Hub repository, holding at least its kernels at the commit of the code that runs.

    Raises:
        ValueError: the code is of no commit, so it came from a folder, which is gone: a repository of that name is another's.
    """
    if not re.fullmatch("[0-9a-f]{40}", _HERE.name):  # transformers names the folder of code from the Hub so
        raise ValueError(f"{repository} is no folder any more.")
    return snapshot_download(repository, revision=_HERE.name, allow_patterns="kernels/*.py")


def load(name: str, file: str | None = None) -> Callable | None:
    """The function `name` of `kernels/<file>.py`; None where no such file ships. What its import raises is a bug."""
    file = file or name
    if name not in _loaded and _ships(file):
        _loaded[name] = getattr(import_module(f"{__name__}.{file}"), name)
    return _loaded.get(name)


def _ships(file: str) -> bool:
    return any(os.path.isfile(os.path.join(folder, f"{file}.py")) for folder in __path__)


def copy_kernels(config, save_directory: str | os.PathLike) -> None:
    """Copy the kernels into a folder that `save_pretrained` writes, so that it is complete without its source."""
    attach(config)  # once more where the first attempt failed: the network may be back
    target = Path(save_directory) / "kernels"
    for file in [file for folder in __path__ for file in sorted(Path(folder).glob("*.py"))]:
        copy = target / file.name
        if file.name == "__init__.py" or (copy.exists() and copy.samefile(file)):  # saved into the folder loaded from
            continue
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def dispatch(
    definition: Callable,
    cpu: Callable | None = None,
    chunked: Callable | None = None,
    kernel: str | None = None,
    backward: bool = True,
    room: Callable | None = None,
) -> Callable:
    """Run the Triton kernel of this name where one fits the device, else the form for a CPU where that fits, else the definition.

    `kernel` is the file of `kernels/` that holds it; None for an op that torch's own operations are good enough for. One
    without `backward` pass runs where no gradient is asked for, one that does not hold every size only for arguments of
    which `room` is true (but BMOJO_KERNELS=triton, with which the kernel says what it lacks room for).
    Where there is a `chunked` form of the definition, a loop over tokens, it stands for it but under BMOJO_KERNELS=definition.
    """
    name = definition.__name__
    plain = chunked or definition

    @functools.wraps(definition)
    def op(x, /, *args, **kwargs):
        mode = os.environ.get("BMOJO_KERNELS", "auto")
        on_cpu = cpu is not None and x.device.type == "cpu" and is_plain(x)
        if on_cpu and mode == "auto" and (kernel is None or "cpu" in _told):
            return cpu(x, *args, **kwargs)  # the usual case, at the least cost once it was said that no kernel runs
        if mode not in MODES:
            raise ValueError(f"BMOJO_KERNELS is {mode!r}; allowed are {', '.join(map(repr, MODES))}.")
        runs = (
            kernel is not None
            and (backward or not _asks_for_gradient(x, *args, *kwargs.values()))
            and not _is_transformed()
            and (room is None or mode == "triton" or room(x, *args, **kwargs))
        )
        if runs and _use_kernel(name, kernel, x.device.type, x.dtype):
            return _loaded[name](x, *args, **kwargs)
        if on_cpu and mode != "definition":
            return cpu(x, *args, **kwargs)
        return (definition if mode == "definition" else plain)(x, *args, **kwargs)

    op.definition, op.cpu, op.chunked = definition, cpu, chunked  # tests compare them
    return op


def dispatch_step(definition: Callable, kernel: str, room: Callable | None = None) -> Callable:
    """`dispatch` for one token without gradients, which on a CPU takes less than asking how it should be computed.

    Off a GPU, and where a graph is recorded, the definition runs unasked.
    """
    chosen = dispatch(definition, kernel=kernel, room=room)

    @functools.wraps(definition)
    def op(x, /, *args, **kwargs):
        if not (x.is_cuda or _INTERPRETED) or torch.is_grad_enabled():
            return definition(x, *args, **kwargs)
        return chosen(x, *args, **kwargs)

    op.definition = definition
    return op


def _is_transformed() -> bool:
    """Whether torch.func or forward-mode derivatives look through tensors, as they can through a definition alone."""
    return not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    )


def _asks_for_gradient(*args) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in args)


@torch.compiler.assume_constant_result  # torch.compile takes the answer as it is: no import, no log line in a graph
def _use_kernel(name: str, file: str, device: str, dtype: torch.dtype) -> bool:
    """Whether a kernel runs on such tensors, which then is loaded, or the definition; says once which and why."""
    mode = os.environ.get("BMOJO_KERNELS", "auto")
    obstacle = _obstacle(name, file, device, dtype, mode)
    if obstacle is None:
        logger.info_once(f"{name} on {device}: Triton kernel of {__path__[0]}.")
        return load(name, file) is not None
    if mode == "triton":
        raise RuntimeError(f"BMOJO_KERNELS=triton, but {obstacle}; BMOJO_KERNELS=auto falls back to torch.")
    _told.add(device)
    say = logger.warning_once if obstacle is _NO_TRITON else logger.info_once  # that one costs speed needlessly
    say(f"B'MOJO runs in plain torch: {obstacle}.")
    return False


def _obstacle(name: str, file: str, device: str, dtype: torch.dtype, mode: str) -> str | None:
    """Why the kernel of that name cannot run on such tensors, in words for the person who may change it."""
    if mode in ("torch", "definition"):
        return f"BMOJO_KERNELS={mode}"
    interpreted = mode == "triton" and os.environ.get("TRITON_INTERPRET", "0") == "1"
    if device != "cuda" and not interpreted:
        return f"the tensors are on {device} (kernels need a GPU, or BMOJO_KERNELS=triton with TRITON_INTERPRET=1)"
    if name not in _loaded and not _ships(file):
        return (
            f"no kernel {name} ships: there is no {file}.py in {', '.join(__path__) or 'any kernels folder in reach'}"
        )
    if mode == "auto" and file in UNPROVEN:
        return f"the kernel {name} was compiled and interpreted, but has not run on a GPU yet (BMOJO_KERNELS=triton runs it)"
    if dtype is torch.float64:
        return "the tensors are in float64 (kernels compute in float32)"
    return None if _has_triton() else _NO_TRITON


@functools.cache
def _has_triton() -> bool:
    try:
        return find_spec("triton") is not None and find_spec("triton.knobs") is not None  # 3.4 brought knobs
    except (ImportError, ValueError):  # an import hook refuses it, or a stub without a spec stands in for it
        return False


# ----------------------------------------------------------------------------------------------------------------------
# The operations that the model calls, each with its forms
# ----------------------------------------------------------------------------------------------------------------------


def _scan_fits(x, dt, A, *args, **kwargs) -> bool:
    return A.shape[1] <= 64


def _memory_fits(scores, kept_scores, *args, **kwargs) -> bool:
    return kept_scores.shape[1] <= 1024


def _heads_fit(query, *args, **kwargs) -> bool:
    return query.shape[-1] <= 256


ssd_scan = dispatch(ssd_scan, blocked_ssd_scan, kernel="ssd")
selective_scan = dispatch(selective_scan, blocked_selective_scan, kernel="selective", room=_scan_fits)
delta_scan = dispatch(delta_scan, chunked=chunked_delta_scan)
kalman_scan = dispatch(kalman_scan, chunked=chunked_kalman_scan)
causal_conv = dispatch(causal_conv, blocked_causal_conv, kernel="conv")
prediction_error = dispatch(prediction_error, blocked_prediction_error, kernel="innovation", backward=False)
running_selection = dispatch(
    running_selection, cpu=running_selection, kernel="innovation", backward=False, room=_memory_fits
)
memory_attention = dispatch(memory_attention, blocked_memory_attention, kernel="attention", room=_heads_fit)
rms_norm = dispatch(rms_norm, blocked_rms_norm)
silu_gate = dispatch(silu_gate, blocked_silu_gate)
rotate = dispatch(rotate, blocked_rotate)
ssd_step = dispatch_step(ssd_step, kernel="step")
selective_step = dispatch_step(selective_step, kernel="step")
cache_attention = dispatch_step(cache_attention, kernel="step", room=_heads_fit)
update_memory = dispatch_step(update_memory, kernel="step")
