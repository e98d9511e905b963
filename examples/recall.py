r"""Train small models on recall tasks and compare what they remember: accuracy against memory, length and seeds.

One run, or a suite of them whose results are kept and not run again:

    python examples/recall.py --task mqar --model bmojo --seconds 60                    # one run, printed and saved
    python examples/recall.py --task mqar --model transformers:Mamba2ForCausalLM --set expand=2 num_heads=8 head_dim=16
    python examples/recall.py --task mqar --stages 4x32 8x64 16x128 --eval 128 512 2048 --task-set lead=16 filler=repeated
    python examples/recall.py --suite sweep --output runs/recall                        # see --list
    python examples/recall.py --suite sweep --only bmojo-m16 --output runs/recall       # one row of it

A run lasts --seconds of CPU time of its process, or --steps; the learning rate falls as a cosine over it. Models are made
equal in parameters through the width of their MLPs (--parameters, by default as many as the B'MOJO of the task). A suite
takes for every row the best of the learning rates of its grid, judged by --seeds' first seed and the mean accuracy over all
lengths of its tests, and runs the others with it.

Results: one JSON per run with options, parameters, floats of memory, tokens, steps, CPU seconds, and the accuracies: of all
questions, and of those whose evidence lies within or beyond the reach of the stacked windows (layers x 2 windows); for models
with an eidetic memory also the share of the latter whose evidence the memory held. RESULTS.md has ours.
"""

import argparse
import hashlib
import json
import math
import platform
import re
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from common import ROOT, cache_argument, check_fields, check_numbers, write_json
from recall_suites import SUITES
from recall_tasks import IGNORED, TASKS, Examples, make_task
from recall_variations import VARIATIONS
from torch import nn
from tqdm import tqdm
from transformers.dynamic_module_utils import get_class_from_dynamic_module


LAYERS = {  # two layers of each; {ssm} is --ssm
    "attention": ("full_attention", "full_attention"),
    "sliding": ("sliding_attention", "sliding_attention"),
    "mamba": ("mamba", "mamba"),
    "mamba2": ("mamba2", "mamba2"),
    "jamba": ("{ssm}", "full_attention"),
    "hybrid": ("{ssm}", "sliding_attention"),
    "bmojo": ("{ssm}", "bmojo"),
    "bmojo-f": ("{ssm}", "bmojo"),
    "bmojo-all": ("bmojo", "bmojo"),
}


@dataclass(frozen=True)
class Run:
    """Everything that decides a result.

    Attributes:
        task, task_fields: of `recall_tasks`.
        stages: (pairs, length) of the parts of a curriculum for mqar; equal shares of the budget but for the last, which
            gets twice as much. Empty: the task as it is.
        model: a name of `LAYERS`, or "transformers:<class>".
        fields: of the model's config.
        variation: of `recall_variations`, or None.
        parameters: the width of the MLPs is chosen so that there are about as many; None: as in the B'MOJO of the task.
        seconds, steps: the budget, one of them None.
        eval_lengths: lengths for the test beside the last of training.
        train_examples: so many different examples, as MAD has it; None: never the same twice.
    """

    task: str = "mqar"
    task_fields: dict = field(default_factory=dict)
    stages: tuple = ()
    model: str = "bmojo"
    ssm: str = "mamba2"
    layers: int = 2
    hidden_size: int = 64
    window: int = 8
    fields: dict = field(default_factory=dict)
    variation: str | None = None
    parameters: int | None = None
    lr: float = 2e-3
    weight_decay: float = 0.1
    batch_size: int = 16
    seconds: float | None = 60.0
    steps: int | None = None
    seed: int = 0
    eval_lengths: tuple = ()
    eval_examples: int = 512
    train_examples: int | None = None


