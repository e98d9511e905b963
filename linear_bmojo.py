"""The projections: `nn.Linear` to whoever looks at it, with a product of its own for a single token on some processors."""

import torch
import torch.nn.functional as F
from torch import nn

from .cpu_bmojo import SLOW_PRODUCTS, linear_of_row


# weights for which choosing a formulation pays: rows no longer than, and more entries than
_ROW, _ENTRIES = 768, 2**17


class BMojoLinear(nn.Linear):
    """A linear layer, which for one token without gradients takes the formulation that reads its weight fastest."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if SLOW_PRODUCTS and not torch.is_grad_enabled():
            size = self.in_features
            if x.numel() == size <= _ROW and size * self.out_features > _ENTRIES:
                return linear_of_row(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)
