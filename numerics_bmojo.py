"""In which precision things are computed."""

from contextlib import nullcontext

import torch


def at_least_float32(*tensors: torch.Tensor) -> torch.dtype:
    """The dtype in which states, errors and softmax are computed: float32, or float64 where an input is."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor.dtype is not dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def widen(x: torch.Tensor) -> torch.Tensor:
    """The tensor in float32 or wider."""
    return x if x.dtype is torch.float32 or x.dtype is torch.float64 else x.float()


def as_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in that dtype; itself, without the price of asking torch, where it is."""
    return x if x.dtype is dtype else x.to(dtype)


def no_autocast(x: torch.Tensor):
    """A context in which autocast does not turn float32 matrix products into bfloat16."""
    device = x.device.type
    available = device == "cpu" or torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available and torch.is_autocast_enabled(device) else nullcontext()
