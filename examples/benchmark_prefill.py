"""Time and memory of reading a long prompt: all at once, or in pieces through the cache as the model does by itself.

Command:

    python examples/benchmark_prefill.py --lengths 2048 8192 32768

Every figure comes from a process of its own, since a process never gives its peak memory back; the two ways take turns,
--rounds times, and the medians are printed.
"""

import argparse
import statistics
import subprocess
import sys
import time

import torch
from benchmark import high_water_mark
from benchmark_decode import read
from common import ROOT, check_numbers, load_model


def measure(name: str, length: int, piece: int, threads: int):
    """Print seconds and growth of the peak memory in MB of reading `length` tokens in pieces."""
    torch.set_num_threads(threads)
    model, _ = load_model(name)
    tokens = torch.randint(3, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(model.device)
    with torch.no_grad():
        read(model, tokens[:, :256])
        before, start = high_water_mark(), time.perf_counter()
        model.model.prefill_piece = piece
        read(model, tokens, length)
    seconds, after = time.perf_counter() - start, high_water_mark()
    print(seconds, (after - before) / 2**20)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT), help="folder or Hub id (default: this repository)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--piece", type=int, default=2048, help="tokens per piece (default 2048, the model's)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--measure", type=int, nargs=2, help=argparse.SUPPRESS)  # the process behind one figure
    arguments = parser.parse_args()
    check_numbers(parser, arguments, piece=1, rounds=1, threads=1)
    if min(arguments.lengths) < 1:
        parser.error(f"--lengths has {min(arguments.lengths)}; a prompt has at least 1 token.")
    if arguments.measure:
        measure(arguments.model, *arguments.measure, arguments.threads)
        return
    print(f"{'tokens':>8} {'at once':>20} {f'pieces of {arguments.piece}':>20}")
    for length in arguments.lengths:
        found = [(length, []), (arguments.piece, [])]
        for _ in range(arguments.rounds):
            for piece, figures in found:
                command = [sys.executable, __file__, "--model", arguments.model, "--threads", str(arguments.threads)]
                command += ["--measure", str(length), str(piece)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
                if done.returncode:  # it has said why
                    raise SystemExit(done.returncode)
                figures.append([float(figure) for figure in done.stdout.split()[-2:]])
        cells = []
        for _, figures in found:
            seconds, megabytes = (statistics.median(column) for column in zip(*figures, strict=True))
            cells.append(f"{seconds:.2f} s, {megabytes:.0f} MB")
        print(f"{length:>8} {cells[0]:>20} {cells[1]:>20}", flush=True)


if __name__ == "__main__":
    main()
