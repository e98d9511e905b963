r"""Time and memory of B'MOJO against transformers' own models of equal size.

Commands:

    python examples/benchmark.py --output runs/benchmark            # an hour on one core
    python examples/benchmark.py --quick --output runs/quick        # under two minutes

All models get random weights and the same number of parameters in their body (all but embeddings and head): the widths
of their MLPs are solved for that. Mamba and Mamba2 have no MLP and so come twice, with as many layers: with twice the
hidden size and their usual expand=2 (of the two the faster), and, `mamba-wide` and `mamba2-wide`, with the hidden size
of the others and expand=8.

What is measured, batch 1, each model with its own kind of cache:

    train     a training step: forward, loss, backward
    prefill   reading a prompt into a cache, one logit; bytes of that cache; growth exponent over the lengths
    decode    one token after a context that a prefill has read
    memory    growth of the peak memory in a training step and in a prefill, each in a process of its own

All models stand in one process and take turns, --rounds times, so that a machine that slows down slows all alike;
decoding, contexts of all lengths do too. The tables show medians, and medians of the ratios inside a round. A call that
would take longer than --limit seconds is not made: it shows as "> 300 s (est. 1,160 s)", judged by the growth between
shorter lengths. Results go to --output as they come: results.json (every single time), table.md, and time.png and
memory.png where matplotlib is installed.
"""

import argparse
import copy
import datetime
import gc
import math
import multiprocessing
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from common import ROOT, cache_argument, check_numbers, write_json
from tqdm import tqdm
from transformers.dynamic_module_utils import get_class_from_dynamic_module


try:
    import resource
except ImportError:  # Windows
    resource = None

MEASURES = ("train", "prefill", "decode", "memory")
LENGTHS = {
    "train": (128, 512, 2048, 4096),
    "prefill": (2048, 8192, 32768),
    "decode": (128, 2048, 32768),
    "memory train": (2048,),
    "memory prefill": (2048, 8192, 32768),
}
QUICK_LENGTHS = {
    "train": (512, 2048),
    "prefill": (2048, 8192),
    "decode": (128, 2048),
    "memory train": (),
    "memory prefill": (2048,),
}
ASIDE = ("bmojo-full",)  # entrants that have to be asked for
QUICK_ENTRANTS = ["bmojo", "bmojo-s6", "mistral", "llama", "mamba2", "falcon-h1"]
PROBES = (128, 256)  # tokens: short calls that tell how an entrant's time grows


@dataclass(frozen=True)
class Sizes:
    """The setting that all entrants share."""

    layers: int = 6
    hidden_size: int = 256
    window: int = 256
    eidetic_size: int = 128
    vocab_size: int = 4096

    @property
    def body(self) -> int:
        """Parameters beside embeddings and head: 10 million in the default setting."""
        return round(1e7 * self.layers / 6 * (self.hidden_size / 256) ** 2)


@dataclass(frozen=True)
class Entrant:
    """A model of the comparison: its name in tables, its class in transformers or here, and fields of its config."""

    label: str
    model: str
    fields: dict
    has_mlp: bool = True  # so that `intermediate_size` can set the number of parameters

    @property
    def ours(self) -> bool:
        return self.model.startswith("BMojo")


