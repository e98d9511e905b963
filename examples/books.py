r"""Train models of equal size on books at one length, and measure their loss at positions far beyond it.

    python examples/books.py --data ../shared/data/pg19 --output runs/books            # hours on one core; goes on where it stopped
    python examples/books.py --data ../shared/data/pg19 --output runs/books --models bmojo attention --steps 200
    python examples/books.py --data ../shared/data/pg19 --output runs/choices --trained .   # what a trained model's memory gives it

Every model is trained by pretrain.py on the same windows in the same order, with the same number of parameters (the
widths of the MLPs are solved for it), from the books in --data/train. Then books of --data/validation are read from
their first token on, once, through the cache, and every token is predicted from all before it. What is measured:

    loss by position      mean loss of the tokens at positions [256, 512), [512, 1024), ... of a book
    rare repeated pairs   the loss of tokens whose pair with the token before is (nearly) absent from the training text and has
                          occurred in this book: within the reach of the stacked windows (layers x 2 windows), or only
                          beyond it. Names mostly. "first" is the loss at first occurrences: how much is gained by memory.

With --trained nothing is trained: that model reads the books as it is, and again with its eidetic memory filled by
each of the other choices, and with none.

Results go to --output: <model>/final (the model), <model>.json, books.json, books.png.
"""

import argparse
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from common import ROOT, find_text_files, load_model, read_text
from evaluate import token_bits
from pretrain import tokenize_files
from recall import Run, build


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
CHOICES = {  # of what a trained model's memory holds: fields of its config
    "innovation": {},
    **{choice: {"innovation_predictor": choice} for choice in ("random", "recent", "oldest")},
    "none": {"eidetic_size": 0},
}
LAYERS = 4
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


