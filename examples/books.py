r"""Train models of equal size on books at one length, and measure their loss at positions far beyond it.

    python examples/books.py --data ../shared/data/pg19 --output runs/books            # hours on one core; goes on where it stopped
    python examples/books.py --data ../shared/data/pg19 --output runs/few --models bmojo attention --steps 200 --learning-rates 3e-3
    python examples/books.py --data ../shared/data/pg19 --output runs/choices --trained .   # what a trained model's memory gives it

Every model is trained by pretrain.py on the same windows in the same order, with the same number of parameters (the
widths of the MLPs are solved for it), from the books in --data/train, with the first seed at every one of
--learning-rates, with the others at the one of least loss up to the training length. Then books of --data/validation are read
from their first token on, once, through the cache, and every token is predicted from all before it. What is measured:

    loss by position      mean loss of the tokens at positions [256, 512), [512, 1024), ... of a book
    rare repeated pairs   the loss of tokens whose pair with the token before is (nearly) absent from the training text and has
                          occurred in this book: within the reach of the stacked windows (layers x 2 windows), or only
                          beyond it. Names mostly. "first" is the loss at first occurrences: how much is gained by memory.
    read afresh           the same tokens predicted from all before them, and from no more than the training length: whether a
                          longer past harms, whatever the books are like there. (Every segment of --seq-len tokens starts
                          without a past; the tokens of its second half count.)

With --trained nothing is trained: that model reads the books as it is, and again with its eidetic memory filled by
each of the other choices, and with none.

Results go to --output, which takes those of one set of options: <model>-lr<rate>-seed<seed>/final (the model) and .json
(<choice>.json), rates.json (the loss by which rates were chosen), books.json (a list of seeds for every model, at its rate),
books.png, options.json.
"""

import argparse
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
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
from pretrain import tokenize_files
from recall import Run, build
from transformers import AutoTokenizer


SIZES = {  # 1.3 million parameters, 0.5 of them the embedding
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": 64,
    "state_size": 32,
    "mamba_head_dim": 32,
    "expand": 1,
    "eidetic_size": 64,
    "eidetic_chunk_size": 64,
    "chunk_size": 64,
    "initializer_range": None,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2**20,
}
MODELS = {  # name to a model of recall.py and fields of its config
    "bmojo": ("bmojo", {}),
    "bmojo-all": ("bmojo-all", {}),
    "bmojo-random-choice": ("bmojo", {"innovation_predictor": "random"}),
    "bmojo-f": ("bmojo-f", {}),
    "mamba2": ("mamba2", {}),
    "sliding": ("sliding", {}),
    "attention": ("attention", {}),
}
LAYERS = 4
OPTIONS = ("seq_len", "batch_size", "steps", "parameters", "length", "max_books")  # of all results in a folder
RARE = 1  # occurrences of a pair in the training text, at most


def make_config(name: str, vocab_size: int, parameters: int | None) -> dict:
    """Fields of the model's config, its MLPs as wide as the number of parameters asks."""
    model, fields = MODELS[name]
    sizes = SIZES | ({"eidetic_size": 0} if model == "bmojo-f" else {}) | fields
    run = Run(model=model, layers=LAYERS, hidden_size=SIZES["hidden_size"], fields=sizes, parameters=parameters)
    config = build(run, vocab_size).config.to_diff_dict()
    for name in ("architectures", "auto_map", "dtype", "transformers_version", "model_type"):
        config.pop(name, None)
    return config


def train(name: str, rate: float, seed: int, tokens: Path, vocab_size: int, args: argparse.Namespace) -> Path:
    """Train a model on a file of tokens unless it is there already; an interrupted training goes on. Returns its folder."""
    folder, total = Path(args.output) / f"{name}-lr{rate:g}-seed{seed}", args.steps * args.batch_size * args.seq_len

    def is_done():
        last = folder / "final" / "tokenizer_config.json"  # written last; an interrupted training writes it too
        return last.exists() and training_of(folder / "final")["tokens"] >= total

    if is_done():
        return folder / "final"
    folder.mkdir(exist_ok=True)
    if not (folder / tokens.name).exists():  # pretrain.py takes a file that is there
        (folder / tokens.name).unlink(missing_ok=True)  # a link to where it was
        try:
            os.link(tokens, folder / tokens.name)
        except OSError:  # a file system without links
            shutil.copy(tokens, folder / tokens.name)
    command = [
        sys.executable,
        str(Path(__file__).with_name("pretrain.py")),
        "--resume",
        "--threads",
        str(args.threads),
    ]
    command += ["--data", f"{args.data}/train", "--output", str(folder), "--seq-len", str(args.seq_len)]
    command += [
        "--batch-size",
        str(args.batch_size),
        "--steps",
        str(args.steps),
        "--learning-rate",
        str(rate),
    ]
    command += ["--seed", str(seed), "--warmup", "100", "--save-every", "250"]
    command += ["--config", json.dumps(make_config(name, vocab_size, args.parameters))]
    with subprocess.Popen(command) as process:
        try:
            process.wait()
        except KeyboardInterrupt:
            process.wait()  # it was interrupted too, and saves a checkpoint
            raise
    if process.returncode or not is_done():
        raise SystemExit(f"The training in {folder} did not reach its end; the same command goes on with it.")
    return folder / "final"


