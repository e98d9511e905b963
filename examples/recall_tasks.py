"""Synthetic recall tasks: multi-query associative recall (zoology) and the six tasks of MAD, written from their definitions.

Sources: Arora et al., "Zoology: Measuring and improving recall in efficient language models" (arXiv 2312.04927);
Poli et al., "Mechanistic design and scaling of hybrid architectures" (arXiv 2403.17844), whose published defaults and
variations are `MAD_VARIATIONS`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


IGNORED = -100  # a label that counts in no loss and in no accuracy


class Examples(NamedTuple):
    """A batch of a task.

    Attributes:
        ids: tokens, (examples, length) int64.
        labels: what the model must say at each position, (examples, length) int64, already shifted: the label of a
            position is compared with the logits of that position; IGNORED where nothing is asked.
        scored: positions that count for the accuracy, (examples, length) bool. Some tasks train on more than they test.
        evidence: position of the token that holds the answer, (examples, length) int64; -1 where there is none or no one.
    """

    ids: np.ndarray
    labels: np.ndarray
    scored: np.ndarray
    evidence: np.ndarray


def choose(rng: np.random.Generator, rows: int, weights: np.ndarray, size: int) -> np.ndarray:
    """Draw without replacement, in every row anew: (rows, size) indices, each draw in proportion to what weights remain."""
    keys = np.log(weights) + rng.gumbel(
        size=(rows, len(weights))
    )  # the order of these keys is the order of such draws
    return np.argpartition(-keys, size - 1, axis=1)[:, :size] if size < len(weights) else np.argsort(-keys, 1)


def shuffle(rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    """Permute every row of (rows, n) on its own."""
    return np.take_along_axis(values, rng.random(values.shape).argsort(1), 1)


class Task:
    """What the tasks share; half of the `known` ids are keys, the rest values."""

    vocab_size: int

    @property
    def num_tokens(self) -> int:
        """Ids that a model must know."""
        return self.vocab_size

    @property
    def known(self) -> int:
        """Ids of keys and values, which come first."""
        return self.vocab_size - 1

    @property
    def chance(self) -> float:
        """Accuracy of a guess among the values."""
        return 1 / (self.known - self.known // 2)


@dataclass(frozen=True)
class AssociativeRecall(Task):
    """Multi-query associative recall as in zoology: pairs of key and value, then queries, which are keys seen before.

    The keys are 1 ... vocab_size / 2 - 1, the values the rest; both without repetition in an example. Every key is asked
    once, `2 g` tokens behind the pairs, with the gaps g drawn without replacement from a power law g ** (power - 1). Places
    between queries hold filler.

    Args:
        length: tokens per example.
        pairs: keys and values per example.
        vocab_size: keys and values, and 0.
        filler: "random", any token of the vocabulary (zoology's default); "repeated", token 0 everywhere; "noise", tokens
            of a vocabulary of their own, `noise_vocab_size` ids behind the others.
        lead: tokens of filler before the pairs.
        power: of the law of the gaps; zoology's default is 0.01.
        noise_vocab_size: ids of the noise.

    Raises:
        ValueError: pairs, queries and lead do not fit into the length, or there are fewer keys than pairs.
    """

    length: int = 64
    pairs: int = 8
    vocab_size: int = 128
    filler: str = "random"
    lead: int = 0
    power: float = 0.01
    noise_vocab_size: int = 16

    def __post_init__(self):
        room = self.length - self.lead
        if self.lead % 2 or self.length % 2 or 4 * self.pairs > room:
            raise ValueError(
                f"{self.pairs} pairs need {4 * self.pairs} tokens; length {self.length} leaves {room} behind a lead of "
                f"{self.lead} (both must be even)."
            )
        if self.pairs >= self.vocab_size // 2:
            raise ValueError(
                f"vocab_size {self.vocab_size} has {self.vocab_size // 2 - 1} keys for {self.pairs} pairs."
            )
        if self.filler not in ("random", "repeated", "noise"):
            raise ValueError(f"filler is {self.filler!r}; allowed are 'random', 'repeated' and 'noise'.")

    @property
    def num_tokens(self) -> int:
        return self.vocab_size + self.noise_vocab_size

    @property
    def known(self) -> int:
        return self.vocab_size

    def sample(self, rng: np.random.Generator, examples: int, training: bool = True) -> Examples:
        """Draw examples; `training` makes no difference here."""
        half, context = self.vocab_size // 2, 2 * self.pairs
        keys = 1 + shuffle(rng, np.tile(np.arange(half - 1), (examples, 1)))[:, : self.pairs]
        values = half + shuffle(rng, np.tile(np.arange(self.vocab_size - half), (examples, 1)))[:, : self.pairs]
        space = (self.length - self.lead - context) // 2
        gaps = choose(rng, examples, np.arange(1, space + 1, dtype=float) ** (self.power - 1), self.pairs)
        gaps = shuffle(rng, gaps)  # which key comes back when does not depend on its gap's probability
        if self.filler == "random":
            ids = rng.integers(0, self.vocab_size, (examples, self.length))
        elif self.filler == "repeated":
            ids = np.zeros((examples, self.length), dtype=np.int64)
        else:
            ids = rng.integers(self.vocab_size, self.num_tokens, (examples, self.length))
        ids[:, self.lead : self.lead + context : 2] = keys
        ids[:, self.lead + 1 : self.lead + context : 2] = values
        asked = self.lead + context + 2 * gaps
        np.put_along_axis(ids, asked, keys, 1)
        labels = np.full_like(ids, IGNORED)
        np.put_along_axis(labels, asked, values, 1)
        evidence = np.full_like(ids, -1)
        np.put_along_axis(evidence, asked, np.tile(self.lead + 1 + 2 * np.arange(self.pairs), (examples, 1)), 1)
        return Examples(ids, labels, labels != IGNORED, evidence)


@dataclass(frozen=True)
class InContextRecall(Task):
    """MAD's in-context recall and, with noise, noisy in-context recall: pairs of key and value, each key always with its value.

    Training predicts every next token; what counts is the value of every key that came before (MAD's `multi_query`).

    Args:
        length, vocab_size: as MAD's; the noise's ids are part of vocab_size.
        noise: share of the pairs that are two tokens of noise.
        noise_vocab_size: ids of the noise; 0 in the plain task.
    """

    length: int = 128
    vocab_size: int = 16
    noise: float = 0.0
    noise_vocab_size: int = 0

    def __post_init__(self):
        if self.vocab_size - self.noise_vocab_size < 2:
            raise ValueError(
                f"noise_vocab_size {self.noise_vocab_size} leaves no keys of vocab_size {self.vocab_size}."
            )
        if self.noise and not self.noise_vocab_size:
            raise ValueError(f"noise {self.noise} needs a noise_vocab_size.")

    @property
    def known(self) -> int:
        return self.vocab_size - self.noise_vocab_size

    def sample(self, rng: np.random.Generator, examples: int, training: bool = True) -> Examples:
        """Draw examples; labels are the next tokens for training, the values of known keys for the test."""
        known, pairs = self.known, self.length // 2
        meaning = rng.integers(known // 2, known, (examples, known // 2))
        keys = rng.integers(0, known // 2, (examples, pairs))
        is_noise = rng.random((examples, pairs)) < self.noise
        is_noise[np.arange(examples), rng.integers(0, pairs - 1, examples)] = False  # one pair at least
        is_noise[:, -1] = False
        for row, shown in enumerate(np.where(is_noise[:, :-1], -1, keys[:, :-1])):
            keys[row, -1] = rng.choice(np.unique(shown[shown >= 0]))  # the last question has an answer
        values = np.take_along_axis(meaning, keys, 1)
        noise = rng.integers(known, max(known + 1, self.vocab_size), (2, examples, pairs))
        tokens = np.stack([np.where(is_noise, noise[0], keys), np.where(is_noise, noise[1], values)], 2)
        tokens = tokens.reshape(examples, 2 * pairs)
        evidence = np.full((examples, 2 * pairs), -1)
        seen = np.full((examples, known // 2), -1)
        rows = np.arange(examples)
        for pair in range(pairs):
            key, real = keys[:, pair], ~is_noise[:, pair]
            evidence[:, 2 * pair] = np.where(real, seen[rows, key], -1)
            seen[rows[real], key[real]] = 2 * pair + 1
        ids, evidence = tokens[:, :-1], evidence[:, :-1]
        scored = evidence >= 0
        labels = tokens[:, 1:]
        return Examples(ids, labels if training else np.where(scored, labels, IGNORED), scored, evidence)


@dataclass(frozen=True)
class FuzzyRecall(Task):
    """MAD's fuzzy in-context recall: keys and values are motifs of one to `motif` tokens, of pairwise different tokens.

    Keys of the test have the longest motifs; those of training any length. Values have any length in both. What counts
    is every token of the value of a key that came before.
    """

    length: int = 128
    vocab_size: int = 16
    motif: int = 3

    def __post_init__(self):
        if self.length <= 6 * self.motif or self.vocab_size <= 2 * self.motif:
            raise ValueError(
                f"motif {self.motif} needs a length above {6 * self.motif} and a vocab_size above {2 * self.motif}."
            )

    def sample(self, rng: np.random.Generator, examples: int, training: bool = True) -> Examples:
        """Draw examples, shorter ones padded at the front with the last id."""
        rows = [self._row(rng, training) for _ in range(examples)]
        return Examples(*(np.stack(part) for part in zip(*rows, strict=True)))

    def _row(self, rng, training):
        known, pad = self.known, self.vocab_size - 1
        sizes = range(1, self.motif + 1) if training else (self.motif,)

        def draw(low, high, sizes):
            return tuple(rng.choice(high - low, size=rng.choice(list(sizes)), replace=False) + low)

        probe = draw(0, known // 2, sizes)
        meaning = {probe: draw(known // 2, known, range(1, self.motif + 1))}
        probe_size = len(probe) + len(meaning[probe])
        at = rng.integers(0, self.length - probe_size - 4 * self.motif)  # a pair begins behind it, before the end
        tokens, evidence, seen, shown = [], [], {}, False
        while len(tokens) < self.length - probe_size - 2 * self.motif:
            key = probe if len(tokens) >= at and not shown else draw(0, known // 2, sizes)
            shown = shown or key == probe
            self._add(
                tokens, evidence, seen, key, meaning.setdefault(key, draw(known // 2, known, range(1, self.motif + 1)))
            )
        self._add(tokens, evidence, seen, probe, meaning[probe])
        tokens, evidence = np.array(tokens), np.array(evidence)
        missing = self.length + 1 - len(tokens)
        tokens = np.concatenate([np.full(missing, pad), tokens])
        evidence = np.concatenate([np.full(missing, -1), np.where(evidence >= 0, evidence + missing, -1)])
        scored = evidence[1:] >= 0
        labels = tokens[1:]
        return tokens[:-1], labels if training else np.where(scored, labels, IGNORED), scored, evidence[1:]

    @staticmethod
    def _add(tokens, evidence, seen, key, value):
        before = seen.get(key)
        evidence.extend([-1] * len(key))
        evidence.extend([-1] * len(value) if before is None else range(before, before + len(value)))
        seen[key] = len(tokens) + len(key)
        tokens.extend(key)
        tokens.extend(value)


@dataclass(frozen=True)
class SelectiveCopying(Task):
    """MAD's selective copying: tokens among blanks, then a sign, then blanks in whose places the tokens must appear in order."""

    length: int = 256
    vocab_size: int = 16
    copied: int = 16

    def __post_init__(self):
        if self.length <= 2 * self.copied + 1:
            raise ValueError(f"length {self.length} must be above 2 * copied + 1 = {2 * self.copied + 1}.")

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 2)

    def sample(self, rng: np.random.Generator, examples: int, training: bool = True) -> Examples:
        """Draw examples; `training` makes no difference here."""
        sign, blank, before = self.vocab_size - 1, self.vocab_size - 2, self.length - self.copied - 1
        tokens = rng.integers(0, self.vocab_size - 2, (examples, self.copied))
        # MAD inserts every blank in front of a token drawn at random: none stands behind the last token
        gaps = rng.multinomial(before - self.copied, np.full(self.copied, 1 / self.copied), examples)
        where = np.cumsum(gaps + 1, 1) - 1
        ids = np.full((examples, self.length), blank)
        np.put_along_axis(ids, where, tokens, 1)
        ids[:, before] = sign
        labels, evidence = np.full_like(ids, IGNORED), np.full_like(ids, -1)
        labels[:, before + 1 :], evidence[:, before + 1 :] = tokens, where
        return Examples(ids, labels, labels != IGNORED, evidence)


@dataclass(frozen=True)
class Compression(Task):
    """MAD's compression: a sequence must be read back, place by place, from the last token's hidden state alone.

    The model needs a decoder behind it: `recall.py` adds MAD's, two layers on the state plus a sinusoid of the place.
    """

    length: int = 32
    vocab_size: int = 16

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 1)

    def sample(self, rng: np.random.Generator, examples: int, training: bool = True) -> Examples:
        """Draw examples, the last token being the sign to compress."""
        ids = rng.integers(0, self.vocab_size - 1, (examples, self.length))
        ids[:, -1] = self.vocab_size - 1
        return Examples(ids, ids.copy(), np.ones_like(ids, dtype=bool), np.full_like(ids, -1))


