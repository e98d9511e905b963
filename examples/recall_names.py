r"""Does a language model recall a name that it cannot know? Books whose names are invented, and the loss each time one comes.

    python examples/recall_names.py --data ../shared/data/pg19/validation                      # the model of this folder
    python examples/recall_names.py --data ../shared/data/pg19/validation --models . runs/other/final --output runs/names.json --plot names.png

Every name of a book is exchanged for an invented one (rename_names.py), the same one everywhere. A model reads the book from its
first token, once, through its cache. Of every occurrence of a name all tokens but the first are counted, which say how the
name goes on, by how far back it occurred last: what has been read before can be recalled, what occurs for the first
time cannot. A model with an eidetic memory reads again with its memory filled by each of the other choices, and with none: what
lies farther back than its windows, and is better predicted with the memory than without, was recalled from it. The last column
says what share of the memory's places, of all layers, holds such tokens once a book has been read.
"""

import argparse
import itertools
import math
import random
import sys
from bisect import bisect_left
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from common import (
    ROOT,
    add_choices,
    can_choose,
    change_memory,
    check_numbers,
    find_text_files,
    load_model,
    read_text,
    write_json,
)
from evaluate import token_bits
from rename_names import WORD, find_names, rename


def invented_books(texts: list[str], seed: int = 0) -> list[tuple[str, dict[int, tuple[int, str]]]]:
    """Texts with names that are invented, and where those stand: first character to the one behind the last, and the name."""
    names, found = find_names(texts), []
    for number, text in enumerate(texts):
        made, words = set(), set(WORD.findall(text))
        text = rename(text, names, random.Random(f"{seed} {number}"), invented=1.0, made=made)
        made -= words  # "The" may have been invented
        upper = {name.upper() for name in made}
        places = (match for match in WORD.finditer(text) if match.group() in made or match.group() in upper)
        found.append((text, {match.start(): (match.end(), match.group().capitalize()) for match in places}))
    return found


def name_tokens(offsets: list[tuple[int, int]], names: dict[int, tuple[int, str]]) -> dict[int, int]:
    """Tokens that go on with a name, and how many tokens before its first one the name occurred last (0: never).

    Args:
        offsets: of every token the first character and the one behind its last.
        names: of `invented_books`.
    """
    starts, last, found = [start for start, _ in offsets], {}, {}
    for start, (stop, name) in sorted(names.items()):
        inside = range(
            bisect_left(starts, start + 1), bisect_left(starts, stop)
        )  # the first token may begin with a space
        if not inside or offsets[inside[-1]][1] > stop:
            continue
        first = inside[0] - 1
        ago = first - last[name] if name in last else 0
        last[name] = first
        found |= dict.fromkeys(inside, ago)
    return found


def held_tokens(model, ids: list[int]) -> list[list[int]]:
    """Of every layer with an eidetic memory the places in the text of what it holds when all has been read."""
    if not getattr(model.config, "eidetic_size", 0):
        return []
    shown = model(torch.tensor([ids], device=model.device), output_eidetic=True, logits_to_keep=1).eidetic_positions
    last = [positions[0, -1] for positions in shown if positions is not None]
    return [positions[positions >= 0].tolist() for positions in last]


def read_books(tokenizer, books, length: int) -> list[tuple[list[int], dict[int, int]]]:
    """The first tokens of every book, and what `name_tokens` finds there."""
    read = (tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False) for text, _ in books)
    return [
        (tokens["input_ids"][:length], name_tokens(tokens["offset_mapping"][:length], names))
        for tokens, (_, names) in zip(read, books, strict=True)
    ]