def make_entrants(s: Sizes = Sizes()) -> dict[str, Entrant]:
    """All there are, by name; ours come first."""
    head_dim = min(64, s.hidden_size // 4)
    heads, inner = s.hidden_size // head_dim, 2 * s.hidden_size
    attention = {"hidden_size": s.hidden_size, "num_attention_heads": heads, "num_key_value_heads": max(1, heads // 2)}
    attention |= {"max_position_embeddings": 2**17}
    bmojo = attention | {"sliding_window": s.window, "eidetic_size": s.eidetic_size, "eidetic_chunk_size": 64}
    bmojo |= {"mamba_head_dim": head_dim, "expand": 2, "n_groups": 1}
    full = attention | {"layers_block_type": ["full_attention"] * s.layers}
    falcon = {"mamba_n_heads": inner // head_dim, "mamba_d_head": head_dim, "mamba_d_ssm": inner, "mamba_d_state": 64}
    qwen = {"head_dim": head_dim, "linear_key_head_dim": head_dim, "linear_value_head_dim": head_dim}
    qwen |= {"linear_num_key_heads": heads, "linear_num_value_heads": 2 * heads, "num_experts": 0}
    qwen |= {"full_attention_interval": min(4, s.layers)}  # its cache needs one layer of them
    deep, wide = {"hidden_size": inner, "expand": 2}, {"hidden_size": s.hidden_size, "expand": 8}
    s6, ssd = {"state_size": 16}, {"state_size": 64, "head_dim": head_dim, "n_groups": 1}
    deep_heads, wide_heads = {"num_heads": 2 * inner // head_dim}, {"num_heads": 4 * inner // head_dim}
    return {
        "bmojo": Entrant("B'MOJO, SSD", "BMojoForCausalLM", bmojo | {"ssm_type": "mamba2", "state_size": 64}),
        "bmojo-s6": Entrant("B'MOJO, S6", "BMojoForCausalLM", bmojo | {"ssm_type": "mamba", "state_size": 16}),
        "bmojo-full": Entrant("full attention of ours", "BMojoForCausalLM", full),
        "mistral": Entrant("Mistral", "MistralForCausalLM", attention | {"sliding_window": s.window}),
        "llama": Entrant("Llama", "LlamaForCausalLM", attention),
        "mamba": Entrant("Mamba", "MambaForCausalLM", s6 | deep, has_mlp=False),
        "mamba2": Entrant("Mamba2", "Mamba2ForCausalLM", ssd | deep | deep_heads, has_mlp=False),
        "falcon-h1": Entrant("Falcon-H1", "FalconH1ForCausalLM", attention | falcon),
        "qwen3-next": Entrant("Qwen3-Next, dense", "Qwen3NextForCausalLM", attention | qwen),
        "olmo-hybrid": Entrant("OLMo Hybrid", "OlmoHybridForCausalLM", attention),
        "mamba-wide": Entrant("Mamba, expand 8", "MambaForCausalLM", s6 | wide, has_mlp=False),
        "mamba2-wide": Entrant("Mamba2, expand 8", "Mamba2ForCausalLM", ssd | wide | wide_heads, has_mlp=False),
    }


ENTRANTS = make_entrants()


def build(name: str, sizes: Sizes, dtype: str = "float32", device: str = "cpu"):
    """Make a model with random weights, equal for equal arguments, whose body has about `sizes.body` parameters."""
    entrant = make_entrants(sizes)[name]
    if entrant.ours:
        model_class = get_class_from_dynamic_module(f"modeling_bmojo.{entrant.model}", str(ROOT))
    else:
        model_class = getattr(transformers, entrant.model)
    fields = entrant.fields | {"vocab_size": sizes.vocab_size, "num_hidden_layers": sizes.layers}
    fields |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))  # some defaults are above vocab_size

    def body_with(width: int) -> int:
        with torch.device("meta"):
            return count_body(model_class(model_class.config_class(**fields, intermediate_size=width)))

    if entrant.has_mlp:
        steps = (sizes.body - body_with(8)) / (body_with(16) - body_with(8))
        fields["intermediate_size"] = 8 * max(1, 1 + round(steps))
    torch.manual_seed(0)
    return model_class(model_class.config_class(**fields)).to(device, getattr(torch, dtype))


def count_body(model) -> int:
    """Parameters of all but embeddings and head."""
    outer = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    return sum(weight.numel() for weight in model.parameters() if id(weight) not in outer)


def make_tokens(length: int, sizes: Sizes, device: str) -> torch.Tensor:
    return torch.randint(sizes.vocab_size, (1, length), generator=torch.Generator().manual_seed(0)).to(device)


def train_step(model, tokens: torch.Tensor):
    model.train()
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def prefill(model, tokens: torch.Tensor) -> dict:
    """Read tokens and return the cache under the name of the argument that takes it."""
    return cache_argument(model.eval()(input_ids=tokens, use_cache=True, logits_to_keep=1))


CALLS = {"train": train_step, "prefill": prefill}


def cache_bytes(cache) -> int:
    """Bytes of all tensors in a cache, however deep."""
    if hasattr(cache, "num_bytes"):
        return cache.num_bytes()
    if torch.is_tensor(cache):
        return cache.numel() * cache.element_size()
    if isinstance(cache, dict):
        return sum(map(cache_bytes, cache.values()))
    if isinstance(cache, (list, tuple)):
        return sum(map(cache_bytes, cache))
    return cache_bytes(vars(cache)) if hasattr(cache, "__dict__") and not isinstance(cache, type) else 0


def timed(device: str, call: Callable, *args, **kwargs):
    """Seconds that a call takes, and its result."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    result = call(*args, **kwargs)
    wait()
    return time.perf_counter() - start, result


def high_water_mark() -> int:
    """The most bytes that this process had in memory at a time."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_growth(device: str, call: Callable, *args) -> int:
    """By how many bytes the memory in use grows at its highest during a call."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call(*args)
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is resident now
    before = high_water_mark()
    call(*args)
    return high_water_mark() - before


def send_peak(pipe, name: str, sizes: Sizes, call: str, length: int, options: argparse.Namespace):
    """Send the growth of the peak memory in one call, or what went wrong: all that a process of its own does."""
    prepare(options)
    try:
        model = build(name, sizes, options.dtype, options.device)
        CALLS[call](model, make_tokens(32, sizes, options.device))
        tokens = make_tokens(length, sizes, options.device)
        pipe.send(peak_growth(options.device, CALLS[call], model, tokens))
    except (RuntimeError, MemoryError) as error:
        pipe.send(explain(error))


def explain(error: Exception) -> str:
    """What a table says of a call that failed; an error that is no lack of memory is raised."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error):
        return "out of memory"
    raise error


def prepare(options: argparse.Namespace):
    """Settings of a process: threads, silence, and a limit that turns a lack of memory into an error one can catch."""
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()  # peers warn that their CUDA kernels are missing
    if options.memory_limit:
        resource.setrlimit(resource.RLIMIT_DATA, (options.memory_limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))


class Benchmark:
    """The models, what times them, and the records of what was found.

    A record has the fields measure, entrant and length; seconds, a list of times for every round; bytes; cache_bytes; or
    skipped, why there is no figure, with an estimate in seconds where there is one.
    """

    def __init__(self, options: argparse.Namespace, sizes: Sizes):
        self.options, self.sizes, self.output = options, sizes, Path(options.output)
        self.models = {name: build(name, sizes, options.dtype, options.device) for name in options.entrants}
        self.about = describe(options, sizes, self.models)
        self.records = {}  # (measure, entrant, length) -> record
        self.known = {}  # (call, entrant) -> {length: seconds of the first such call}
        self.contexts = {}  # (entrant, length) -> the cache that decoding goes on from
        self.clocks = [0.0, 0.0]  # seconds of this process, and of the world, while it was timed

    def run(self):
        """Measure everything that was asked for, one length after the other."""
        for model in self.models.values():
            for call in CALLS.values():
                call(model, make_tokens(32, self.sizes, self.options.device))  # the first call of a kind is slower
        gc.freeze()  # modules and models stay: collections need not look at them
        asked = {m: sorted(n) for m, n in self.options.lengths.items() if m.split()[0] in self.options.measures}
        tasks = [(m, [length]) for m, lengths in asked.items() if m != "decode" for length in lengths]
        if "decode" in asked:  # tokens are compared between contexts, too: so these take turns as well
            tasks.append(("decode", asked["decode"]))
        with tqdm(total=sum(len(lengths) for _, lengths in tasks) * len(self.models)) as self.progress:
            for measure, lengths in tasks:
                pairs = [(length, name) for length in lengths for name in self.models]
                records = [{"measure": measure, "entrant": name, "length": length} for length, name in pairs]
                self.records |= {(measure, record["entrant"], record["length"]): record for record in records}
                (self.measure_peaks if measure.startswith("memory") else self.measure_times)(records)
                (self.output / "table.md").write_text(make_report(self.about, self.records), encoding="utf-8")
        gc.unfreeze()

    def measure_times(self, records: list[dict]):
        """Let all entrants take turns, at one length or, decoding, at all of them."""
        for turn in range(self.options.rounds):
            for record in records:
                self.show_progress(record, first=not turn)
                if "skipped" in record or (turn and sum(record["seconds"][0]) > self.options.once_above):
                    continue
                if not turn and self.skip(record):
                    continue
                begun = time.process_time(), time.perf_counter()
                try:
                    seconds = self.take_turn(record)
                    record.setdefault("seconds", []).append(seconds)
                except (RuntimeError, MemoryError) as error:
                    record["skipped"] = explain(error)
                ended = time.process_time(), time.perf_counter()
                self.clocks = [c + b - a for c, a, b in zip(self.clocks, begun, ended, strict=True)]
                self.about["core_share"] = round(self.clocks[0] / self.clocks[1], 3)
                gc.collect()
                self.write_json()
        if records[0]["measure"] == "decode":
            self.contexts = {}

    def take_turn(self, record: dict) -> list[float]:
        """Seconds of the calls in one turn of an entrant: one, or some tokens of decoding."""
        measure, name, length = record["measure"], record["entrant"], record["length"]
        if measure == "train":
            return [self.time_call("train", name, length)[0]]
        if measure == "prefill":
            seconds, cache = self.time_call("prefill", name, length)
            record["cache_bytes"] = cache_bytes(cache)
            if "decode" in self.options.measures and length in self.options.lengths["decode"]:
                self.contexts[name, length] = cache  # so that no context is read twice
            return [seconds]
        if (name, length) not in self.contexts:
            self.contexts[name, length] = self.time_call("prefill", name, length)[1]
        step, token = self.models[name].eval(), make_tokens(1, self.sizes, self.options.device)
        arguments = {"input_ids": token, "use_cache": True} | copy.deepcopy(self.contexts[name, length])
        with torch.no_grad():
            return [timed(self.options.device, step, **arguments)[0] for _ in range(self.options.decode_tokens)]

    def time_call(self, call: str, name: str, length: int):
        """Time one training step or prefill, and remember how long it took."""
        tokens = make_tokens(length, self.sizes, self.options.device)
        seconds, result = timed(self.options.device, CALLS[call], self.models[name], tokens)
        self.known.setdefault((call, name), {}).setdefault(length, seconds)
        return seconds, result

    def skip(self, record: dict) -> bool:
        """Whether a record needs a call that failed before or would pass the time limit; the record then says so."""
        name, length = record["entrant"], record["length"]
        call = "prefill" if record["measure"] == "decode" else record["measure"].split()[-1]
        if (name, length) in self.contexts:
            return False
        before = self.records.get((call, name, length), {})
        if "skipped" in before:
            record |= {field: before[field] for field in ("skipped", "estimate") if field in before}
        elif length not in self.known.get((call, name), {}):
            estimate = self.estimate(call, name, length)
            if estimate > self.options.limit:
                record |= {"skipped": f"> {self.options.limit:.0f} s", "estimate": estimate}
        return "skipped" in record

    def estimate(self, call: str, name: str, length: int) -> float:
        """Seconds that a call will take, by the growth between the two longest shorter ones; 0 for a short call."""
        if length <= PROBES[-1]:
            return 0.0
        known = self.known.setdefault((call, name), {})
        for probe in PROBES:
            if sum(n < length for n in known) < 2:
                self.time_call(call, name, probe)
        a, b = sorted(n for n in known if n < length)[-2:]
        growth = math.log(known[b] / known[a]) / math.log(b / a)
        return known[b] * (length / b) ** min(max(growth, 1.0), 2.0)  # at worst quadratic, as Mamba's training is

    def measure_peaks(self, records: list[dict]):
        """Measure peak memory, every figure in a process of its own: a process never gives all its memory back."""
        context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        context.set_forkserver_preload(["transformers.generation.utils"])  # what takes long, once for all
        for record in records:
            self.show_progress(record)
            if self.skip(record):
                continue
            here, there = context.Pipe(duplex=False)
            call = record["measure"].split()[1]
            work = (there, record["entrant"], self.sizes, call, record["length"], self.options)
            process = context.Process(target=send_peak, args=work)
            process.start()
            there.close()
            try:
                found = here.recv() if here.poll(60 + 2 * self.options.limit) else f"> {self.options.limit:.0f} s"
            except EOFError:
                found = "failed"
            process.kill()
            process.join()
            record["bytes" if isinstance(found, int) else "skipped"] = found
            self.write_json()

    def show_progress(self, record: dict, first: bool = True):
        self.progress.set_description(f"{record['measure']} {record['length']} {record['entrant']}", refresh=False)
        self.progress.update(first)

    def write_json(self):
        """Write all results so far, never half a file."""
        write_json(self.output / "results.json", self.about | {"records": list(self.records.values())})


@dataclass(frozen=True)
class Table:
    """A kind of figure: where it stands in the records, and how it is shown."""

    title: str
    unit: str
    measure: str
    field: str
    scale: float = 1.0

    def rounds(self, record: dict) -> list[float]:
        """The figure of every round; none where nothing was measured."""
        if self.field == "seconds":
            return [statistics.median(times) / self.scale for times in record.get("seconds", [])]
        return [record[self.field] / self.scale] if self.field in record else []

    def medians(self, records: dict, name: str) -> dict[int, float]:
        """An entrant's figures by length."""
        found = {
            n: self.rounds(r) for (measure, who, n), r in records.items() if (measure, who) == (self.measure, name)
        }
        return {length: statistics.median(rounds) for length, rounds in found.items() if rounds}

    def show(self, record: dict) -> str:
        """The median of a record, or why it has none."""
        if rounds := self.rounds(record):
            return show(statistics.median(rounds))
        return record.get("skipped", "-") + (f" (est. {show(record['estimate'])} s)" if "estimate" in record else "")

    def show_growth(self, records: list[dict]) -> list[str]:
        """The figures of an entrant against its first, the median over the rounds, in which they took turns."""
        first, *others = map(self.rounds, records)
        ratios = [[b / a for a, b in zip(first, other, strict=False)] for other in others]
        return [f"{statistics.median(found):.2f}" if found else "-" for found in ratios]

    def show_ratio(self, ours: dict, theirs: dict) -> str:
        """Ours / theirs, the median over the rounds; by the estimate, and marked so, where theirs was too slow."""
        pairs = zip(self.rounds(ours), self.rounds(theirs), strict=False)  # a slow entrant has fewer rounds
        if ratios := [a / b for a, b in pairs if b]:
            ratio = statistics.median(ratios)
            return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"
        if self.measure in CALLS and self.field == "seconds" and "estimate" in theirs and self.rounds(ours):
            return f"~{statistics.median(self.rounds(ours)) / theirs['estimate']:.1g} (est.)"
        return "-"


TABLES = (
    Table("Training step", "s", "train", "seconds"),
    Table("Prefill", "s", "prefill", "seconds"),
    Table("Decoding", "ms per token", "decode", "seconds", 1e-3),
    Table("Peak memory of a training step", "MB", "memory train", "bytes", 1e6),
    Table("Peak memory of a prefill", "MB", "memory prefill", "bytes", 1e6),
    Table("Cache after the prefill", "MB", "prefill", "cache_bytes", 1e6),
)


def show(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def growth_exponent(points: dict[int, float]) -> float:
    """Slope of log(seconds) over log(length) by least squares."""
    return statistics.linear_regression(*([math.log(x) for x in axis] for axis in (points, points.values()))).slope


def markdown(title: str, columns: list, rows: dict[str, list[str]]) -> list[str]:
    """The lines of a section with one table, a row for each entrant; none without rows."""
    head = ["", f"### {title}", "", f"| | {' | '.join(map(str, columns))} |", "| --- " * (len(columns) + 1) + "|"]
    return rows and head + [f"| {' | '.join([ENTRANTS[name].label, *cells])} |" for name, cells in rows.items()]


def make_report(about: dict, records: dict) -> str:
    """All tables in markdown."""
    names = sorted(about["entrants"], key=list(ENTRANTS).index)
    peers = [name for name in names if not ENTRANTS[name].ours]
    tested = "{machine}, {threads} thread(s), {dtype}, torch {torch}, transformers {transformers}, {date}; batch 1"
    sizes = [f"{field} {value}" for field, value in about["sizes"].items()]
    lines = [f"`{about['command']}`", "", ", ".join([tested.format_map(about), *sizes]) + "."]
    if about.get("core_share", 1) < 0.9:
        lines += ["", f"**Times are too long: this process had only {about['core_share']:.0%} of a core.**"]
    counts = {name: [f"{count:,}" for count in about["entrants"][name].values()] for name in names}
    lines += markdown("Parameters", ["without embeddings and head", "all"], counts)
    for table in TABLES:
        lengths = sorted({length for measure, _, length in records if measure == table.measure})
        found = {name: [records[table.measure, name, length] for length in lengths] for name in names if lengths}
        rows = {name: list(map(table.show, found[name])) for name in found}
        lines += markdown(f"{table.title} ({table.unit})", lengths, rows)
        if table.title == "Prefill":
            points = {name: table.medians(records, name) for name in found}
            rows = {name: [f"{growth_exponent(points[name]):.2f}"] for name in found if len(points[name]) > 1}
            lines += markdown("Growth of the prefill's time", ["exponent of the length"], rows)
        if table.title == "Decoding" and len(lengths) > 1:
            rows = {name: table.show_growth(found[name]) for name in found}
            lines += markdown(f"Decoding: a token against one after {lengths[0]}", lengths[1:], rows)
        for name in (name for name in found if ENTRANTS[name].ours):
            rows = {peer: list(map(table.show_ratio, found[name], found[peer])) for peer in peers}
            lines += markdown(f"{table.title}: {ENTRANTS[name].label} / peer", lengths, rows)
    return "\n".join(lines) + "\n"


def draw(records: dict, tables: tuple[Table, ...], target: Path):
    """Draw the figures of some tables over the length, of those that have more than one length."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    names = sorted({name for _, name, _ in records}, key=list(ENTRANTS).index)
    curves = {table: {name: table.medians(records, name) for name in names} for table in tables}
    curves = {table: lines for table, lines in curves.items() if max(map(len, lines.values()), default=0) > 1}
    if not curves:
        return
    figure = Figure(figsize=(2 + 3.4 * len(curves), 4), layout="constrained")
    for axes, (table, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for number, (name, points) in enumerate(lines.items()):
            style = {"color": f"C{list(ENTRANTS).index(name)}", "lw": 1.2, "marker": ".", "alpha": 0.8}
            if ENTRANTS[name].ours:
                style = {"color": "black", "lw": 2, "marker": "o", "ls": ("-", "--")[number]}
            axes.loglog(points.keys(), points.values(), label=ENTRANTS[name].label, **style)
        lengths = sorted({length for points in lines.values() for length in points})
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths], fontsize="small")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_locator(NullLocator())
        axes.set(title=table.title, xlabel="tokens", ylabel=table.unit)
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(target, dpi=120)


def describe(options: argparse.Namespace, sizes: Sizes, models: dict) -> dict:
    """What a reader must know to judge or repeat the figures."""
    machine, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if torch.device(options.device).type == "cuda":
        machine = torch.cuda.get_device_name(options.device)
    elif info.exists() and "model name" in info.read_text():
        machine = info.read_text().split("model name")[1].splitlines()[0].strip("\t :")
    about = {"command": options.command, "date": datetime.date.today().isoformat(), "machine": machine}
    about |= {field: getattr(options, field) for field in ("device", "threads", "dtype", "rounds")}
    about |= {"torch": torch.__version__, "transformers": transformers.__version__, "sizes": asdict(sizes)}
    counts = {name: {"body": count_body(m), "parameters": m.num_parameters()} for name, m in models.items()}
    return about | {"entrants": counts}


def usable_memory() -> int:
    """Bytes that a process may take without harm to others; 0 where the system does not say."""
    info = Path("/proc/meminfo")
    return int(0.85 * 1024 * int(info.read_text().split("MemAvailable:")[1].split()[0])) if info.exists() else 0


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/benchmark", help="folder for the results (default runs/benchmark)")
    parser.add_argument("--quick", action="store_true", help="fewer peers, shorter lengths, slow calls only once")
    parser.add_argument("--entrants", nargs="+", metavar="NAME", help=f"of {', '.join(ENTRANTS)}")
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=MEASURES)
    parser.add_argument("--lengths", type=int, nargs="+", help="of all measures (default: some for each)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of all parameters")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=300, help="seconds that a call may take (default 300)")
    for field, value in asdict(Sizes()).items():
        parser.add_argument("--" + field.replace("_", "-"), type=int, default=value, help=f"default {value}")
    options = parser.parse_args(argv)
    options.command = shlex.join(["python", "examples/benchmark.py", *(sys.argv[1:] if argv is None else argv)])
    usual = QUICK_ENTRANTS if options.quick else [name for name in ENTRANTS if name not in ASIDE]
    options.entrants = list(dict.fromkeys(options.entrants or usual))
    options.once_above = 0.25 if options.quick else 20  # seconds of a call that is made in one round only
    options.decode_tokens = 16 if options.quick else 32  # per turn
    if unknown := [name for name in options.entrants if name not in ENTRANTS]:
        parser.error(f"--entrants has {', '.join(unknown)}; there are {', '.join(ENTRANTS)}.")
    lowest = dict.fromkeys(("threads", "rounds", "limit", "window", "vocab_size"), 1)
    check_numbers(parser, options, **lowest, layers=2, hidden_size=32, eidetic_size=0)
    if options.hidden_size % (32 if options.hidden_size <= 256 else 128):
        parser.error(f"--hidden-size is {options.hidden_size}; up to 256 it must be a multiple of 32, above of 128.")
    if options.lengths and min(options.lengths) < 2:
        parser.error(f"--lengths has {min(options.lengths)}; a text needs 2 tokens to have a next one.")
    if options.device.partition(":")[0] not in ("cpu", "cuda"):
        parser.error(f"--device is {options.device}; memory can be measured on cpu and cuda.")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device is {options.device}, and torch sees no GPU.")
    if resource is None:
        parser.error("peak memory is measured as Linux and macOS tell it, which this system does not.")
    lengths = QUICK_LENGTHS if options.quick else LENGTHS
    options.lengths = {measure: tuple(options.lengths or default) for measure, default in lengths.items()}
    options.memory_limit = usable_memory() if options.device == "cpu" else 0  # CUDA reserves more than there is
    return options


def main(argv: list[str] | None = None):
    options = parse_options(argv)
    prepare(options)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    sizes = Sizes(**{field: getattr(options, field) for field in asdict(Sizes())})
    benchmark = Benchmark(options, sizes)
    benchmark.run()
    print((output / "table.md").read_text(encoding="utf-8"))
    try:
        draw(benchmark.records, TABLES[:3], output / "time.png")
        draw(benchmark.records, TABLES[3:], output / "memory.png")
    except ImportError:
        print("No plots were drawn: they need matplotlib (pip install matplotlib).", file=sys.stderr)


if __name__ == "__main__":
    main()
