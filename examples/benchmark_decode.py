"""Time and cache size of decoding at growing context: both stay what they were after the first 2 * sliding_window tokens.

Command:

    python examples/benchmark_decode.py

reads 1, 10 and 100 times 2 * sliding_window tokens of noise in segments through the cache, then decodes --tokens tokens
at each length and prints the median time per token, the bytes of the cache and the bytes that the formula in
`BMojoCache` gives. All lengths are measured in turn, --rounds times, so that a machine that slows down slows all alike.
"""

import argparse
import copy
import statistics
import sys
import time

import torch
from common import ROOT, check_numbers, load_model


def read(model, tokens: torch.Tensor, segment: int = 1024):
    """Read tokens (1, length) in segments and return the cache."""
    cache = None
    for piece in tokens.split(segment, dim=1):
        cache = model.base_model(piece, cache=cache, use_cache=True, outputs_to_keep=0).cache
    return cache


def decode(model, cache, count: int) -> list[float]:
    """Seconds of each of `count` greedy steps."""
    token, seconds = torch.zeros(1, 1, dtype=torch.int64, device=model.device), []
    for _ in range(count):
        start = time.perf_counter()
        token = model(token, cache=cache).logits[:, -1:].argmax(-1)
        seconds.append(time.perf_counter() - start)
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT), help="folder or Hub id (default: this repository)")
    parser.add_argument("--multiples", type=int, nargs="+", default=[1, 10, 100], help="of 2 * sliding_window tokens")
    parser.add_argument("--tokens", type=int, default=128, help="decoded at each length and round (default 128)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    arguments = parser.parse_args()
    check_numbers(parser, arguments, tokens=1, rounds=1, threads=1)
    if min(arguments.multiples) < 1:
        parser.error(f"--multiples has {min(arguments.multiples)}; it must be at least 1.")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model, _ = load_model(arguments.model)
    cache_bytes = sys.modules[type(model).__module__].cache_bytes
    window = 2 * model.config.sliding_window
    longest = torch.randint(3, model.config.vocab_size, (1, window * max(arguments.multiples)), device=model.device)
    with torch.no_grad():
        caches = {n: read(model, longest[:, : window * n]) for n in arguments.multiples}
        seconds = {n: [] for n in caches}
        for _ in range(arguments.rounds):
            for n, cache in caches.items():
                seconds[n] += decode(model, copy.deepcopy(cache), arguments.tokens)
    base = statistics.median(seconds[arguments.multiples[0]])
    print(f"{'tokens read':>12} {'ms per token':>13} {'ratio':>6} {'cache bytes':>12} {'formula':>12}")
    for n, cache in caches.items():
        median, formula = statistics.median(seconds[n]), cache_bytes(model.config, 1, model.dtype, cache.seen_tokens)
        print(f"{window * n:>12} {median * 1000:>13.2f} {median / base:>6.2f} {cache.num_bytes():>12} {formula:>12}")


if __name__ == "__main__":
    main()
