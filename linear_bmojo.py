"""How the layers apply their projections: modules of the class `nn.Linear` itself, with a product of its own for a single token on some processors."""

import torch
from torch import nn

from .cpu_bmojo import ROW_PRODUCTS, linear_of_row


def project(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`layer(x)`; for one token (or two rows of one) without gradients, by what reads the weight fastest on this processor.

    Projections are no subclass of `nn.Linear`, for some quantizers replace that class alone and leave others as they are
    without a word (transformers 5.24: bitsandbytes, fine-grained FP8, GGUF). A layer that is not a bare `nn.Linear` any
    more (quantized, LoRA, with hooks) is called like any module.
    """
    if x.dtype not in ROW_PRODUCTS or torch.is_grad_enabled():
        return layer(x)
    most, longest, least = ROW_PRODUCTS[x.dtype]
    size = x.shape[-1]
    if size <= longest and 0 < x.numel() <= most * size and _is_bare(layer) and layer.weight.numel() > least:
        return linear_of_row(x, layer.weight, layer.bias)
    return layer(x)


def _is_bare(layer) -> bool:
    """Whether calling the layer is no more than F.linear: a compiler's trace is given the call in any case."""
    if type(layer) is not nn.Linear or torch.compiler.is_compiling():
        return False
    hooks = nn.modules.module
    return not (
        "forward" in layer.__dict__
        or layer._forward_pre_hooks
        or layer._forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_forward_hooks
    )
