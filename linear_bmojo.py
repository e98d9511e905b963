"""The projections: `nn.Linear` to whoever looks at it, with a product of its own for a single token on some processors."""

import torch
import torch.nn.functional as F
from torch import nn

from .kernels_bmojo import project_token


_LARGE = 2**17  # entries of a weight below which choosing among formulations costs more than the best of them saves


class BMojoLinear(nn.Linear):
    """A linear layer, which for one token without gradients takes the formulation that reads its weight fastest."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if x.numel() != self.in_features or weight.numel() < _LARGE or torch.is_grad_enabled():
            return F.linear(x, weight, self.bias)
        return project_token(x, weight, self.bias)
