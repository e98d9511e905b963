"""What the kernels share: names of ops, the device of a launch, and what a device has room for."""

import functools
import re
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl


_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """Adds a @ b to total, which may be None, in float32."""
    if _INTERPRETED:  # its product takes the bits of bfloat16 for integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


class Launch(NamedTuple):
    """One way to compile a kernel, for `compile_report.py`.

    Attributes:
        name: of the case, with what it depends on.
        kernel: the function under `triton.jit`.
        types: of the arguments that are neither a pointer to the dtype of the inputs ("..._ptr") nor int32; None for one
            that is None.
        settings: values of the constants, num_warps, num_stages and enable_fp_fusion.
        default: it has the sizes of a default configuration; the first launch of a kernel counts where none has.
    """

    name: str
    kernel: Any
    types: dict[str, str | None]
    settings: dict[str, Any]
    default: bool = False


def namespace(module: str) -> str:
    """The namespace of a module's ops: several copies of this folder may be loaded into one process, of other versions too."""
    return re.sub(r"\W", "_", module)


def on_device_of(tensor):
    """The context of a launch: Triton takes the current device, which need not be that of the tensors."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@functools.cache
def architecture(device: torch.device) -> str:
    """What the settings of kernels are chosen by: "ampere" (sm_80 and above), "turing" (below), or "amd"."""
    if device.type != "cuda":  # the interpreter
        return "ampere"
    if torch.version.hip is not None:
        return "amd"
    return "ampere" if torch.cuda.get_device_capability(device)[0] >= 8 else "turing"
