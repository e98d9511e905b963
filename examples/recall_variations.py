"""Variations of Innovation Selection that the package does not offer, for the ablation: each changes a model in place.

They replace methods of the B'MOJO layers of one model. What lost against the default stays here, measured, and out of the
package; RESULTS.md has the table.
"""

from collections.abc import Callable
from types import MethodType

import torch
import torch.nn.functional as F
from torch import nn


def bmojo_mixers(model: nn.Module) -> list[nn.Module]:
    """The B'MOJO layers of the model."""
    return [module for module in model.modules() if type(module).__name__ == "BMojoMixer"]


def running_average(y: torch.Tensor, kernel: int) -> torch.Tensor:
    """Mean of the last `kernel` outputs before each, of those that exist, (rows, seq_len, size); 0 for the first."""
    total = F.pad(y.cumsum(1), (0, 0, 1, 0))
    places = torch.arange(y.shape[1])
    first = (places - kernel).clamp(min=0)
    return (total[:, places] - total[:, first]) / (places - first).clamp(min=1)[:, None]


def score_with(model: nn.Module, score: Callable):
    """Let `score(mixer, u, y)` give every token's innovation, (rows, seq_len), of whole sequences without padding."""

    def innovation(mixer, y, call, state):
        if call.lengths is not None or (call.past is not None and call.past.any()):
            raise NotImplementedError("Variations run on whole sequences without padding.")
        with torch.no_grad():
            return {"innovation": score(mixer, mixer.read, y).float()}

    for mixer in bmojo_mixers(model):  # those without eidetic memory never ask
        mixer.register_forward_pre_hook(lambda module, inputs: setattr(module, "read", inputs[0]))
        mixer.innovation = MethodType(innovation, mixer)


def cosine(model: nn.Module):
    """1 - cos(y, prediction) instead of the squared distance."""

    def score(mixer, u, y):
        return 1 - F.cosine_similarity(y, running_average(y, mixer.config.innovation_kernel), dim=-1)

    score_with(model, score)


def relative(model: nn.Module):
    """The squared distance over the squared length of the output."""

    def score(mixer, u, y):
        error = (y - running_average(y, mixer.config.innovation_kernel)).pow(2).sum(-1)
        return error / y.pow(2).sum(-1).clamp(min=1e-12)

    score_with(model, score)


def state_prediction(model: nn.Module):
    """Predict one step from the SSM's state, as if the token had not been there; under its gate, before the gated norm."""

    def score(mixer, u, y):
        ssm = mixer.fading
        z, xbc, dt = ssm.in_proj(u).split_with_sizes(ssm.sizes, -1)
        padded = F.pad(xbc, (0, 0, ssm.taps - 1, 0))
        xbc = F.silu(ssm.conv1d(padded.transpose(1, 2)).transpose(1, 2))
        parts = zip(xbc.split_with_sizes(ssm.widths, -1), ssm.vectors, strict=True)
        x, B, C = (part.unflatten(-1, vectors) for part, vectors in parts)
        dt, _, D = ssm.dynamics(dt)
        both = (B * C).sum(-1)  # (rows, seq_len, groups)
        both = both.repeat_interleave(x.shape[-2] // both.shape[-1], -1)
        from_token = (both * dt + D)[..., None] * x
        return ((F.silu(z) * from_token.flatten(-2)) @ ssm.out_proj.weight.T).pow(2).sum(-1)

    score_with(model, score)


def add_fading_token(model: nn.Module):
    """Add the current fading token y_t to the layer's output."""
    for mixer in bmojo_mixers(model):
        mixer.fading.register_forward_hook(lambda module, inputs, output: setattr(module, "said", output[0]))
        mixer.register_forward_hook(lambda module, inputs, output: (output[0] + module.fading.said, *output[1:]))


VARIATIONS = {
    "cosine": cosine,
    "relative": relative,
    "state-prediction": state_prediction,
    "add-fading-token": add_fading_token,
}
