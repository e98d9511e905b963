r"""A stream has no end: a million tokens through a small model, its cache, its time per token, its rounding errors.

Commands:

    python examples/stream.py --output runs/stream                                    # 10 minutes on one core
    python examples/stream.py --output runs/drift --set innovation_predictor=recent

A model with random weights (or --model) reads one sequence through its cache, and so does its copy in float64. At every
mark these are written down:

    bytes        of either cache, and what the formula `cache_bytes` gives
    ms           per token of either model, over up to 1000 tokens before the mark, one per call: median and least by the
                 clock, and median of the processor's time, which neighbours on a busy machine change little
    growth       of the process's resident memory since the first mark
    difference   |a - b| / |b| of the logits a to those of float64, b, over the last 256 positions: median and largest;
                 Kullback-Leibler divergence of a from b in nats; how often both have the same likeliest token
    overlap      what share of the eidetic memories' places hold a token that the float64 model's hold too

The tokens farther from a mark are read in calls of --step: the same but for rounding, in a fraction of the time.

Two innovations may lie so near each other that the precisions rank them differently. The memories then differ by a token
for as long as it is among the top, and so do the logits: the claim is that the difference is bounded, not that it is
rounding. To see rounding alone, `--set innovation_predictor=recent` chooses without looking at numbers; and the
difference over positions where all memories agree is given apart, though there, too, an earlier disagreement lives on in
the states of the layers above.

Results go to --output at every mark, stream.json and stream.md; stream.png at the end, where matplotlib is installed.
"""

import argparse
import copy
import datetime
import json
import platform
import shlex
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
import transformers
from common import ROOT, check_fields, check_numbers, find_text_files, read_text
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_class_from_dynamic_module


MARKS = (10_000, 100_000, 1_000_000)
SINGLE, COMPARED = 1000, 256  # tokens before a mark: read one per call; of these, compared
SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mamba_head_dim": 32,
    "sliding_window": 32,
    "eidetic_size": 32,
    "eidetic_chunk_size": 16,
}


