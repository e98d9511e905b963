"""Exchange the names in books for others, passage by passage, so that only the passage itself tells who comes next.

    python examples/rename_names.py --data ../shared/data/pg19/train --output runs/renamed

A model that reads the same few books again and again learns their names by heart, and has no need to look back for them.
Here a name keeps its place within a passage of --passage characters, and is another one in the next: half of them
names of other texts, half of them invented. pretrain.py takes the output as it takes any folder of texts.

What counts as a name: a word of three letters and more that is written with a capital where no sentence begins, four times as
often as it is written small in all texts together, and that no more than a third of the texts use (God and England stay).
"""

import argparse
import itertools
import random
import re
import sys
from collections import Counter
from pathlib import Path

from common import check_numbers, find_text_files, read_text


WORD = re.compile(r"[A-Za-z]+")
CAPITALISED = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]{2,}")  # where no sentence begins
PARAGRAPH = re.compile(r"\n\r?\n")
ONSETS = "b c d f g h j k l m n p r s t v w z bl br ch cl cr dr fl fr gl gr pl pr qu sh sl sp st th tr".split()
VOWELS = "a e i o u a e i o u ai ea ee io ou".split()
CODAS = ["", "", "", "n", "r", "l", "s", "m", "t", "d", "ck", "nd", "rt", "x"]


def find_names(texts: list[str]) -> dict[str, int]:
    """The names in the texts and how often each occurs where no sentence begins."""
    small, capitalised, users = Counter(), Counter(), Counter()
    for text in texts:
        small.update(word for word in WORD.findall(text) if word.islower())
        found = Counter(CAPITALISED.findall(text))
        capitalised.update(found)
        users.update(found.keys())
    most = max(1, len(texts) // 3)
    return {
        name: count
        for name, count in capitalised.items()
        if count > 1 and count > 4 * small[name.lower()] and users[name] <= most
    }


def invent_name(rng: random.Random) -> str:
    """A word of one to three syllables with a capital."""
    syllables = rng.choice([1, 2, 2, 2, 3])
    return "".join(rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(syllables)).capitalize()


def split_passages(text: str, length: int) -> list[str]:
    """The text in parts of at least `length` characters (but for the last), which end where a paragraph does."""
    parts, start = [], 0
    while start < len(text):
        end = PARAGRAPH.search(text, start + length)
        stop = end.end() if end else len(text)
        parts.append(text[start:stop])
        start = stop
    return parts


def rename(
    passage: str, names: dict[str, int], rng: random.Random, invented: float = 0.5, made: set[str] | None = None
) -> str:
    """The passage with every name of `names` exchanged, each for one other, now and then two for the same; NAMES in capitals alike.

    Args:
        passage: text.
        names: of `find_names`.
        rng: chooses.
        invented: share of names that are invented; the others are names of other texts.
        made: the new names are added to it.
    """
    found = sorted({name for name in CAPITALISED.findall(passage) if name in names})
    pool, weights = list(names), list(itertools.accumulate(count**0.5 for count in names.values()))

    def another() -> str:
        if rng.random() < 1 - invented:
            return rng.choices(pool, cum_weights=weights)[0]
        return invent_name(rng)

    other = {name: another() for name in found}
    if made is not None:
        made |= set(other.values())

    def exchange(match: re.Match) -> str:
        word = match.group()
        if word.isupper() and word.capitalize() in other:
            return other[word.capitalize()].upper()
        return other.get(word, word)

    return WORD.sub(exchange, passage)


def main():
    """Read, rename, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of .txt or .txt.gz files")
    parser.add_argument("--output", required=True, help="folder for as many .txt files, of the same names")
    parser.add_argument("--passage", type=int, default=8000, help="characters in which names stay (default 8000)")
    parser.add_argument("--seed", type=int, default=0, help="of the names (default 0)")
    options = parser.parse_args()
    check_numbers(parser, options, passage=1)
    files, output = find_text_files(options.data), Path(options.output)
    if output.resolve() == Path(options.data).resolve():
        parser.error("--output is --data itself: the texts would be lost.")
    if Path(options.data).resolve() in output.resolve().parents:
        parser.error("--output lies in --data: a second run would take its texts for others to rename.")
    texts, rng = [read_text(path) for path in files], random.Random(options.seed)
    names = find_names(texts)
    if not names:
        raise SystemExit(f"No names were found in the {len(files)} texts of {options.data}.")
    targets = [
        output / path.relative_to(options.data).with_suffix("" if path.suffix == ".gz" else ".txt") for path in files
    ]
    if len(set(targets)) < len(files):
        raise SystemExit(f"{options.data} holds a text both as .txt and as .txt.gz: remove one of them.")
    for target, text in zip(targets, texts, strict=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        passages = split_passages(text, options.passage)
        target.write_text("".join(rename(passage, names, rng) for passage in passages), encoding="utf-8", newline="")
    print(f"{len(files)} texts with {len(names):,} names: {output}", file=sys.stderr)


if __name__ == "__main__":
    main()
