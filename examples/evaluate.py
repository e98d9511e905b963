"""Measure bits per byte of a language model on a folder of text files.

Every token of a text is predicted once, from the end-of-text token and all tokens before it: the text runs through the
model in segments, and the cache carries the past from one to the next, in memory that does not grow. With ``--no-carry``
every segment starts afresh. Bits per byte is the sum of the tokens' -log2 probabilities divided by the number of UTF-8
bytes, so models with different tokenizers compare.

Command of the published numbers:

    python examples/evaluate.py --data ../shared/data/pg19/validation --limit-bytes 200000
"""

import argparse
import math
import time

import torch
from common import ROOT, cache_argument, check_numbers, find_text_files, load_model, read_text
from transformers import PreTrainedModel


def first_bytes(text: str, limit: int | None) -> str:
    """Return the start of ``text`` that fits in ``limit`` bytes of UTF-8; all of it where None."""
    return text if limit is None else text.encode()[:limit].decode(errors="ignore")


@torch.inference_mode()
def token_bits(model: PreTrainedModel, ids: list[int], segment: int, carry: bool) -> torch.Tensor:
    """Return -log2 of the probability of each token after the first.

    Args:
        model: a causal language model whose cache takes segments of any length.
        ids: the tokens; the first one is context only.
        segment: tokens per forward pass.
        carry: whether a segment sees the ones before it.

    Returns:
        (len(ids) - 1,), in float64.
    """
    tokens = torch.tensor([ids], device=model.device)
    bits, past = [], {}
    for start in range(0, len(ids) - 1, segment):
        stop = min(start + segment, len(ids) - 1)
        outputs = model(tokens[:, start:stop], use_cache=carry, **past)
        past = cache_argument(outputs) if carry else {}
        log_probs = outputs.logits[0].float().log_softmax(-1)
        targets = tokens[0, start + 1 : stop + 1]
        bits.append(-log_probs.gather(-1, targets[:, None])[:, 0].double().cpu() / math.log(2))
    return torch.cat(bits)


def print_by_position(totals: dict[int, list[float]], segment: int, carry: bool):
    """Print bits per token by how many tokens precede, in doubling ranges: whether a longer past helps, or harms."""
    for power in sorted(totals):
        bits, count = totals[power]
        first, last = (2**power, 2 ** (power + 1) - 1) if power else (0, 1)
        unit = "tokens before in the text" if carry else f"tokens before in the segment of {segment}"
        print(f"  {first:>8,} to {last:>8,} {unit}: {bits / count:.4f} bits per token ({count:,.0f} tokens)")


def main():
    """Score every text, print each and the total."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of .txt or .txt.gz files")
    parser.add_argument("--model", default=str(ROOT), help="folder or Hub id (default: this repository)")
    parser.add_argument("--segment", type=int, default=1024, help="tokens per forward pass (default 1024)")
    parser.add_argument("--no-carry", action="store_true", help="let every segment start without a past")
    parser.add_argument("--limit-bytes", type=int, help="use only so many bytes from the start of each text")
    parser.add_argument("--max-files", type=int, help="use only the first so many texts")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    args = parser.parse_args()
    check_numbers(parser, args, segment=1, limit_bytes=1, max_files=1, threads=1)
    if args.threads:
        torch.set_num_threads(args.threads)

    files = find_text_files(args.data)[: args.max_files]
    model, tokenizer = load_model(args.model, args.dtype)
    total_bits = total_bytes = total_tokens = seconds = 0
    by_position = {}  # power of two -> [bits, tokens]
    for path in files:
        text = first_bytes(read_text(path), args.limit_bytes)
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            print(f"{path.name}: empty")
            continue
        started = time.perf_counter()
        bits = token_bits(model, [tokenizer.eos_token_id, *ids], args.segment, carry=not args.no_carry)
        seconds += time.perf_counter() - started
        num_bytes = len(text.encode())
        print(
            f"{path.name}: {bits.sum() / num_bytes:.4f} bits per byte, {num_bytes:,} bytes, {len(ids):,} tokens",
            flush=True,
        )
        total_bits, total_bytes, total_tokens = (
            total_bits + bits.sum().item(),
            total_bytes + num_bytes,
            total_tokens + len(ids),
        )
        positions = torch.arange(len(ids))
        if args.no_carry:
            positions %= args.segment
        powers = positions.clamp_min(1).double().log2().long()
        for power in powers.unique().tolist():
            entry = by_position.setdefault(power, [0.0, 0.0])
            entry[0] += bits[powers == power].sum().item()
            entry[1] += (powers == power).sum().item()
    if not total_bytes:
        raise SystemExit("All texts are empty.")
    print_by_position(by_position, args.segment, carry=not args.no_carry)
    print(
        f"total: {total_bits / total_bytes:.4f} bits per byte, {total_bits / total_tokens * math.log(2):.4f} nats per token, "
        f"{total_bytes:,} bytes, {total_tokens:,} tokens, {total_tokens / seconds:,.0f} tokens/s"
    )


if __name__ == "__main__":
    main()