class Decoder(nn.Module):
    """MAD's decoder for compression: from the last hidden state plus a sinusoid of the place to logits of that place."""

    def __init__(self, hidden_size: int, vocab_size: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.RMSNorm(hidden_size),
            nn.Linear(hidden_size, hidden_size),
            nn.GELU(),
            nn.RMSNorm(hidden_size),
            nn.Linear(hidden_size, hidden_size),
            nn.GELU(),
            nn.RMSNorm(hidden_size),
            nn.Linear(hidden_size, vocab_size),
        )
        self.register_buffer("frequencies", 1e4 ** -torch.linspace(0, 1, hidden_size // 2), persistent=False)

    def forward(self, state: torch.Tensor, length: int) -> torch.Tensor:
        """(examples, hidden_size) to (examples, length, vocab_size)."""
        angles = torch.arange(length)[:, None] * self.frequencies
        return self.layers(state[:, None] + torch.cat([angles.sin(), angles.cos()], -1))


def model_fields(run: Run, num_tokens: int) -> dict:
    """Fields of the config for one of our own models."""
    kinds = [kind.format(ssm=run.ssm) for kind in LAYERS[run.model]]
    kinds = kinds * (run.layers // 2) + kinds[: run.layers % 2]
    fields = {
        "vocab_size": num_tokens,
        "hidden_size": run.hidden_size,
        "intermediate_size": run.hidden_size,
        "num_hidden_layers": run.layers,
        "layers_block_type": kinds,
        "num_attention_heads": 2,
        "sliding_window": run.window,
        "ssm_type": run.ssm,
        "state_size": 16,
        "mamba_head_dim": 32,
        "expand": 1,
        "eidetic_size": 0 if run.model == "bmojo-f" else 16,
        "eidetic_chunk_size": 8,
        "tie_word_embeddings": False,
        "initializer_range": 0.1,
        "chunk_size": 32,
    }
    return fields | run.fields


def build(run: Run, num_tokens: int) -> nn.Module:
    """Make the model with fresh weights that depend on the seed alone, its MLPs as wide as the number of parameters asks.

    Raises:
        SystemExit: the model does not exist, or is larger than asked without any MLP.
    """
    theirs = run.model.startswith("transformers:")
    if theirs:
        model_class = getattr(transformers, run.model.split(":", 1)[1], None)
        if model_class is None:
            raise SystemExit(f"transformers has no class {run.model.split(':', 1)[1]!r}.")
        fields = {
            "vocab_size": num_tokens,
            "hidden_size": run.hidden_size,
            "num_hidden_layers": run.layers,
            "num_attention_heads": 2,
            "sliding_window": run.window,
            "initializer_range": 0.1,
        }
        known = vars(model_class.config_class())
        fields = {name: value for name, value in fields.items() if name in known} | run.fields
        fields |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    elif run.model in LAYERS:
        model_class = get_class_from_dynamic_module("modeling_bmojo.BMojoForCausalLM", str(ROOT))
        fields = model_fields(run, num_tokens)
        check_fields(model_class.config_class, run.fields, "--set")
    else:
        raise SystemExit(f"There is no model {run.model!r}; there are {', '.join(LAYERS)} and transformers:<class>.")

    def count(width):
        with torch.device("meta"):
            made = model_class(model_class.config_class(**fields | {"intermediate_size": width}))
        return sum(parameter.numel() for parameter in made.parameters())

    wanted = run.parameters
    if wanted is None and run.model != "bmojo" and not theirs:
        plain = Run(ssm=run.ssm, layers=run.layers, hidden_size=run.hidden_size)
        wanted = sum(parameter.numel() for parameter in build(plain, num_tokens).parameters())
    low, high = (count(64), count(128)) if wanted is not None else (0, 0)
    if high > low:
        width = max(round(64 + (wanted - low) * 64 / (high - low)), 0)
        if width < 1:
            raise SystemExit(f"{run.model} has more than {wanted} parameters without any MLP; raise --parameters.")
        fields["intermediate_size"] = width
    transformers.set_seed(run.seed)
    model = model_class(model_class.config_class(**fields))
    if run.variation is not None:
        if run.variation not in VARIATIONS:
            raise SystemExit(f"There is no variation {run.variation!r}; there are {', '.join(VARIATIONS)}.")
        if theirs or "bmojo" not in run.model:
            raise SystemExit(f"--variation {run.variation} changes B'MOJO layers; {run.model} has none.")
        VARIATIONS[run.variation](model)
    return model


def memory_floats(model: nn.Module, length: int) -> int:
    """Numbers that the model carries from token to token after `length` tokens, one sequence."""
    with torch.no_grad():
        ids = torch.zeros(1, length, dtype=torch.long)
        (cache,) = cache_argument(model(ids, use_cache=True)).values()
    if hasattr(cache, "num_bytes"):
        return cache.num_bytes() // 4
    found = {}

    def collect(value):
        if isinstance(value, torch.Tensor):
            found[value.data_ptr()] = value.numel()
        elif isinstance(value, (list, tuple)):
            for part in value:
                collect(part)
        elif isinstance(value, dict):
            collect(list(value.values()))
        elif hasattr(value, "__dict__"):
            collect(list(vars(value).values()))

    collect(cache.layers if hasattr(cache, "layers") else cache)
    return sum(found.values())


def tensors(examples: Examples) -> list[torch.Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(part)) for part in examples]


class Learner(nn.Module):
    """A model with what a task needs around it: the loss, the answers."""

    def __init__(self, model: nn.Module, task):
        super().__init__()
        self.model = model
        compresses = type(task).__name__ == "Compression"
        self.decoder = Decoder(model.config.hidden_size, task.num_tokens) if compresses else None

    def logits(self, ids, labels=None):
        """(examples, asked places, ids), where labels say what is asked; the predictor's loss where one is trained."""
        if self.decoder is not None:
            hidden = self.model.base_model(ids, use_cache=False).last_hidden_state[:, -1]
            return self.decoder(hidden, ids.shape[1]), 0.0
        out = self.model.base_model(ids, use_cache=False)
        hidden = out.last_hidden_state if labels is None else out.last_hidden_state[labels != IGNORED]
        extra = getattr(out, "predictor_loss", None)
        return self.model.get_output_embeddings()(hidden), 0.0 if extra is None else extra

    def loss(self, ids, labels) -> torch.Tensor:
        logits, extra = self.logits(ids, labels)
        asked = labels.flatten() if self.decoder is not None else labels[labels != IGNORED]
        weight = getattr(self.model.config, "innovation_loss_coef", 0.0)
        return F.cross_entropy(logits.flatten(0, -2), asked) + weight * extra


@torch.no_grad()
def evaluate(learner: Learner, task, run: Run) -> dict:
    """Accuracies on examples that no training saw."""
    learner.eval()
    model, config = learner.model, learner.model.config
    reach = run.layers * 2 * run.window
    rng, counts = np.random.default_rng((982451653, run.seed)), np.zeros((4, 2))  # all, within, beyond, held
    part = max(1, min(64, 32768 // task.length))
    for start in range(0, run.eval_examples, part):
        ids, labels, scored, evidence = tensors(task.sample(rng, min(part, run.eval_examples - start), training=False))
        options, held = {}, None
        if getattr(config, "eidetic_size", 0) and "bmojo" in getattr(config, "layers_block_type", ()):
            options["output_eidetic"] = True
        if learner.decoder is not None:
            logits, _ = learner.logits(ids)
        else:
            out = model(ids, use_cache=False, **options)
            logits = out.logits
            if options:
                held = held_in_memory(out.eidetic_positions, evidence, config.eidetic_chunk_size)
        right = (logits.argmax(-1) == labels) & scored
        distance = torch.arange(ids.shape[1]) - evidence
        beyond = scored & (evidence >= 0) & (distance > reach)
        within = scored & (evidence >= 0) & ~beyond
        for row, asked in enumerate((scored, within, beyond)):
            counts[row] += right[asked].sum().item(), asked.sum().item()
        if held is not None:
            counts[3] += held[beyond].sum().item(), beyond.sum().item()
    learner.train()
    names = ("accuracy", "within", "beyond", "held")
    result = {name: right / total for name, (right, total) in zip(names, counts, strict=True) if total}
    return result | {"questions": int(counts[0, 1]), "questions_beyond": int(counts[2, 1])}


def held_in_memory(memories, evidence, chunk: int) -> torch.Tensor:
    """Whether any layer's memory held the evidence of each place when it was asked, as evidence (examples, length)."""
    held = torch.zeros_like(evidence, dtype=torch.bool)
    chunks = torch.arange(evidence.shape[1]) // chunk
    for memory in memories:
        if memory is not None:
            held |= (memory[:, chunks] == evidence[..., None]).any(-1)
    return held & (evidence >= 0)


def stage_tasks(run: Run) -> list[tuple[float, object]]:
    """The tasks of a run's stages with the progress at which each ends."""
    if not run.stages:
        return [(1.0, make_task(run.task, **run.task_fields))]
    shares = np.array([1.0] * (len(run.stages) - 1) + [2.0]).cumsum()
    tasks = []
    for pairs, length in run.stages:
        lead = min(run.task_fields.get("lead", 0), (length - 4 * pairs) // 2 * 2)
        tasks.append(make_task(run.task, **run.task_fields | {"pairs": pairs, "length": length, "lead": lead}))
    return list(zip((shares / shares[-1]).tolist(), tasks, strict=True))


def train(run: Run, progress_bar: bool = True) -> dict:
    """Train and test one model.

    Returns:
        What the JSON of the run holds.
    """
    stages = stage_tasks(run)
    task = stages[-1][1]
    learner = Learner(build(run, task.num_tokens), task)
    get_parameter_groups = get_class_from_dynamic_module("modeling_bmojo.get_parameter_groups", str(ROOT))
    groups = get_parameter_groups(learner, run.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=run.lr, betas=(0.9, 0.98))
    rng = np.random.default_rng((run.seed, 7))
    pool = task.sample(np.random.default_rng((run.seed, 5)), run.train_examples) if run.train_examples else None
    started, tests = time.process_time(), 0.0
    step, tokens, curve, losses = 0, 0, [], []
    unit = "s" if run.seconds else "step"
    bar = tqdm(total=run.seconds or run.steps, unit=unit, disable=not progress_bar, leave=False)
    while True:
        spent = time.process_time() - started - tests
        progress = spent / run.seconds if run.seconds else step / run.steps
        bar.update(max(0, (spent if run.seconds else step) - bar.n))
        if progress >= 1:
            break
        if progress * 10 >= len(curve) + 1:
            before = time.process_time()
            accuracy = evaluate(learner, task, replace(run, eval_examples=128))["accuracy"]
            curve.append(
                {"step": step, "seconds": round(spent, 1), "loss": float(np.mean(losses)), "accuracy": accuracy}
            )
            bar.set_postfix(loss=f"{curve[-1]['loss']:.3f}", accuracy=f"{accuracy:.3f}")
            losses, tests = [], tests + time.process_time() - before
        for group in optimizer.param_groups:
            group["lr"] = run.lr * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * progress))
        if pool is not None:
            chosen = rng.integers(0, run.train_examples, run.batch_size)
            ids, labels = (torch.from_numpy(part[chosen]) for part in pool[:2])
        else:
            now = next(stage for end, stage in stages if progress < end)
            ids, labels, *_ = tensors(now.sample(rng, run.batch_size))
        loss = learner.loss(ids, labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        step, tokens = step + 1, tokens + ids.numel()
    bar.close()
    spent = time.process_time() - started - tests
    result = {
        "run": asdict(run),
        "parameters": sum(parameter.numel() for parameter in learner.parameters()),
        "memory_floats": memory_floats(learner.model, max(task.length, *run.eval_lengths, 1)),
        "chance": task.chance,
        "steps": step,
        "tokens": tokens,
        "cpu_seconds": round(spent, 1),
        "curve": curve,
        "machine": platform.processor() or platform.machine(),
        "tests": {str(task.length): evaluate(learner, task, run)},
    }
    for length in run.eval_lengths:
        if length != task.length:
            result["tests"][str(length)] = evaluate(learner, replace(task, length=length), run)
    return result


def describe(result: dict) -> str:
    """One line of a result."""
    run = result["run"]
    parts = [
        f"{run['model']}, seed {run['seed']}, lr {run['lr']:g}: {result['steps']} steps, {result['cpu_seconds']:.0f} CPU s"
    ]
    for length, test in result["tests"].items():
        shown = f"{length}: {test['accuracy']:.3f}"
        if "beyond" in test:
            shown += f" (beyond {test['beyond']:.3f}" + (f", held {test['held']:.3f})" if "held" in test else ")")
        parts.append(shown)
    return "; ".join(parts)


def find_equal(run: Run, suites: Path) -> dict | None:
    """The result of the same run under another name, in `<suite>/<row>/lr<lr>-seed<seed>.json`."""
    wanted = json.loads(json.dumps(asdict(run)))  # lists for tuples
    for path in sorted(suites.glob(f"*/*/lr{run.lr:g}-seed{run.seed}.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["run"] == wanted:
            return found
    return None


def run_suite(rows: dict[str, dict], output: Path, seeds: list[int], bar: bool):
    """Run the rows that have no results yet.

    Args:
        rows: name to fields of `Run`; "lr" may be a list, the grid, or the name of another row, whose choice is taken.
        output: folder of the results, `<row>/lr<lr>-seed<seed>.json`. What a suite beside it has run already is copied.
        seeds: the first chooses among the learning rates.
        bar: whether to show progress.
    """
    chosen = {}
    for name, fields in rows.items():
        grid = fields.get("lr", Run.lr)
        grid = chosen[grid] if isinstance(grid, str) else grid
        grid = grid if isinstance(grid, (list, tuple)) else [grid]

        def result(lr, seed, fields=fields, name=name):
            path = output / name / f"lr{lr:g}-seed{seed}.json"
            if not path.exists():
                run = Run(**fields | {"lr": lr, "seed": seed})
                found = find_equal(run, output.parent)
                how = "copied from the same run of another row: " if found else ""
                found = found or train(run, bar)
                write_json(path, found)
                print(f"{name}: {how}{describe(found)}", flush=True)
            return json.loads(path.read_text(encoding="utf-8"))

        def judge(found):
            return np.mean([test["accuracy"] for test in found["tests"].values()])

        best = chosen[name] = max(grid, key=lambda lr: judge(result(lr, seeds[0])))
        for seed in seeds[1:]:
            result(best, seed)


def parse_value(text: str):
    """A value as JSON, or the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def parse_fields(pairs: list[str]) -> dict:
    """["a=1", "b=x"] to {"a": 1, "b": "x"}."""
    wrong = [pair for pair in pairs if "=" not in pair]
    if wrong:
        raise SystemExit(f"{wrong[0]!r} is not of the form field=value.")
    return {name: parse_value(value) for name, value in (pair.split("=", 1) for pair in pairs)}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", default="mqar", choices=TASKS)
    add("--task-set", nargs="+", default=[], metavar="FIELD=VALUE", help="fields of the task (recall_tasks.py)")
    add(
        "--stages",
        nargs="+",
        default=[],
        metavar="PAIRSxLENGTH",
        help="parts of a curriculum for mqar, such as 8x64 16x128",
    )
    add("--model", default="bmojo", help=f"{', '.join(LAYERS)}, or transformers:<class>")
    add("--ssm", default="mamba2", choices=("mamba2", "mamba"))
    add("--layers", type=int, default=2)
    add("--hidden-size", type=int, default=64)
    add("--window", type=int, default=8)
    add("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="fields of the model's config")
    add("--variation", help=f"change the model: {', '.join(VARIATIONS)}")
    add("--parameters", type=int, help="make the MLPs as wide as this many parameters ask")
    add("--lr", type=float, default=2e-3)
    add("--batch-size", type=int, default=16)
    add("--seconds", type=float, default=60, help="CPU seconds of training")
    add("--steps", type=int, help="instead of --seconds")
    add("--seeds", type=int, nargs="+", help="default 0; of a suite 0 1 2")
    add("--eval", type=int, nargs="+", default=[], help="further lengths to test at")
    add("--eval-examples", type=int, default=512)
    add("--train-examples", type=int, help="so many different examples (MAD: 12800); default: never one twice")
    add("--suite", help="run the rows of a suite that have no results yet; see --list")
    add("--only", nargs="+", metavar="ROW", help="rows of the suite")
    add("--list", action="store_true", help="print the suites and their rows")
    add("--output", default="runs/recall")
    add("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    names = "layers hidden_size window parameters batch_size steps eval_examples train_examples threads"
    check_numbers(parser, args, **dict.fromkeys(names.split(), 1))
    if not args.seconds > 0:
        parser.error(f"--seconds is {args.seconds}; it must be above 0.")
    return args


def main():
    """Run what the arguments say."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    if args.list:
        for suite, rows in SUITES.items():
            print(f"{suite}: {', '.join(rows)}")
        return
    bar = sys.stderr.isatty()
    if args.suite:
        if args.suite not in SUITES:
            raise SystemExit(f"There is no suite {args.suite!r}; there are {', '.join(SUITES)}.")
        seeds = args.seeds or [0, 1, 2]
        rows = SUITES[args.suite]
        unknown = set(args.only or ()) - set(rows)
        if unknown:
            raise SystemExit(f"{args.suite} has no row {', '.join(sorted(unknown))}; it has {', '.join(rows)}.")
        wanted = set(args.only or rows)
        choosers = {rows[name].get("lr") for name in wanted} & set(rows)  # rows whose learning rate these take
        rows = {name: fields for name, fields in rows.items() if name in wanted | choosers}
        run_suite(rows, Path(args.output) / args.suite, seeds, bar)
        return
    try:
        if wrong := [stage for stage in args.stages if not re.fullmatch(r"\d+x\d+", stage)]:
            raise SystemExit(f"--stages has {wrong[0]!r}; write PAIRSxLENGTH, such as 8x64.")
        stages = tuple(tuple(map(int, stage.split("x"))) for stage in args.stages)
        run = Run(
            task=args.task,
            task_fields=parse_fields(args.task_set),
            stages=stages,
            model=args.model,
            ssm=args.ssm,
            layers=args.layers,
            hidden_size=args.hidden_size,
            window=args.window,
            fields=parse_fields(args.set),
            variation=args.variation,
            parameters=args.parameters,
            lr=args.lr,
            batch_size=args.batch_size,
            seconds=None if args.steps else args.seconds,
            steps=args.steps,
            eval_lengths=tuple(args.eval),
            eval_examples=args.eval_examples,
            train_examples=args.train_examples,
        )
        *_, (_, task) = stage_tasks(run)
        for length in run.eval_lengths:  # so that an impossible one is refused before the training
            replace(task, length=length)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    for seed in args.seeds or [0]:
        result = train(replace(run, seed=seed), bar)
        print(describe(result), flush=True)
        key = hashlib.sha256(json.dumps(result["run"], sort_keys=True).encode()).hexdigest()[:8]
        name = f"{args.task}-{args.model.replace(':', '-')}-seed{seed}-{key}.json"
        write_json(Path(args.output) / "single" / name, result)


if __name__ == "__main__":
    main()