@dataclass(frozen=True)
class Memorization(Task):
    """MAD's memorization: the value of a key is the same in all examples and never shown; a sign stands in its place."""

    length: int = 32
    vocab_size: int = 256
    facts_seed: int = 12345

    def sample(self, rng: np.random.Generator, examples: int, training: bool = True) -> Examples:
        """Draw examples; `training` makes no difference here."""
        known = self.known
        facts = np.random.default_rng(self.facts_seed).permutation(np.arange(known // 2, known))[: known // 2]
        keys = rng.integers(0, known // 2, (examples, self.length // 2))
        ids = np.stack([keys, np.full_like(keys, self.vocab_size - 1)], 2).reshape(examples, -1)
        labels = np.full_like(ids, IGNORED)
        labels[:, 1::2] = facts[keys]
        return Examples(ids, labels, labels != IGNORED, np.full_like(ids, -1))


TASKS = {
    "mqar": AssociativeRecall,
    "in-context-recall": InContextRecall,
    "noisy-recall": InContextRecall,
    "fuzzy-recall": FuzzyRecall,
    "selective-copying": SelectiveCopying,
    "compression": Compression,
    "memorization": Memorization,
}
DEFAULTS = {"noisy-recall": {"vocab_size": 32, "noise": 0.2, "noise_vocab_size": 16}}
MAD_VARIATIONS = {  # of the published benchmark, one field at a time; training examples vary there as well
    "in-context-recall": {"vocab_size": [32, 64, 128], "length": [256, 512, 1024]},
    "noisy-recall": {"vocab_size": [48, 80, 144], "length": [256, 512, 1024], "noise": [0.4, 0.6, 0.8]},
    "fuzzy-recall": {"vocab_size": [32, 64, 128], "length": [256, 512, 1024]},
    "selective-copying": {"vocab_size": [32, 64, 128], "length": [512, 1024], "copied": [32, 64, 96]},
    "compression": {"vocab_size": [32, 64, 128], "length": [64, 128, 256]},
    "memorization": {"vocab_size": [512, 1024, 2048, 4096, 8192]},
}


def make_task(name: str, **fields):
    """The task of this name with MAD's or zoology's defaults, changed by fields.

    Raises:
        ValueError: the task does not exist, has no such field, or its fields contradict each other.
    """
    if name not in TASKS:
        raise ValueError(f"There is no task {name!r}; there are {', '.join(TASKS)}.")
    unknown = set(fields) - set(TASKS[name].__dataclass_fields__)
    if unknown:
        known = ", ".join(TASKS[name].__dataclass_fields__)
        raise ValueError(f"The task {name} has no {', '.join(sorted(unknown))}; it has {known}.")
    return TASKS[name](**(DEFAULTS.get(name, {}) | fields))