def measure(model, bos: int, read, args: argparse.Namespace) -> dict[str, list[float]]:
    """Sums and what they are of, by name.

    Each distance: losses in nats of the names' tokens, and how many there are; "all": of all tokens of the books; "names":
    names' tokens, of all tokens; "held": places of the memory that hold one when a book has been read, of all places.

    Args:
        model: reads.
        bos: the token that every book begins with.
        read: of `read_books`.
        args: options.
    """
    totals = defaultdict(lambda: np.zeros(2))
    for number, (ids, found) in enumerate(read, 1):
        nats = token_bits(model, [bos, *ids], args.segment, carry=True).numpy() * math.log(2)
        totals["all"] += nats.sum(), len(nats)
        for place, ago in found.items():
            totals[str(next((edge for edge in args.edges if ago <= edge), "beyond"))] += nats[place], 1
        totals["names"] += len(found), len(ids)
        for places in held_tokens(model, ids):
            totals["held"] += sum(place in found for place in places), len(places)
        print(f"\r{number} of {len(read)} books", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return {name: [float(value) for value in total] for name, total in totals.items()}


def shared_labels(results: dict[str, dict[str, list[float]]], edges: list[int]) -> dict[str, str]:
    """Key of a distance to what a reader is told, as far as all results have it."""
    labels = {
        "0": "first time",
        **{str(high): f"{low + 1} to {high} tokens ago" for low, high in itertools.pairwise(edges)},
        "beyond": f"more than {edges[-1]}",
        "all": "all tokens",
    }
    return {key: label for key, label in labels.items() if all(key in found for found in results.values())}


def summarise(results: dict[str, dict[str, list[float]]], edges: list[int]) -> str:
    """A table in Markdown: mean loss, in the head how many tokens it is of, and the share of names' tokens in the memory."""
    shown, counts = shared_labels(results, edges), next(iter(results.values()))
    heads = ["model, memory", *(f"{label} ({counts[key][1]:,.0f})" for key, label in shown.items())]
    heads.append(f"held ({counts['names'][0] / counts['names'][1]:.1%} of the text)")
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for name, found in results.items():
        cells = [f"{found[key][0] / found[key][1]:.3f}" for key in shown]
        cells.append(f"{found['held'][0] / found['held'][1]:.1%}" if "held" in found else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: dict[str, dict[str, list[float]]], edges: list[int], target: str):
    """Draw the loss of names by distance."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("No plot: it needs matplotlib (pip install matplotlib).", file=sys.stderr)
        return
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    shown = shared_labels(results, edges)
    shown.pop("all")
    for name, found in results.items():
        axes.plot([found[key][0] / found[key][1] for key in shown], marker="o", label=name)
    axes.set_xticks(range(len(shown)), [label.replace(" tokens ago", "\nago") for label in shown.values()])
    axes.set(
        xlabel="the name occurred last (tokens)",
        ylabel="loss on how the name goes on (nats per token)",
        ylim=(0, None),
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(target, dpi=130)


def main():
    """Read, count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", required=True, help="folder of .txt or .txt.gz files, books that the models do not know"
    )
    parser.add_argument(
        "--models", nargs="+", default=[str(ROOT)], help="folders or Hub ids (default: this repository)"
    )
    add_choices(parser, "what fills the memory")
    parser.add_argument("--length", type=int, default=16384, help="tokens of a book that are read (default 16384)")
    parser.add_argument("--max-books", type=int, default=12)
    parser.add_argument(
        "--edges", type=int, nargs="+", default=[128, 256, 1024, 4096], help="distances that part the table"
    )
    parser.add_argument("--segment", type=int, default=2048, help="tokens read at once (default 2048)")
    parser.add_argument("--output", help="a JSON file of the sums")
    parser.add_argument("--plot", help="an image, where matplotlib is installed")
    args = parser.parse_args()
    check_numbers(parser, args, length=1, max_books=1, segment=1)
    args.edges = [0, *sorted(args.edges)]
    texts = [text for path in find_text_files(args.data)[: args.max_books] if (text := read_text(path))]
    if not texts:
        raise SystemExit(f"The texts in {args.data} are empty.")
    books, results = invented_books(texts), {}
    for path in args.models:
        model, tokenizer = load_model(path)
        read = read_books(tokenizer, books, args.length)
        remembers = can_choose(model, args.choices)
        title = path if len(args.models) > 1 else ""
        for choice in args.choices if remembers else ["none"]:
            with torch.inference_mode():
                chosen = change_memory(model, choice) if remembers else model
                found = measure(chosen, tokenizer.eos_token_id, read, args)
            results[", ".join(filter(None, (title, choice)))] = found
            print(summarise(results, args.edges), flush=True)
            if args.output:
                write_json(Path(args.output), results)
    if args.plot:
        Path(args.plot).parent.mkdir(parents=True, exist_ok=True)
        plot(results, args.edges, args.plot)


if __name__ == "__main__":
    main()