def pair_keys(ids: np.ndarray) -> np.ndarray:
    """One number for every token and the one before it, (len(ids) - 1,)."""
    return ids[:-1].astype(np.int64) << 20 | ids[1:].astype(np.int64)


def distances(ids: np.ndarray) -> np.ndarray:
    """How many tokens ago each token's pair with its predecessor occurred last, (len(ids) - 1,); 0 for never."""
    last, found = {}, np.zeros(len(ids) - 1, dtype=np.int64)
    for place, key in enumerate(pair_keys(ids).tolist()):
        found[place] = place - last[key] if key in last else 0
        last[key] = place
    return found


def common_pairs(tokens: Path) -> np.ndarray:
    """Keys of the pairs that occur more than RARE times in a file of tokens."""
    keys, counts = np.unique(pair_keys(np.fromfile(tokens, dtype=np.uint16)), return_counts=True)
    return keys[counts > RARE]


def measure(model, tokenizer, title: str, books: list[Path], common: np.ndarray, args: argparse.Namespace) -> dict:
    """Losses in nats, per book.

    Args:
        model, tokenizer: what reads.
        title: to show.
        books: texts; those shorter than args.length tokens are left out.
        common: keys of the pairs that training saw more than RARE times.
        args: options.
    """
    edges = [0, 256] + [2**power for power in range(9, 1 + int(math.log2(args.length)))]
    reach = model.config.num_hidden_layers * 2 * model.config.sliding_window
    names = [f"{low}-{high}" for low, high in itertools.pairwise(edges)]
    result = {
        "positions": {name: [] for name in names},
        "rare": {"first": [], "within": [], "beyond": []},
        "afresh": {name: [] for name, low in zip(names, edges, strict=False) if low >= args.seq_len},
        "books": [],
    }
    for path in books:
        if len(result["books"]) == args.max_books:
            break
        ids = tokenizer(read_text(path), add_special_tokens=False, verbose=False)["input_ids"][: args.length]
        if len(ids) < args.length:
            continue
        ids = [tokenizer.eos_token_id, *ids]
        ways = (True, False) if result["afresh"] else (True,)
        nats, *afresh = (token_bits(model, ids, args.seq_len, carry).numpy() * math.log(2) for carry in ways)
        late = np.arange(args.length) % args.seq_len >= args.seq_len // 2
        for name, low, high in zip(names, edges, edges[1:], strict=False):
            result["positions"][name].append(float(nats[low:high].mean()))
            if name in result["afresh"]:
                result["afresh"][name].append([float(x[low:high][late[low:high]].mean()) for x in (nats, *afresh)])
        keys, ago = pair_keys(np.array(ids)), distances(np.array(ids))
        is_rare = ~np.isin(keys, common)
        for name, chosen in (("first", ago == 0), ("within", (ago > 0) & (ago <= reach)), ("beyond", ago > reach)):
            values = nats[chosen & is_rare]
            result["rare"][name].append([float(values.sum()), len(values)])
        result["books"].append(path.name)
        print(f"\r{title}: {len(result['books'])} books", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return result | {"parameters": model.num_parameters(), "reach": reach, "edges": edges}


def measure_once(record: Path, make: Callable[[], dict]) -> dict:
    """What a file records, made and written first where there is none."""
    if not record.exists():
        write_json(record, make())
    return json.loads(record.read_text(encoding="utf-8"))


def add_to(record: Path, found: dict) -> dict:
    """What a file of results holds together with new ones, which are written."""
    before = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    write_json(record, before | found)
    return before | found


def keep_options(output: Path, args: argparse.Namespace):
    """End where a folder holds results of other options, which would be taken for those of these; else keep the options."""
    trained = args.trained and (str(Path(args.trained).resolve()) if Path(args.trained).is_dir() else args.trained)
    now, record = {name: getattr(args, name) for name in OPTIONS} | {"trained": trained}, output / "options.json"
    held = any(path != record and not path.name.startswith("tokens-") for path in output.iterdir())
    before = now | (json.loads(record.read_text(encoding="utf-8")) if held and record.exists() else {})
    if changed := [f"{name} {before[name]}" for name in now if before[name] != now[name]]:
        raise SystemExit(f"{output} holds results with {', '.join(changed)}: choose another --output.")
    write_json(record, now)


def check_length(books: list[Path], tokenizer, length: int):
    """End where no book is long enough to be measured, before anything is trained."""
    if not any(len(tokenizer(read_text(path), verbose=False)["input_ids"]) >= length for path in books):
        raise SystemExit(f"None of the {len(books)} books has {length} tokens: lower --length.")


def compare_models(books: list[Path], args: argparse.Namespace) -> dict[str, list[dict]]:
    """Train and measure the models of --models, with each of --seeds, that have no results yet; their rates go to rates.json."""
    output, results, rates = Path(args.output), {}, {}
    tokenizer = AutoTokenizer.from_pretrained(str(ROOT), trust_remote_code=True)

    @cache  # once for all models, and not at all where every result is there
    def training_text():
        tokens = tokenize_files(find_text_files(Path(args.data) / "train"), tokenizer, output)
        return tokens, common_pairs(tokens)

    def make(name, rate, seed):
        tokens, common = training_text()
        folder = train(name, rate, seed, tokens, len(tokenizer), args)
        title = f"{name}, rate {rate:g}, seed {seed}"
        found = measure(*load_model(str(folder)), title, books, common, args)
        return found | training_of(folder) | {"learning_rate": rate}

    def find(name, rate, seed):
        return measure_once(output / f"{name}-lr{rate:g}-seed{seed}.json", partial(make, name, rate, seed))

    for name in args.models:
        first, *others = args.seeds
        grid = {rate: find(name, rate, first) for rate in args.learning_rates}
        losses = {rate: loss_within(found, args.seq_len) for rate, found in grid.items()}
        best = min(losses, key=losses.get)
        results[name] = [grid[best], *(find(name, best, seed) for seed in others)]
        rates[name] = {f"{rate:g}": loss for rate, loss in losses.items()}
        shown = ", ".join(f"{loss:.3f} at {rate}" for rate, loss in rates[name].items())
        print(f"{name}, up to {args.seq_len} tokens: {shown}\n{summarise(results)}", flush=True)
    add_to(output / "rates.json", rates)
    return results


def loss_within(found: dict, length: int) -> float:
    """Mean loss per token of a result in the spans of positions that begin before `length`."""
    spans = [(low, high) for low, high in itertools.pairwise(found["edges"]) if low < length]
    sizes = [high - low for low, high in spans]
    losses = [np.mean(found["positions"][f"{low}-{high}"]) for low, high in spans]
    return float(np.average(losses, weights=sizes))


def training_of(folder: Path) -> dict:
    """Tokens and seconds of the training that made a model."""
    with open(folder.parent / "log.jsonl", encoding="utf-8") as file:
        log = [json.loads(line) for line in file]
    last = [entry for entry in log if "tokens" in entry][-1]
    return {"tokens": last["tokens"], "training_seconds": last["seconds"]}


def compare_choices(books: list[Path], args: argparse.Namespace) -> dict[str, list[dict]]:
    """Measure the model --trained with its memory filled by every choice that has no results yet."""
    model, tokenizer = load_model(args.trained)
    if not can_choose(model, args.choices):
        raise SystemExit(f"{args.trained} has no eidetic memory, so there is nothing to choose.")
    output, results = Path(args.output), {}
    common = common_pairs(tokenize_files(find_text_files(Path(args.data) / "train"), tokenizer, output))

    def make(choice):
        return measure(change_memory(model, choice), tokenizer, choice, books, common, args)

    for choice in args.choices:
        results[choice] = [measure_once(output / f"{choice}.json", partial(make, choice))]
        print(summarise(results), flush=True)
    return results


def mean_losses(found: list[dict]) -> np.ndarray:
    """Mean loss of the books in every span of positions, (seeds, spans)."""
    return np.array([[np.mean(values) for values in result["positions"].values()] for result in found])


def rare_losses(found: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Mean loss of rare pairs at first, within reach, beyond it, (seeds, 3); and how many pairs each is of, (3,)."""
    totals = np.array([[np.sum(values, 0) for values in result["rare"].values()] for result in found])
    return totals[..., 0] / totals[..., 1].clip(min=1), totals[0, :, 1].astype(int)


def summarise(results: dict[str, list[dict]]) -> str:
    """A table in Markdown: loss by position, and of rare pairs with how many there are; with several seeds mean [lowest, highest]."""

    def cell(seeds, digits):
        if len(seeds) == 1:
            return f"{seeds[0]:.{digits}f}"
        return f"{np.mean(seeds):.{digits}f} [{min(seeds):.{digits}f}, {max(seeds):.{digits}f}]"

    names = list(next(iter(results.values()))[0]["positions"])
    lines = ["| model | " + " | ".join(names) + " | rare: first | within | beyond |"]
    lines.append("|" + " --- |" * (len(names) + 4))
    for model, found in results.items():
        cells = [cell(seeds, 3) for seeds in mean_losses(found).T]
        losses, counts = rare_losses(found)
        cells += [f"{cell(seeds, 2)} ({count})" for seeds, count in zip(losses.T, counts, strict=True)]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summarise_afresh(results: dict[str, list[dict]]) -> str:
    """A table in Markdown: loss of the same tokens from all before them / from no more than the training length, means of the seeds.

    Empty where no result says it: those of an earlier version do not.
    """
    results = {name: found for name, found in results.items() if all(seed.get("afresh") for seed in found)}
    if not results:
        return ""
    spans = list(next(iter(results.values()))[0]["afresh"])
    lines = ["| model | " + " | ".join(spans) + " |", "|" + " --- |" * (len(spans) + 1)]
    for model, found in results.items():
        losses = np.array([[np.mean(values, 0) for values in result["afresh"].values()] for result in found]).mean(0)
        lines.append(f"| {model} | " + " | ".join(f"{all_:.3f} / {afresh:.3f}" for all_, afresh in losses) + " |")
    return "\n".join(lines)


def plot(results: dict[str, list[dict]], seq_len: int | None, target: Path):
    """Draw loss over position, and that of the rare pairs, means and range of the seeds; a line at seq_len, where training ended."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("No plot: it needs matplotlib (pip install matplotlib).", file=sys.stderr)
        return
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for model, found in results.items():
        middle = [math.sqrt(max(low, 128) * high) for low, high in itertools.pairwise(found[0]["edges"])]
        losses = mean_losses(found)
        (line,) = left.plot(middle, losses.mean(0), marker="o", ms=3, label=model)
        left.fill_between(middle, losses.min(0), losses.max(0), alpha=0.15, color=line.get_color())
    if seq_len:
        left.axvline(seq_len, color="grey", ls=":", lw=1)
        left.annotate(" trained up to here", (seq_len, 1), xycoords=("data", "axes fraction"), va="top", fontsize=8)
    left.set(xscale="log", xlabel="position in the book (tokens)", ylabel="loss (nats per token)")
    left.legend(fontsize=8)
    places = np.arange(3)
    for number, (model, found) in enumerate(results.items()):
        losses, _ = rare_losses(found)
        right.bar(places + number * 0.8 / len(results), losses.mean(0), 0.8 / len(results), label=model)
    right.set_xticks(places + 0.4, ["first occurrence", "within reach", "beyond reach"])
    right.set(ylabel="loss on rare pairs (nats)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(target, dpi=130)


def main():
    """Train, measure, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train and validation")
    parser.add_argument("--output", default="runs/books")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--trained", help="folder or Hub id of a model to measure as it is and with other choices")
    add_choices(parser, "with --trained, what fills the memory")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens of a training window (default 2048)")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[3e-3, 6e-3, 1.2e-2])
    parser.add_argument("--parameters", type=int, default=1_300_000)
    parser.add_argument("--length", type=int, default=32768, help="tokens of a book that are read (default 32768)")
    parser.add_argument("--max-books", type=int, default=12)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    names = "seq_len batch_size steps parameters length max_books threads"
    check_numbers(parser, args, **dict.fromkeys(names.split(), 1))
    torch.set_num_threads(args.threads)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    books = find_text_files(Path(args.data) / "validation")
    source = args.trained or str(ROOT)
    check_length(books, AutoTokenizer.from_pretrained(source, trust_remote_code=True), args.length)
    keep_options(output, args)
    results = compare_choices(books, args) if args.trained else compare_models(books, args)
    if table := summarise_afresh(results):
        print(f"\nFrom all before / from at most {args.seq_len} tokens:\n{table}", flush=True)
    results = add_to(output / "books.json", results)
    plot(results, None if args.trained else args.seq_len, output / "books.png")


if __name__ == "__main__":
    main()