def train(name: str, args: argparse.Namespace) -> Path:
    """Train a model unless it is there already; an interrupted training goes on. Returns its folder."""
    folder = Path(args.output) / name
    if (folder / "final" / "config.json").exists():
        return folder / "final"
    from transformers import AutoTokenizer

    vocab_size = len(AutoTokenizer.from_pretrained(str(ROOT), trust_remote_code=True))
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
        str(args.learning_rate),
    ]
    command += ["--seed", str(args.seed), "--warmup", "100", "--save-every", "250"]
    command += ["--config", json.dumps(make_config(name, vocab_size, args.parameters))]
    subprocess.run(command, check=True)
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
        "books": [],
    }
    for path in books:
        if len(result["books"]) == args.max_books:
            break
        ids = tokenizer(read_text(path), add_special_tokens=False, verbose=False)["input_ids"][: args.length]
        if len(ids) < args.length:
            continue
        ids = [tokenizer.eos_token_id, *ids]
        nats = token_bits(model, ids, args.seq_len, carry=True).numpy() * math.log(2)
        for name, low, high in zip(names, edges, edges[1:], strict=False):
            result["positions"][name].append(float(nats[low:high].mean()))
        keys, ago = pair_keys(np.array(ids)), distances(np.array(ids))
        is_rare = ~np.isin(keys, common)
        for name, chosen in (("first", ago == 0), ("within", (ago > 0) & (ago <= reach)), ("beyond", ago > reach)):
            values = nats[chosen & is_rare]
            result["rare"][name].append([float(values.sum()), len(values)])
        result["books"].append(path.name)
        print(f"\r{title}: {len(result['books'])} books", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return result | {"parameters": model.num_parameters(), "reach": reach, "edges": edges}


def compare_models(books: list[Path], args: argparse.Namespace) -> dict[str, dict]:
    """Train and measure the models of --models that have no results yet."""
    output, common, results = Path(args.output), None, {}
    for name in args.models:
        folder = train(name, args)
        record = output / f"{name}.json"
        if not record.exists():
            if common is None:
                common = common_pairs(next(folder.parent.glob("tokens-*.uint16")))
            found = measure(*load_model(str(folder)), name, books, common, args)
            record.write_text(json.dumps(found | training_of(folder)) + "\n", encoding="utf-8")
        results[name] = json.loads(record.read_text(encoding="utf-8"))
        print(summarise(results), flush=True)
    return results


def training_of(folder: Path) -> dict:
    """Tokens and seconds of the training that made a model."""
    with open(folder.parent / "log.jsonl", encoding="utf-8") as file:
        log = [json.loads(line) for line in file]
    last = [entry for entry in log if "tokens" in entry][-1]
    return {"tokens": last["tokens"], "training_seconds": last["seconds"]}


def compare_choices(books: list[Path], args: argparse.Namespace) -> dict[str, dict]:
    """Measure the model --trained with its memory filled by every choice that has no results yet."""
    model, tokenizer = load_model(args.trained)
    config = model.config
    if not getattr(config, "eidetic_size", 0):
        raise SystemExit(f"{args.trained} has no eidetic memory, so there is nothing to choose.")
    output, results = Path(args.output), {}
    common = common_pairs(tokenize_files(find_text_files(Path(args.data) / "train"), tokenizer, output))
    for name, fields in CHOICES.items():
        record = output / f"{name}.json"
        if not record.exists():
            changed = type(model)(type(config).from_dict(config.to_dict() | fields))
            known = changed.state_dict().keys()
            changed.load_state_dict({key: weight for key, weight in model.state_dict().items() if key in known})
            found = measure(changed.to(model.device).eval(), tokenizer, name, books, common, args)
            record.write_text(json.dumps(found) + "\n", encoding="utf-8")
        results[name] = json.loads(record.read_text(encoding="utf-8"))
        print(summarise(results), flush=True)
    return results


def summarise(results: dict[str, dict]) -> str:
    """A table in Markdown: loss by position, and of rare pairs with how many there are."""
    names = list(next(iter(results.values()))["positions"])
    lines = ["| model | " + " | ".join(names) + " | rare: first | within | beyond |"]
    lines.append("|" + " --- |" * (len(names) + 4))
    for model, result in results.items():
        cells = [f"{np.mean(values):.3f}" for values in result["positions"].values()]
        for values in result["rare"].values():
            total, count = np.array(values).sum(0)
            cells.append(f"{total / max(count, 1):.2f} ({int(count)})")
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: dict[str, dict], seq_len: int | None, target: Path):
    """Draw loss over position, and that of the rare pairs. A line stands at seq_len, the length of training."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("No plot: it needs matplotlib (pip install matplotlib).", file=sys.stderr)
        return
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for model, result in results.items():
        edges = result["edges"]
        middle = [math.sqrt(max(low, 128) * high) for low, high in itertools.pairwise(edges)]
        left.plot(middle, [np.mean(values) for values in result["positions"].values()], marker="o", ms=3, label=model)
    if seq_len:
        left.axvline(seq_len, color="grey", ls=":", lw=1)
        left.annotate(" trained up to here", (seq_len, 1), xycoords=("data", "axes fraction"), va="top", fontsize=8)
    left.set(xscale="log", xlabel="position in the book (tokens)", ylabel="loss (nats per token)")
    left.legend(fontsize=8)
    places = np.arange(3)
    for number, (model, result) in enumerate(results.items()):
        totals = [np.array(values).sum(0) for values in result["rare"].values()]
        heights = [total / max(count, 1) for total, count in totals]
        right.bar(places + number * 0.8 / len(results), heights, 0.8 / len(results), label=model)
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
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens of a training window (default 2048)")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--parameters", type=int, default=1_300_000)
    parser.add_argument("--length", type=int, default=32768, help="tokens of a book that are read (default 32768)")
    parser.add_argument("--max-books", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    books = find_text_files(Path(args.data) / "validation")
    results = compare_choices(books, args) if args.trained else compare_models(books, args)
    (output / "books.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    plot(results, None if args.trained else args.seq_len, output / "books.png")


if __name__ == "__main__":
    main()
