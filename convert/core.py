"""What every format says about itself: how it is recognised, which config it means, and where each tensor goes.

A format never touches tensors. It describes them as `Piece`s, row ranges of source tensors, whose concatenation is a
target tensor; the engine streams them in either direction, so that a conversion and its inverse move the same bits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


class Refusal(Exception):
    """A source that cannot be converted exactly. The message says what is in the way and what to do."""


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of the source tensor `name` (all where stop is None), seen as `shape` where one is given."""

    name: str
    start: int = 0
    stop: int | None = None
    shape: tuple[int, ...] | None = None


def assemble(pieces: list[Piece], read: Callable[[Piece], torch.Tensor]) -> torch.Tensor:
    """Concatenate pieces along the first axis; `read` returns the rows that a piece names, (stop - start, ...)."""
    parts = [read(piece) for piece in pieces]
    parts = [
        part if piece.shape is None else part.reshape(piece.shape) for piece, part in zip(pieces, parts, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class Format:
    """One checkpoint format.

    Attributes:
        name: as users write it after --export and read it in messages, "llama" for instance.
        model_types: values of config.json's "model_type" that mean this format.
    """

    name: str
    model_types: tuple[str, ...] = ()

    def recognises(self, config: dict, folder: Path) -> bool:
        """Whether the source folder with this config.json holds this format."""
        return config.get("model_type") in self.model_types

    def to_bmojo(self, config: dict) -> dict:
        """Fields of BMojoConfig for their config.json, every one explicit.

        Raises:
            Refusal: an option has no exact counterpart, is unknown, or is of a wrong type; names the field and its value.
        """
        raise NotImplementedError

    def from_bmojo(self, config) -> dict:
        """Their config.json for a BMojoConfig.

        Raises:
            Refusal: the model is no special case of this format; names the field that differs.
        """
        raise NotImplementedError

    def tensors(self, config: dict) -> dict[str, list[Piece]]:
        """For their config.json: every tensor of ours and the pieces of theirs that make it, along the first axis.

        The union of all pieces covers every source tensor exactly once, but for `duplicates` and `ignored`.
        """
        raise NotImplementedError

    def shapes(self, config: dict) -> dict[str, tuple[int, ...]]:
        """For their config.json: name and shape of every tensor of theirs that `tensors` uses (what `from_bmojo` writes)."""
        raise NotImplementedError

    def duplicates(self, config: dict) -> dict[str, str]:
        """Source tensors that may be present and must then equal another one (tied weights): name to the other's name."""
        return {}

    def ignored(self, config: dict) -> dict[str, str]:
        """Source tensors that may be present and carry nothing: name (or regular expression) to the reason."""
        return {}

    def original(self, config: dict, folder: Path):
        """The original implementation with a source's weights in float32, for `--verify`: a model that gives `.logits`.

        Raises:
            Refusal: there is none to compare with; says why.
        """
        from transformers import AutoModelForCausalLM
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        if config.get("model_type") not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise Refusal(f"transformers has no implementation of {self.name} to compare with.")
        return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, trust_remote_code=False)


class Renaming(Format):
    """A format of transformers whose tensors are ours under other names.

    Attributes:
        embedding: the name of the embedding, which `lm_head.weight` repeats where they are tied.
    """

    embedding = "model.embed_tokens.weight"

    def read(self, config: dict):
        """Their config.json as their own class reads it. Raises as `to_bmojo`."""
        raise NotImplementedError

    def names(self, found) -> dict[str, tuple[str, tuple[int, ...]]]:
        """For what `read` returns: our name of every tensor to theirs and its shape."""
        raise NotImplementedError

    def tensors(self, config):
        return {ours: [Piece(name)] for ours, (name, _) in self.names(self.read(config)).items()}

    def shapes(self, config):
        return dict(self.names(self.read(config)).values())

    def duplicates(self, config):
        return {"lm_head.weight": self.embedding} if self.read(config).tie_word_embeddings else {}
