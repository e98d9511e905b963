"""The norms of blocks and mixers."""

import torch
import torch.nn.functional as F
from torch import nn

from .cpu_bmojo import rms_norm_of_row
from .kernels_bmojo import rms_norm
from .numerics_bmojo import widen


class BMojoRMSNorm(nn.Module):
    """RMSNorm over the last axis, or over groups of it, with or without weight; statistics in float32 or wider."""

    def __init__(self, size: int, eps: float, n_groups: int = 1, learned: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size)) if learned else None
        self.eps, self.n_groups = eps, n_groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = x.new_ones(x.shape[-1]) if self.weight is None else self.weight
        if self.n_groups == 1 and x.numel() == weight.numel():
            return rms_norm_of_row(x, weight, self.eps)
        form = rms_norm if x.shape[1] > 1 else rms_norm.definition  # choosing would cost a single token as much
        return form(x, weight, self.eps, self.n_groups)


class BMojoLayerNorm(nn.LayerNorm):
    """LayerNorm over the last axis, computed in float32 or wider."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = F.layer_norm(widen(x), self.normalized_shape, widen(self.weight), widen(self.bias), self.eps)
        return normed.to(x.dtype)


def block_norm(config) -> nn.Module:
    """The norm before a mixer, before an MLP, and at the end of the model."""
    return (BMojoRMSNorm if config.rms_norm else BMojoLayerNorm)(config.hidden_size, eps=config.rms_norm_eps)
