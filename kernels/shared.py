"""What the kernels share: names of ops, the device of a launch, and what a device has room for."""

import functools
import re
from contextlib import nullcontext

import torch


SMALL_MEMORY = 99 * 1024  # bytes of shared memory a program may have on consumer GPUs since sm_86; more on sm_80, 90, 100


def namespace(module: str) -> str:
    """The namespace of a module's ops: several copies of this folder may be loaded into one process, of other versions too."""
    return re.sub(r"\W", "_", module)


def on_device_of(tensor):
    """The context of a launch: Triton takes the current device, which need not be that of the tensors."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@functools.cache
def architecture(device: torch.device) -> str:
    """What the settings of a kernel depend on: "wide" for sm_80 and above, "narrow" for less shared memory (T4, MI300)."""
    if device.type != "cuda":  # the interpreter has room for everything
        return "wide"
    room = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
    return "narrow" if torch.version.hip is not None or room < SMALL_MEMORY else "wide"
