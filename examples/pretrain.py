r"""Train a B'MOJO language model on a folder of text files, from nothing or further.

The texts are tokenised once into one stream, each followed by the end-of-text token, and kept in the output folder as a
memory-mapped file. Training sees fixed-length windows of that stream in a shuffled order that depends on the seed
alone, so a run that was stopped (Ctrl-C saves a checkpoint first) continues exactly with ``--resume``. Windows may cross
from one text into the next.

Commands that made the shipped model, from nothing, and then further with windows that teach it to look back:

    python examples/pretrain.py --data ../shared/data/pg19/train --eval-data ../shared/data/pg19/validation \
        --output runs/pg19 --max-minutes 100 --seq-len 1024 --batch-size 2 --threads 1 --dtype bfloat16 \
        --optimizer muon --learning-rate 6e-3 --warmup 100 --steps 30000 --save-every 500
    python examples/rename_names.py --data ../shared/data/pg19/train --output runs/renamed
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 examples/pretrain.py --data ../shared/data/pg19/train runs/renamed \
        --eval-data ../shared/data/pg19/validation --output runs/names --init runs/pg19/final \
        --config '{"innovation_signal": "layer_input", "innovation_kernel": 16}' --recall-windows 6000 \
        --max-minutes 52 --seq-len 1024 --batch-size 2 --threads 1 --dtype bfloat16 \
        --optimizer muon --learning-rate 4e-3 --warmup 50 --save-every 500

`torchrun --nproc-per-node N examples/pretrain.py ...` trains on N devices (DDP), each with windows of its own.

The learning rate rises linearly over ``--warmup`` steps and then falls as a cosine to zero, which it reaches after ``--steps``
steps or, where that is earlier, after ``--max-minutes`` minutes of training; the run then ends. Minutes count over all
resumed parts. What appears in the output folder:

    final/                 the trained model with tokenizer and code; AutoModelForCausalLM loads it
    checkpoint-<step>/     the last two checkpoints
    log.jsonl, loss.png    loss, learning rate, tokens per second; and the curve
    tokens-<key>.uint16    the tokenised texts
    arguments.json         the options of the run
"""

import argparse
import hashlib
import json
import math
import signal
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import torch
from common import ROOT, check_fields, check_numbers, find_text_files, read_text, save_tokenizer
from pretrain_windows import RecallWindows, TokenWindows
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module


# The shipped model: 4.9 million parameters, one fifth of them the embedding.
SHIPPED_SIZES = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": 128,
    "eidetic_size": 64,
    "eidetic_chunk_size": 64,
    "ssm_type": "mamba2",
    "state_size": 64,
    "expand": 1,
    "tie_word_embeddings": True,
}
# what a resumed run must not change
FIXED = (
    *("tokens", "seq_len", "batch_size", "gradient_accumulation", "devices", "seed", "optimizer", "recall_windows"),
    *("learning_rate", "weight_decay", "config", *SHIPPED_SIZES),
)


def tokenize_files(files: list[Path], tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """Write the tokens of all files, each followed by the end-of-text token, to one file of uint16; reuse it if there.

    Args:
        files: the texts, in the order of the stream.
        tokenizer: at most 65536 tokens.
        folder: where the file goes. Its name holds a key of the texts' names, sizes and dates and of the vocabulary.

    Returns:
        Path of the file.
    """
    if len(tokenizer) > 2**16:
        raise SystemExit(f"The tokenizer has {len(tokenizer)} tokens; the token file holds ids below {2**16}.")
    key = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    for path in files:
        key.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}\n".encode())
    target = folder / f"tokens-{key.hexdigest()[:16]}.uint16"
    if target.exists():
        return target
    unfinished = target.with_name(f"{target.stem}-{uuid.uuid4().hex[:8]}.unfinished")  # another run may write the same
    try:
        with open(unfinished, "wb") as file:
            for number, path in enumerate(files, 1):
                print(f"\rtokenising {number} of {len(files)} files", end="", file=sys.stderr, flush=True)
                ids = tokenizer(read_text(path), add_special_tokens=False, verbose=False)["input_ids"]
                np.array([*ids, tokenizer.eos_token_id], dtype=np.uint16).tofile(file)
        print(file=sys.stderr)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    return target


