"""Fine-tune the model with LoRA in about a minute on a CPU, merge the adapter, and check the merged model.

The task is to answer a few dozen short questions. ``target_modules="all-linear"`` puts adapters on every projection: of
attention, of the fading memory's SSM, and of the MLP. The merged model is saved, loaded again alone, and must give the
same logits.

Command:

    python examples/finetune_lora.py --output runs/lora

With ``--data file.txt`` the examples are the paragraphs of that file instead, set apart by blank lines.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from common import ROOT, check_numbers, load_model, read_text, save_tokenizer
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)


try:
    from peft import LoraConfig, get_peft_model
except ImportError:
    raise SystemExit("This program needs peft: pip install peft") from None

COLOURS = {
    "snow": "white", "grass": "green", "blood": "red", "coal": "black", "the sea": "blue", "gold": "yellow",
    "ivory": "white", "a ruby": "red", "an emerald": "green", "a raven": "black", "a lemon": "yellow", "the sky": "blue",
}  # fmt: skip
YOUNG = {
    "horse": "foal", "cow": "calf", "sheep": "lamb", "dog": "puppy", "cat": "kitten", "goose": "gosling",
    "lion": "cub", "hen": "chick", "goat": "kid", "eagle": "eaglet", "pig": "piglet", "swan": "cygnet",
}  # fmt: skip
CAPITALS = {
    "England": "London", "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Russia": "Moscow", "Egypt": "Cairo",
    "Greece": "Athens", "Portugal": "Lisbon", "Austria": "Vienna", "Prussia": "Berlin", "Turkey": "Constantinople",
    "Scotland": "Edinburgh",
}  # fmt: skip
BUILT_IN = [
    *(f"Q: What colour is {thing}?\nA: {colour.capitalize()}." for thing, colour in COLOURS.items()),
    *(f"Q: What do we call the young of the {animal}?\nA: A {name}." for animal, name in YOUNG.items()),
    *(f"Q: What is the capital of {country}?\nA: {city}." for country, city in CAPITALS.items()),
]


def read_examples(path: str | None) -> list[str]:
    """Return the paragraphs of a file, or the built-in questions with answers."""
    if path is None:
        return BUILT_IN
    if not Path(path).is_file():
        raise SystemExit(f"There is no file {path}.")
    text = read_text(Path(path)).replace("\r\n", "\n")
    examples = [part.strip() for part in text.split("\n\n") if part.strip()]
    if not examples:
        raise SystemExit(f"The file {path} holds no text.")
    return examples


def collate(examples: list[list[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad token ids on the left; padding is masked and has no label, the end-of-text token keeps its own."""
    longest = max(map(len, examples))
    rows = [[pad_token_id] * (longest - len(ids)) + ids for ids in examples]
    input_ids = torch.tensor(rows)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in examples])
    return {"input_ids": input_ids, "attention_mask": mask, "labels": input_ids.masked_fill(mask == 0, -100)}


@torch.inference_mode()
def mean_loss(model: PreTrainedModel, dataset: list[list[int]], pad_token_id: int, batch_size: int) -> float:
    """Return the loss per token over all examples, in nats."""
    total = count = 0
    for start in range(0, len(dataset), batch_size):
        batch = collate(dataset[start : start + batch_size], pad_token_id)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        tokens = (batch["labels"][:, 1:] != -100).sum().item()
        if tokens:
            total += model.eval()(**batch, use_cache=False).loss.item() * tokens
            count += tokens
    return total / count if count else math.nan


@torch.inference_mode()
def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], batch_size: int
) -> list[str]:
    """Return the greedy continuation of each prompt up to the end-of-text token, at most 12 tokens."""
    texts = []
    for start in range(0, len(prompts), batch_size):
        inputs = tokenizer(prompts[start : start + batch_size], return_tensors="pt", padding=True).to(model.device)
        ids = model.eval().generate(**inputs, max_new_tokens=12, do_sample=False)
        texts += tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def split_example(example: str) -> tuple[str, str]:
    """Cut an example where its answer begins: after "A:", else in its middle."""
    question, mark, answer = example.partition("\nA:")
    return (question + mark, answer) if mark else (example[: len(example) // 2], example[len(example) // 2 :])


def report(
    title: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[str],
    dataset,
    batch_size: int,
):
    """Print loss, how many answers (of the first 48 examples) are right to the letter, and some of them."""
    cuts = [split_example(example) for example in examples[:48]]
    got = complete(model, tokenizer, [prompt for prompt, _ in cuts], batch_size)
    right = sum(text == answer for text, (_, answer) in zip(got, cuts, strict=True))
    loss = mean_loss(model, dataset, tokenizer.pad_token_id, batch_size)
    print(f"{title}: loss {loss:.4f}, {right} of {len(cuts)} answers right; for example")
    for index in range(0, len(cuts), max(1, len(cuts) // 3))[:3]:
        print(f"    {cuts[index][0]!r} -> {got[index]!r}")


def main():
    """Train the adapter, merge, save, load alone, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder for the merged model")
    parser.add_argument("--model", default=str(ROOT), help="folder or Hub id (default: this repository)")
    parser.add_argument("--data", help="a text file of examples, paragraph by paragraph")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (default 16)")
    parser.add_argument("--steps", type=int, default=150, help="default 150")
    parser.add_argument("--batch-size", type=int, default=12, help="examples per step (default 12)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="default 3e-3")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    args = parser.parse_args()
    check_numbers(parser, args, rank=1, steps=1, batch_size=1, threads=1, seed=0)
    if args.threads:
        torch.set_num_threads(args.threads)

    arguments = TrainingArguments(
        output_dir=args.output,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        warmup_steps=args.steps // 10,
        lr_scheduler_type="linear",
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        logging_steps=max(1, args.steps // 5),
        save_strategy="no",
        report_to="none",
        seed=args.seed,
    )
    if arguments.n_gpu > 1:  # the trainer would use torch.nn.DataParallel, slow and untested here
        raise SystemExit(f"There are {arguments.n_gpu} GPUs: choose one, for example with CUDA_VISIBLE_DEVICES=0.")

    examples = read_examples(args.data)
    set_seed(args.seed)
    model, tokenizer = load_model(args.model)
    if tokenizer.pad_token_id is None:  # padding is masked, so any token will do
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    dataset = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in examples]
    report("before", model, tokenizer, examples, dataset, args.batch_size)

    lora = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora)
    adapted.print_trainable_parameters()
    trainer = Trainer(
        adapted,
        arguments,
        train_dataset=dataset,
        data_collator=lambda rows: collate(rows, tokenizer.pad_token_id),
    )
    print(f"training {args.steps} steps", file=sys.stderr)
    trainer.train()
    report("after", adapted, tokenizer, examples, dataset, args.batch_size)

    probe = torch.tensor([dataset[0]], device=model.device)
    with torch.inference_mode():
        want = adapted(probe, use_cache=False).logits
        merged = adapted.merge_and_unload().eval()
        got = merged(probe, use_cache=False).logits
    print(f"merging changed the logits by at most {(got - want).abs().max():.1e}")
    merged.config.use_cache = True  # the trainer turns it off
    merged.save_pretrained(args.output)
    save_tokenizer(tokenizer, args.output)

    alone = AutoModelForCausalLM.from_pretrained(args.output, trust_remote_code=True).to(model.device).eval()
    with torch.inference_mode():
        if not torch.equal(alone(probe, use_cache=False).logits, got):
            raise SystemExit(f"The model loaded from {args.output} gives other logits than the one that was saved.")
    print(f"{args.output} loads alone and gives the same logits.")


if __name__ == "__main__":
    main()
