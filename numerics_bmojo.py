"""In which precision things are computed."""

from contextlib import nullcontext

import torch


def at_least_float32(*tensors: torch.Tensor) -> torch.dtype:
    """The dtype in which states, errors and softmax are computed: float32, or float64 where an input is."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def no_autocast(x: torch.Tensor):
    """A context in which autocast does not turn float32 matrix products into bfloat16."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