class Schedule:
    """How far the run has come, in steps and in minutes, and the share of the peak learning rate that this means.

    Where several processes train one model, all go by the clock of the first, as of the end of the last step.
    """

    def __init__(self, steps: int, warmup: int, max_minutes: float | None):
        self.steps, self.warmup, self.max_minutes = steps, warmup, max_minutes
        self.seconds_before = 0.0  # spent before this process resumed the run
        self.started = time.monotonic()
        self.agreed: float | None = None

    def start(self, seconds_before: float):
        """Begin to count the time of this process."""
        self.seconds_before, self.started = seconds_before, time.monotonic()

    def seconds(self) -> float:
        """Seconds of training so far, those of earlier parts of the run included."""
        return self._own_seconds() if self.agreed is None else self.agreed

    def _own_seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def agree(self, interrupted: bool) -> bool:
        """Take over the first process's clock; returns whether any process was interrupted."""
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            return interrupted
        told = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(told, (self._own_seconds(), interrupted))
        self.agreed = told[0][0]
        return any(interrupted for _, interrupted in told)

    def progress(self, step: int) -> float:
        """Share of the run that is done: of the steps or of the minutes, whichever is further."""
        elapsed = self.seconds() / (60 * self.max_minutes) if self.max_minutes else 0.0
        return min(1.0, max(step / self.steps, elapsed))

    def learning_rate_factor(self, step: int) -> float:
        """Linear warmup times a cosine that reaches zero at the end of the run."""
        warmup = min(1.0, (step + 1) / (self.warmup + 1))
        return warmup * 0.5 * (1 + math.cos(math.pi * self.progress(step)))


