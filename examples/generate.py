"""Continue a text, token by token, and show what the model kept in its eidetic memory.

Commands:

    python examples/generate.py "It was a dark night, and"
    python examples/generate.py --prompt-file story.txt --max-new-tokens 50 --show-memory

``--show-memory`` prints, for every bmojo layer, the tokens that had left the window and that the layer still holds exactly
at the end of the text. A text no longer than the window has none. A long prompt is read with a progress bar on stderr.
"""

import argparse
import sys
from pathlib import Path

import torch
from common import ROOT, check_numbers, load_model, read_text
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer, set_seed


LONG = 4096  # tokens: seconds of reading, during which a reader wants to see something move


@torch.no_grad()
def read_ahead(model: PreTrainedModel, ids: torch.Tensor):
    """Read all but the end of a long text (1, seq_len) into a cache, under a progress bar; None of a short text.

    The pieces are those in which the model itself would read the text, so what follows is the same to the last bit.
    """
    if ids.shape[1] <= LONG:
        return None
    *pieces, _ = ids.split(model.model.prefill_piece, dim=1)
    cache = None
    with tqdm(total=sum(piece.shape[1] for piece in pieces), unit=" tokens", unit_scale=True, desc="reading") as bar:
        for piece in pieces:
            cache = model.base_model(piece, cache=cache, use_cache=True, outputs_to_keep=0).cache
            bar.update(piece.shape[1])
    return cache


def group_runs(positions: list[int]) -> list[tuple[int, int]]:
    """Return ascending positions as runs of neighbours, (first, last + 1)."""
    runs = []
    for position in positions:
        if runs and runs[-1][1] == position:
            runs[-1] = (runs[-1][0], position + 1)
        else:
            runs.append((position, position + 1))
    return runs


def mark_tokens(tokenizer: PreTrainedTokenizerBase, ids: list[int], positions: list[int]) -> str:
    """Return the text of ``ids`` with every run of tokens at ``positions`` in brackets."""
    pieces, end = [], 0
    for first, last in group_runs(positions):
        pieces += [tokenizer.decode(ids[end:first]), "[", tokenizer.decode(ids[first:last]), "]"]
        end = last
    return "".join([*pieces, tokenizer.decode(ids[end:])])


@torch.inference_mode()
def kept_positions(model: PreTrainedModel, ids: torch.Tensor) -> dict[int, list[int]]:
    """Return, for every bmojo layer, the positions in its eidetic memory at the last token of ``ids`` (1, seq_len)."""
    cache = read_ahead(model, ids)
    rest = ids if cache is None else ids[:, cache.get_seq_length() :]
    memories = model(rest, cache=cache, output_eidetic=True, logits_to_keep=1).eidetic_positions
    last_chunks = {layer: memory[0, -1] for layer, memory in enumerate(memories) if memory is not None}
    return {layer: positions[positions >= 0].tolist() for layer, positions in last_chunks.items()}


def print_memory(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor):
    """Print per layer which tokens were kept: in the text, and as a list of positions and tokens."""
    window = model.config.sliding_window
    kept, tokens = kept_positions(model, ids), ids[0].tolist()
    if not kept:
        print("The model has no bmojo layer, so no eidetic memory.")
    for layer, positions in kept.items():
        print(
            f"\n--- layer {layer}: {len(positions)} of {model.config.eidetic_size} places taken, by tokens in brackets"
        )
        if not positions:
            print(f"Nothing: the window of {window} tokens still holds what the {len(tokens)} tokens could give.")
            continue
        end = positions[-1] + 1
        print(mark_tokens(tokenizer, tokens[:end], positions) + f" ... ({len(tokens) - end} tokens follow)")
        print(", ".join(f"{position} {tokenizer.decode([tokens[position]])!r}" for position in positions))


def main():
    """Generate, then show the memory where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", help="the text to continue")
    parser.add_argument("--prompt-file", help="read the text to continue from this file (.txt or .txt.gz) instead")
    parser.add_argument("--model", default=str(ROOT), help="folder or Hub id (default: this repository)")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="default 200")
    parser.add_argument("--temperature", type=float, default=0.8, help="default 0.8")
    parser.add_argument("--top-k", type=int, default=50, help="sample among so many tokens (default 50); 0: all")
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--show-memory", action="store_true", help="print what each layer kept in its eidetic memory")
    args = parser.parse_args()
    if (args.prompt is None) == (args.prompt_file is None):
        parser.error("give a prompt or --prompt-file, one of them.")
    if args.prompt_file and not Path(args.prompt_file).is_file():
        parser.error(f"there is no file {args.prompt_file}.")
    check_numbers(parser, args, max_new_tokens=1, top_k=0, seed=0)
    if args.temperature <= 0:
        parser.error(f"--temperature is {args.temperature}; it must be above 0 (--greedy takes the likeliest token).")
    prompt = args.prompt if args.prompt_file is None else read_text(Path(args.prompt_file)).replace("\r\n", "\n")

    sys.stdout.reconfigure(errors="replace")  # a terminal or file of another encoding gets "?" for what it lacks
    model, tokenizer = load_model(args.model)
    set_seed(args.seed)
    inputs = tokenizer(prompt or tokenizer.eos_token, return_tensors="pt").to(model.device)
    choice = {"do_sample": False}
    if not args.greedy:
        choice = {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k}
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    choice |= {"cache": read_ahead(model, inputs["input_ids"]), "max_new_tokens": args.max_new_tokens}
    ids = model.generate(**inputs, streamer=streamer, **choice)
    if args.show_memory:
        print_memory(model, tokenizer, ids)


if __name__ == "__main__":
    main()