class Stream:
    """A model, and what its cache holds of the tokens read so far."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.cache = model, None

    @torch.inference_mode()
    def read(self, tokens: torch.Tensor, step: int, kept: int = 0) -> tuple[list, list, list]:
        """Read tokens (1, count) in calls of `step`.

        Returns:
            Seconds of every call, by the clock and of the processor; and after each of the last `kept` calls the logits of the next token, in float64, and
            the positions in the memories of all layers, (layers, eidetic_size), -1 for empty places.
        """
        seconds, logits, memories = [], [], []
        pieces = tokens.split(step, dim=1)
        for number, piece in enumerate(pieces):
            start = time.perf_counter(), time.process_time()
            output = self.model(piece, cache=self.cache, use_cache=True, logits_to_keep=1)
            seconds.append((time.perf_counter() - start[0], time.process_time() - start[1]))
            self.cache = output.cache
            if number >= len(pieces) - kept:
                states = [layer.state for layer in self.cache.layers if "eidetic_position" in layer.state]
                logits.append(output.logits[0, -1].double())
                memories.append([state["eidetic_position"][0].tolist() for state in states])
        return seconds, logits, memories

    def measures(self, seconds: list[tuple[float, float]]) -> dict[str, float]:
        """Time per token, from the seconds of single ones, and bytes of the cache, with those by the formula."""
        formula = sys.modules[type(self.model).__module__].cache_bytes
        columns = self.cache.seen_tokens  # the cache of full attention does grow
        clock, processor = ([1e3 * second for second in times] for times in zip(*seconds, strict=True))
        found = {"ms_median": statistics.median(clock), "ms_min": min(clock), "cpu_ms": statistics.median(processor)}
        found["formula_bytes"] = formula(self.model.config, 1, self.model.dtype, columns)
        return found | {"cache_bytes": self.cache.num_bytes()}


def summary(values: torch.Tensor) -> dict[str, float] | None:
    """Median and maximum; None of nothing."""
    return {"median": values.median().item(), "max": values.max().item()} if len(values) else None


def compare(logits: list, memories: list, true_logits: list, true_memories: list) -> dict:
    """How far logits and memories are from those of float64 at the same positions."""
    a, b = torch.stack(logits), torch.stack(true_logits)
    distance = (a - b).norm(dim=-1) / b.norm(dim=-1)
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    found = {"compared": len(a), "difference": summary(distance)}
    found["kl"] = summary((log_q.exp() * (log_q - log_p)).sum(-1))
    found["same_top"] = (a.argmax(-1) == b.argmax(-1)).double().mean().item()
    if memories[0]:
        memory, true_memory = torch.tensor(memories), torch.tensor(true_memories)
        shared = (true_memory[..., None] == memory[..., None, :]).any(-1)  # (compared, layers, eidetic_size)
        equal = shared.flatten(1).all(1)
        found["overlap"] = {"mean": shared.double().mean().item(), "by_layer": shared.double().mean((0, 2)).tolist()}
        found["equal_memories"] = {"positions": int(equal.sum()), "difference": summary(distance[equal])}
    return found


def resident_bytes() -> int | None:
    """Bytes of this process in memory; None where the system does not say."""
    status = Path("/proc/self/status")
    return 1024 * int(status.read_text().split("VmRSS:")[1].split()[0]) if status.exists() else None


def make_model(options: argparse.Namespace, vocab_size: int) -> PreTrainedModel:
    """A checkpoint, or a small model with random weights; the fields of --set in its configuration."""
    dtype = getattr(torch, options.dtype)
    if options.model:
        load = AutoModelForCausalLM.from_pretrained
        return load(options.model, trust_remote_code=True, dtype=dtype, **options.fields).eval()
    model_class = get_class_from_dynamic_module("modeling_bmojo.BMojoForCausalLM", str(ROOT))
    check_fields(model_class.config_class, options.fields, "--set")
    torch.manual_seed(options.seed)
    config = model_class.config_class(**SIZES | {"vocab_size": vocab_size} | options.fields)
    return model_class(config).to(dtype).eval()


def read_tokens(folder: str, tokenizer: PreTrainedTokenizerBase, count: int) -> torch.Tensor:
    """The first tokens of the texts in a folder, each text closed by the end-of-text token; from the start again if short."""
    ids = []
    for path in find_text_files(folder):
        ids += tokenizer(read_text(path), add_special_tokens=False, verbose=False)["input_ids"]
        ids.append(tokenizer.eos_token_id)
        if len(ids) >= count:
            break
    return torch.tensor(ids).repeat(-(-count // len(ids)))[None, :count]


def run(options: argparse.Namespace, models: dict[str, PreTrainedModel], tokens: torch.Tensor, about: dict):
    """Let all models read the stream, and write the results at every mark."""
    streams = {name: Stream(model) for name, model in models.items()}
    marks, first_resident, started = [], None, time.perf_counter()
    with tqdm(total=tokens.shape[1], unit=" tokens", unit_scale=True, smoothing=0.05, desc="both models") as bar:
        for start, stop in pairwise([0, *options.marks]):
            single = max(start, stop - SINGLE)
            for first in range(start, single, SINGLE):  # in turns, so that both models meet the same machine
                span = tokens[:, first : min(first + SINGLE, single)]
                for stream in streams.values():
                    stream.read(span, options.step)
                bar.update(span.shape[1])
            kept = min(COMPARED, stop - single)
            ends = {name: stream.read(tokens[:, single:stop], 1, kept) for name, stream in streams.items()}
            bar.update(stop - single)
            mark = {"tokens": stop, "seconds": time.perf_counter() - started}
            mark |= {name: stream.measures(ends[name][0]) for name, stream in streams.items()}
            mark |= compare(*ends["stream"][1:], *ends["float64"][1:])
            resident = resident_bytes()  # after the comparison, whose memory the first mark is to count as well
            first_resident = first_resident or resident
            mark |= {
                "resident_bytes": resident,
                "growth_bytes": None if resident is None else resident - first_resident,
            }
            marks.append(mark)
            write(Path(options.output), about | {"marks": marks})


def write(output: Path, results: dict):
    """Write the results as they are so far."""
    (output / "stream.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (output / "stream.md").write_text(make_table(results), encoding="utf-8")


def make_table(results: dict) -> str:
    """The results in markdown."""

    def both(values: dict | None) -> str:
        return f"{values['median']:.1e} ({values['max']:.1e})" if values else "-"

    def row(mark: dict) -> dict[str, str]:
        ours, wide, growth = mark["stream"], mark["float64"], mark["growth_bytes"]
        cells = {"tokens": f"{mark['tokens']:,}", "cache bytes": f"{ours['cache_bytes']:,}"}
        cells |= {"by the formula": f"{ours['formula_bytes']:,}"}
        for name, model in ((results["dtype"], ours), ("float64", wide)):
            times = f"{model['ms_median']:.2f} ({model['ms_min']:.2f}), {model['cpu_ms']:.2f}"
            cells[f"ms per token, {name}: median (least), processor"] = times
        cells["growth of memory"] = "-" if growth is None else f"{growth / 1e6:.1f} MB"
        cells |= {"difference: median (largest)": both(mark["difference"]), "KL, nats": both(mark["kl"])}
        cells["same likeliest token"] = f"{mark['same_top']:.1%}"
        if "overlap" in mark:
            equal = mark["equal_memories"]
            cells["overlap"] = f"{mark['overlap']['mean']:.2%}"
            cells["positions with equal memories"] = f"{equal['positions']} of {mark['compared']}"
            cells["difference there"] = both(equal["difference"])
        return cells

    rows = [row(mark) for mark in results["marks"]]
    table = [list(rows[0]), ["---"] * len(rows[0]), *(list(cells.values()) for cells in rows)]
    lines = [f"`{results['command']}`", "", results["description"], ""]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in table)]) + "\n"


def draw(results: dict, target: Path):
    """Draw bytes, time and difference over the tokens read."""
    from matplotlib.figure import Figure

    marks = results["marks"]
    models, extremes = {results["dtype"]: "stream", "float64": "float64"}, {"median": "median", "largest": "max"}
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for panel, title, curves, find in (
        (axes[0], "cache, bytes", models, lambda mark, name: mark[name]["cache_bytes"]),
        (axes[1], "processor ms per token, one per call", models, lambda mark, name: mark[name]["cpu_ms"]),
        (axes[2], "|a - b| / |b| of logits a to float64's b", extremes, lambda mark, name: mark["difference"][name]),
    ):
        for label, name in curves.items():
            panel.plot([mark["tokens"] for mark in marks], [find(mark, name) for mark in marks], "o-", label=label)
        panel.set(title=title, xlabel="tokens read", xscale="log")
        panel.set_ylim(0, 1.3 * panel.get_ylim()[1])  # from nought: flat is to look flat
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    axes[2].set(ylim=(1e-9, 1), yscale="log")
    figure.savefig(target, dpi=120)


def describe(options: argparse.Namespace, model: PreTrainedModel) -> dict:
    """What a reader must know to judge or repeat the figures."""
    machine, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists() and "model name" in info.read_text():
        machine = info.read_text().split("model name")[1].splitlines()[0].strip("\t :")
    about = {"command": options.command, "date": datetime.date.today().isoformat(), "machine": machine}
    about |= {"threads": options.threads, "torch": torch.__version__, "transformers": transformers.__version__}
    about |= {name: getattr(options, name) for name in ("tokens", "step", "dtype", "seed")}
    about |= {"source": options.data or "random tokens", "parameters": model.num_parameters()}
    about["description"] = (
        "{machine}, {threads} thread(s), torch {torch}, transformers {transformers}, {date}; {parameters:,} parameters "
        "in {dtype}; {source}; calls of {step} tokens, and of one before a mark."
    ).format_map(about)
    return about | {"config": model.config.to_diff_dict()}


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/stream", help="folder for the results (default runs/stream)")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="length of the stream (default 1000000)")
    parser.add_argument(
        "--marks", type=int, nargs="+", help="where to look (default 10000 100000 1000000, and the end)"
    )
    parser.add_argument("--step", type=int, default=64, help="tokens per call far from a mark (default 64)")
    parser.add_argument("--model", help="folder or Hub id (default: a small model with random weights)")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="fields of the configuration")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float64"), default="float32", help="of the weights"
    )
    parser.add_argument("--data", help="folder of .txt or .txt.gz files to read (default: random tokens)")
    parser.add_argument("--seed", type=int, default=0, help="of random weights and tokens (default 0)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    options = parser.parse_args(argv)
    options.command = shlex.join(["python", "examples/stream.py", *(sys.argv[1:] if argv is None else argv)])
    check_numbers(parser, options, tokens=1, step=1, threads=1)
    given = options.marks or [mark for mark in MARKS if mark < options.tokens]
    if not all(1 <= mark <= options.tokens for mark in given):
        parser.error(f"--marks has {given}; marks lie between 1 and the {options.tokens} of --tokens.")
    options.marks = sorted({*given, options.tokens})
    options.fields = {}
    for field in options.set:
        name, found, value = field.partition("=")
        if not found:
            parser.error(f"--set has {field}; write FIELD=VALUE, such as innovation_predictor=recent.")
        try:
            options.fields[name] = json.loads(value)
        except json.JSONDecodeError:
            options.fields[name] = value
    return options


def main(argv: list[str] | None = None):
    """Make models and tokens, let them run, show the results."""
    options = parse_options(argv)
    torch.set_num_threads(options.threads)
    output, tokenizer = Path(options.output), None
    if options.data:
        tokenizer = AutoTokenizer.from_pretrained(options.model or ROOT, trust_remote_code=True)
    model = make_model(options, len(tokenizer) if tokenizer else SIZES["vocab_size"])
    if tokenizer:
        tokens = read_tokens(options.data, tokenizer, options.tokens)
    else:
        generator = torch.Generator().manual_seed(options.seed)
        tokens = torch.randint(model.config.vocab_size, (1, options.tokens), generator=generator)
    output.mkdir(parents=True, exist_ok=True)
    run(options, {"stream": model, "float64": copy.deepcopy(model).double()}, tokens, describe(options, model))
    print((output / "stream.md").read_text(encoding="utf-8"))
    try:
        draw(json.loads((output / "stream.json").read_text(encoding="utf-8")), output / "stream.png")
    except ImportError:
        print("No plot was drawn: it needs matplotlib (pip install matplotlib).", file=sys.stderr)


if __name__ == "__main__":
    main()