class RunCallback(TrainerCallback):
    """Keep the log file, stop in time, and save before stopping.

    Seconds and tokens go into the trainer's own log history, which its checkpoints keep; ``log.jsonl`` is a copy of it.
    """

    def __init__(self, schedule: Schedule, tokens_per_step: int, log_file: Path):
        self.schedule, self.tokens_per_step, self.log_file = schedule, tokens_per_step, log_file
        self.last = (0, 0.0)  # step and second of the latest log
        self.interrupted = False

    def interrupt(self, *_):
        """Ask for a checkpoint and the end of the run: a signal handler."""
        self.interrupted = True

    def on_train_begin(self, args, state, control, **kwargs):
        self.schedule.start(max((entry.get("seconds", 0.0) for entry in state.log_history), default=0.0))
        self.schedule.agree(False)
        self.last = (state.global_step, self.schedule.seconds())
        if not state.is_world_process_zero:
            return
        with open(self.log_file, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in state.log_history)

    def on_step_end(self, args, state, control, **kwargs):
        self.interrupted = self.schedule.agree(self.interrupted)
        if self.interrupted or self.schedule.progress(state.global_step) >= 1:
            control.should_training_stop = True
            control.should_save = True
            # who interrupts is in a hurry
            control.should_evaluate = args.eval_strategy != "no" and not self.interrupted
        if control.should_save:
            control.should_log = True  # so that the checkpoint knows the time spent

    def on_log(self, args, state, control, logs=None, **kwargs):
        entry, seconds = state.log_history[-1], self.schedule.seconds()
        if "loss" in entry:
            step, second = self.last
            speed = (state.global_step - step) * self.tokens_per_step / max(seconds - second, 1e-9)
            tokens = state.global_step * self.tokens_per_step
            entry |= {"tokens": tokens, "tokens_per_second": round(speed, 1), "seconds": round(seconds, 1)}
            self.last = (state.global_step, seconds)
        if state.is_world_process_zero:
            with open(self.log_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def on_evaluate(self, args, state, control, **kwargs):
        self.last = (state.global_step, self.schedule.seconds())  # the next speed is of training alone

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            plot_losses(self.log_file, self.log_file.with_name("loss.png"))
        self.last = (state.global_step, self.schedule.seconds())


class Progress(ProgressCallback):
    """The trainer's bar with loss and speed in it; lines instead where the output is no terminal."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or "train_runtime" in state.log_history[-1]:
            return
        names = {"loss": "loss", "eval_loss": "eval_loss", "learning_rate": "lr", "tokens_per_second": "tokens/s"}
        entry = state.log_history[-1]
        shown = {short: f"{entry[name]:.4g}" for name, short in names.items() if name in entry}
        if sys.stderr.isatty() and "loss" in entry:
            self.training_bar.set_postfix(shown)
        else:
            self.training_bar.write(f"step {state.global_step}: " + ", ".join(f"{k} {v}" for k, v in shown.items()))


def plot_losses(log_file: Path, target: Path):
    """Draw training and validation loss over the tokens seen; nothing where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return  # main has said so
    with open(log_file, encoding="utf-8") as file:
        entries = [json.loads(line) for line in file]
    tokens_at = {entry["step"]: entry["tokens"] for entry in entries if "tokens" in entry}
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, label in (("loss", "training"), ("eval_loss", "validation")):
        points = [(tokens_at[e["step"]] / 1e6, e[name]) for e in entries if name in e and e["step"] in tokens_at]
        if points:
            axes.plot(*zip(*points, strict=True), label=label)
    axes.set(xlabel="tokens seen (millions)", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(target, dpi=120)


class SinglePrecisionMuon(torch.optim.Muon):
    """Muon whose matrices are made orthogonal in float32, where `torch.optim.Muon` does so in bfloat16.

    For CPUs without instructions for bfloat16, where PyTorch's takes 18 to 35 times as long. Arguments: of `torch.optim.Muon`.
    """

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, group)
        return loss

    def _step(self, p: torch.Tensor, group: dict):
        if "momentum_buffer" not in self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        average = self.state[p]["momentum_buffer"]
        average.lerp_(p.grad, 1 - group["momentum"])
        update = p.grad.lerp(average, group["momentum"]) if group["nesterov"] else average
        update = orthogonalise(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
        # As long as AdamW's steps (Liu et al.), or as Jordan et al. have it, by the form alone.
        rows, columns = p.shape
        like_adamw = group["adjust_lr_fn"] == "match_rms_adamw"
        ratio = 0.2 * math.sqrt(max(rows, columns)) if like_adamw else math.sqrt(max(1, rows / columns))
        p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * ratio)


def orthogonalise(
    matrix: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """The Newton-Schulz iteration of Muon: the matrix with singular values near 1, in its own dtype.

    Args:
        matrix: [rows, columns].
        coefficients: a, b, c of x <- a x + b (x x^T) x + c (x x^T)^2 x.
        steps: how often.
        eps: the least norm that the matrix is divided by.
    """
    a, b, c = coefficients
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def choose_muon(parameters: list[dict]) -> type[torch.optim.Muon]:
    """PyTorch's Muon, or the one in float32 where a CPU has no instructions for bfloat16."""
    has = torch.cpu.get_capabilities()
    on_cpu = all(p.device.type == "cpu" for group in parameters for p in group["params"])
    return SinglePrecisionMuon if on_cpu and not (has.get("avx512_bf16") or has.get("amx_bf16")) else torch.optim.Muon


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for matrices, AdamW for the rest, behind one optimizer's parameter groups, state and state_dict.

    Muon makes the momentum of a matrix orthogonal before it is added (Jordan et al. 2024). Scaled as in Liu et al.,
    arXiv 2502.16982, its steps are as large as AdamW's, so that both take the same learning rate and weight decay.

    Args:
        matrix_groups: parameter groups for `torch.optim.Muon`, of parameters with two dimensions.
        other_groups: parameter groups for `torch.optim.AdamW`.
        lr: of both.
        betas: of AdamW.
    """

    def __init__(self, matrix_groups: list[dict], other_groups: list[dict], lr: float, betas: tuple[float, float]):
        muon = choose_muon(matrix_groups)(matrix_groups, lr=lr, adjust_lr_fn="match_rms_adamw")
        self.parts = (muon, torch.optim.AdamW(other_groups, lr=lr, betas=betas))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self):
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self.parts:
            part.step()
        return loss


class ParameterGroupTrainer(Trainer):
    """A Trainer that keeps weight decay away from the parameters that it would harm (A_log, D, dt_bias, norms).

    Args:
        optimizer: "adamw", or "muon" for the matrices of linear layers but the head's, and AdamW for the rest.
    """

    def __init__(self, *args, optimizer: str = "adamw", **kwargs):
        super().__init__(*args, **kwargs)
        self.optimizer_name = optimizer

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            model = self.model if model is None else model
            settings = {"lr": self.args.learning_rate, "betas": (self.args.adam_beta1, self.args.adam_beta2)}
            groups = sys.modules[type(model).__module__].get_parameter_groups(model, self.args.weight_decay)
            if self.optimizer_name == "muon":
                self.optimizer = MuonWithAdamW(*split_matrices(model, groups), **settings)
            else:
                self.optimizer = torch.optim.AdamW(groups, **settings)
        return self.optimizer


def split_matrices(model: PreTrainedModel, groups: list[dict]) -> tuple[list[dict], list[dict]]:
    """Part parameter groups into those of the linear layers' matrices, without the head's, and those of the rest."""
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    matrices = {module.weight for module in linear if module is not model.get_output_embeddings()}
    chosen = [group | {"params": [p for p in group["params"] if p in matrices]} for group in groups]
    others = [group | {"params": [p for p in group["params"] if p not in matrices]} for group in groups]
    return [group for group in chosen if group["params"]], others


def read_fields(text: str | None) -> dict:
    """The fields of --config, which is a JSON object or the name of a file of one."""
    if not text:
        return {}
    if not text.lstrip().startswith("{"):
        if not Path(text).is_file():
            raise SystemExit(f"--config {text!r} is neither a JSON object nor a file.")
        text = Path(text).read_text(encoding="utf-8")
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise SystemExit(f"--config is no valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise SystemExit(f"--config is {fields!r}, not a JSON object.")
    check_fields(get_class_from_dynamic_module("configuration_bmojo.BMojoConfig", str(ROOT)), fields, "--config")
    return fields


def build_config(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """Make the config from the shipped sizes, then --config, then the single options; later ones win."""
    config_class = get_class_from_dynamic_module("configuration_bmojo.BMojoConfig", str(ROOT))
    given = read_fields(options.config)
    complete = "model_type" in given  # a config.json, not a few fields
    values = given if complete else SHIPPED_SIZES | given
    for name in SHIPPED_SIZES:
        if getattr(options, name) is not None:
            values[name] = getattr(options, name)
    values |= {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    values.setdefault("max_position_embeddings", 2**20)  # distances are bounded, so only generate()'s warning reads it
    return config_class(**values)


def build_model(config: PreTrainedConfig, weights: str | None = None) -> PreTrainedModel:
    """Make a model from this repository's code, so that what it saves carries the code along.

    Its weights are fresh, or those of the folder or Hub id `weights`.
    """
    model_class = get_class_from_dynamic_module("modeling_bmojo.BMojoForCausalLM", str(ROOT))
    if getattr(config, "auto_map", None) is None:
        config.auto_map = dict(sys.modules[type(config).__module__].AUTO_MAP)
    type(config).register_for_auto_class("AutoConfig")
    model_class.register_for_auto_class("AutoModelForCausalLM")
    if weights is None:
        model = model_class(config)
    else:
        model, info = model_class.from_pretrained(
            weights, config=config, dtype=torch.float32, output_loading_info=True
        )
        if odd := sorted({*info["missing_keys"], *info["unexpected_keys"]}):
            raise SystemExit(f"The weights in {weights} do not fit the fields of --config, above all {odd[0]}.")
    ids = {name: getattr(config, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    model.generation_config = GenerationConfig(**ids)
    return model


def choose_model(
    options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, checkpoint: str | None
) -> PreTrainedModel:
    """What is trained: a model that takes the checkpoint's weights later, the one of --init with --config's fields, or a new one."""
    config_class = get_class_from_dynamic_module("configuration_bmojo.BMojoConfig", str(ROOT))
    if checkpoint:
        return build_model(config_class.from_pretrained(checkpoint))
    if options.init:
        fields = config_class.from_pretrained(options.init).to_dict() | read_fields(options.config)
        return build_model(config_class.from_dict(fields), options.init)
    return build_model(build_config(options, tokenizer))


def last_checkpoint(output: Path) -> str | None:
    """The last checkpoint that was written to its end; what is left of others gets another name."""
    found = [path for path in output.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    whole = [path for path in found if (path / "trainer_state.json").is_file()]  # the trainer writes it last
    for left in set(found) - set(whole):
        aside = left.with_name(f"unfinished-{left.name}-{uuid.uuid4().hex[:8]}")
        print(f"{left} was not written to its end: renamed to {aside.name}.", file=sys.stderr)
        left.rename(aside)
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def check_resume(options: argparse.Namespace, tokens: Path, devices: int) -> str | None:
    """Return the checkpoint to continue from, and keep the options of the run; refuse to mix two runs."""
    output = Path(options.output)
    checkpoint = last_checkpoint(output)
    record = output / "arguments.json"
    if checkpoint and not options.resume:
        raise SystemExit(f"{output} holds {Path(checkpoint).name}: add --resume, or choose another --output.")
    now = vars(options) | {"tokens": tokens.name, "devices": devices}
    if checkpoint and record.exists():
        before = json.loads(record.read_text(encoding="utf-8"))
        before = {"optimizer": "adamw", "devices": 1, "recall_windows": 0} | before  # older runs had no choice
        before = now | before  # what an older run has not kept is not compared
        changed = [f"{name} {before[name]} -> {now[name]}" for name in FIXED if before[name] != now[name]]
        if changed:
            dates = (
                " (tokens: named by the texts' names, sizes and dates)" if before["tokens"] != now["tokens"] else ""
            )
            raise SystemExit(
                f"A resumed run must keep its model, its optimizer, and the order of its data, but changed: "
                f"{'; '.join(changed)}{dates}."
            )
    if options.resume and not checkpoint:
        print(f"{output} holds no checkpoint: starting from the beginning.", file=sys.stderr)
    record.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")
    return checkpoint


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, nargs="+", help="folders of .txt or .txt.gz files")
    parser.add_argument("--output", required=True, help="folder for checkpoints, log, and the trained model")
    parser.add_argument("--eval-data", help="folder of texts for the validation loss at every checkpoint")
    parser.add_argument("--eval-windows", type=int, default=64, help="windows of that loss (default 64)")
    parser.add_argument("--tokenizer", help="folder or Hub id (default: that of --init, or this repository)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens per window (default 512)")
    parser.add_argument("--batch-size", type=int, default=8, help="windows per forward pass (default 8)")
    parser.add_argument(
        "--recall-windows",
        type=int,
        default=0,
        help="among the first so many windows are some that teach to look back (default 0; see RecallWindows)",
    )
    parser.add_argument("--gradient-accumulation", type=int, default=1, help="forward passes per step (default 1)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="at its peak (default 2e-3)")
    parser.add_argument(
        "--optimizer",
        choices=("adamw", "muon"),
        default="adamw",
        help="muon: torch.optim.Muon for the matrices of linear layers, AdamW for the rest",
    )
    parser.add_argument("--weight-decay", type=float, default=0.1, help="default 0.1")
    parser.add_argument("--warmup", type=int, default=100, help="steps (default 100)")
    parser.add_argument("--steps", type=int, default=20000, help="at most so many (default 20000)")
    parser.add_argument(
        "--max-minutes", type=float, help="end after so many minutes of training, learning rate at zero"
    )
    parser.add_argument("--save-every", type=int, default=250, help="steps between checkpoints (default 250)")
    parser.add_argument("--log-every", type=int, default=10, help="steps between log entries (default 10)")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in --output, if any")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: by autocast")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the order of the data (default 0)")
    parser.add_argument(
        "--init", help="folder or Hub id of a B'MOJO model to start from instead of fresh weights, with its config"
    )
    parser.add_argument(
        "--config", help="a config.json, or a JSON object of fields that replace the shipped ones, or --init's"
    )
    sizes = parser.add_argument_group("sizes of the model", "each wins over --config")
    for name, value in SHIPPED_SIZES.items():
        kind = argparse.BooleanOptionalAction if isinstance(value, bool) else None
        settings = {"action": kind} if kind else {"type": type(value)}
        sizes.add_argument("--" + name.replace("_", "-"), **settings, default=None, help=f"shipped: {value}")
    options = parser.parse_args()
    names = "seq_len batch_size gradient_accumulation steps save_every log_every eval_windows threads"
    check_numbers(parser, options, **dict.fromkeys(names.split(), 1))
    check_numbers(parser, options, recall_windows=0, warmup=0, learning_rate=0, weight_decay=0, seed=0)
    sizes_given = [name for name in SHIPPED_SIZES if getattr(options, name) is not None]
    if options.init and sizes_given:
        parser.error(f"--init brings the sizes of its model: leave out --{sizes_given[0].replace('_', '-')}.")
    if options.max_minutes is not None and options.max_minutes <= 0:
        parser.error(f"--max-minutes is {options.max_minutes}; it must be positive.")
    return options


def training_arguments(options: argparse.Namespace) -> TrainingArguments:
    """What the options mean to transformers' Trainer."""
    return TrainingArguments(
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        adam_beta1=0.9,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=options.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        train_sampling_strategy="sequential",  # TokenWindows does the shuffling
        logging_steps=options.log_every,
        save_steps=options.save_every,
        save_total_limit=2,
        eval_strategy="steps" if options.eval_data else "no",
        eval_steps=options.save_every,
        prediction_loss_only=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_timeout=86400,  # seconds that the others wait while the first process tokenises
        ddp_find_unused_parameters=False,  # every parameter has a gradient in every call
        report_to="none",
        seed=options.seed,
    )


def main():
    """Tokenise, train, save."""
    options = parse_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("No loss.png will be drawn: it needs matplotlib (pip install matplotlib).", file=sys.stderr)

    files, output = [path for folder in options.data for path in find_text_files(folder)], Path(options.output)
    eval_files = find_text_files(options.eval_data) if options.eval_data else None
    output.mkdir(parents=True, exist_ok=True)
    source = options.tokenizer or options.init or str(ROOT)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{source} has no tokenizer that loads: name one with --tokenizer. {error}") from error
    arguments = training_arguments(options)
    if arguments.n_gpu > 1:  # the trainer would use torch.nn.DataParallel, slow and untested here
        raise SystemExit(
            f"There are {arguments.n_gpu} GPUs: start with `torchrun --nproc-per-node {arguments.n_gpu}` to use them all, "
            f"or choose one, for example with CUDA_VISIBLE_DEVICES=0."
        )
    with arguments.main_process_first(local=False):
        tokens = tokenize_files(files, tokenizer, output)
        eval_tokens = tokenize_files(eval_files, tokenizer, output) if eval_files else None
        checkpoint = check_resume(options, tokens, arguments.world_size)

    set_seed(options.seed)
    model = choose_model(options, tokenizer, checkpoint)
    if len(tokenizer) > model.config.vocab_size:
        raise SystemExit(
            f"The tokenizer of {source} has {len(tokenizer)} tokens, the model room for {model.config.vocab_size}: "
            "name the model's own with --tokenizer."
        )
    per_step = options.batch_size * options.gradient_accumulation * arguments.world_size
    windows = RecallWindows(tokens, options.seq_len, options.steps * per_step, options.seed, options.recall_windows)
    eval_windows = TokenWindows(eval_tokens, options.seq_len, options.eval_windows, None) if eval_tokens else None
    if arguments.process_index == 0:
        print(
            f"{model.num_parameters():,} parameters; {len(windows.tokens):,} tokens in {len(files)} texts, "
            f"{per_step * options.seq_len:,} a step, one pass in {windows.per_pass / per_step:,.0f} steps",
            file=sys.stderr,
        )

    schedule = Schedule(options.steps, options.warmup, options.max_minutes)
    run = RunCallback(schedule, per_step * options.seq_len, output / "log.jsonl")
    trainer = ParameterGroupTrainer(
        model, arguments, train_dataset=windows, eval_dataset=eval_windows, optimizer=options.optimizer
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(run)
    trainer.add_callback(Progress())
    trainer.create_optimizer()
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, schedule.learning_rate_factor)
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, run.interrupt)
    trainer.train(resume_from_checkpoint=checkpoint)

    if not trainer.is_world_process_zero():
        return
    model.config.use_cache = True  # the trainer turns it off
    model.save_pretrained(output / "final")
    save_tokenizer(tokenizer, output / "final")
    step = trainer.state.global_step
    print(
        f"{step} steps, {step * run.tokens_per_step:,} tokens, {schedule.seconds() / 60:.1f} minutes: {output / 'final'}"
    )
    if run.interrupted:
        print("The run was interrupted; --resume continues it.", file=sys.stderr)


if __name__ == "__main__":
    main()
