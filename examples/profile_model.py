"""Where the time of a model goes on a CPU, and how much of it no formulation could save.

Commands:

    python examples/profile_model.py train:2048 prefill:2048 decode:2048
    python examples/profile_model.py prefill:8192 --entrant mistral

The models are those of `benchmark.py`. torch.profiler sums the time inside operations by kind; what a step takes without
the profiler beyond that sum is Python and the dispatch of operations ("between"). The floor is what the projections alone
need: their multiplications at the rate of the fastest matrix product found here, or for decoding all weights and the
cache read once at the rate of the fastest matrix-vector product.
"""

import argparse
import statistics
import time

import torch
from benchmark import ENTRANTS, Sizes, build, count_body, make_tokens, prefill, train_step
from common import check_numbers
from torch.profiler import ProfilerActivity, profile


KINDS = {  # by the names of operations, the first that fits
    "projections": ("aten::mm", "aten::addmm"),
    "attention": ("scaled_dot_product",),
    "other products": ("aten::bmm", "aten::baddbmm", "aten::mv"),
    "copies": ("copy_", "cat", "fill_", "zero_", "index", "scatter", "gather"),
    "loss": ("log_softmax", "nll_loss"),
    "elementwise": ("aten::",),
}
DECODED = 32  # tokens


def kind_of(operation: str) -> str | None:
    """None for Python functions, which the profiler slows down."""
    return next((kind for kind, marks in KINDS.items() if any(mark in operation for mark in marks)), None)


def make_call(measure: str, model, tokens: torch.Tensor):
    """What to time, and into how many steps its time is divided."""
    if measure == "train":
        model.train()
        return (lambda: train_step(model, tokens)), 1
    model.eval()
    if measure == "prefill":
        return (lambda: prefill(model, tokens)), 1
    state = prefill(model, tokens)

    @torch.no_grad()
    def decode():
        for _ in range(DECODED):
            model(tokens[:, :1], use_cache=True, **state)  # every cache is updated in place

    return decode, DECODED


def best(call, repeats: int = 20) -> float:
    """Least seconds of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def floor(measure: str, model, length: int) -> float:
    """Seconds that the projections alone need: see above."""
    size = model.config.hidden_size
    body = count_body(model)
    if measure == "decode":
        weights = [torch.randn(4 * size, size) for _ in range(round(body / 4 / size**2))]  # as large as the body: cold
        x = torch.randn(1, size)
        return (
            best(lambda: [torch.mm(x, weight.T) for weight in weights])
            / sum(map(torch.numel, weights))
            * (body + model.config.vocab_size * size)
        )
    x, weight = torch.randn(length, size), torch.randn(size, 1280)
    rate = 2 * length * weight.numel() / best(lambda: x @ weight)
    head = model.config.vocab_size * size
    tokens = 6 * length * (body + head) if measure == "train" else 2 * (length * body + head)
    return tokens / rate


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", help="train, prefill or decode, a colon, and a length in tokens")
    parser.add_argument("--entrant", default="bmojo", choices=ENTRANTS, help="default bmojo")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    check_numbers(parser, options, rounds=1, threads=1)
    torch.set_num_threads(options.threads)
    for case in options.cases:
        measure, _, length = case.partition(":")
        if measure not in ("train", "prefill", "decode") or not length.isdigit() or int(length) < 1:
            parser.error(f"{case!r} is no case; write for example train:2048, prefill:8192 or decode:2048.")
    sizes = Sizes()
    model = build(options.entrant, sizes)
    for case in options.cases:
        measure, _, length = case.partition(":")
        call, steps = make_call(measure, model, make_tokens(int(length), sizes, "cpu"))
        call()
        seconds = statistics.median(best(call, 1) for _ in range(options.rounds)) / steps
        with profile(activities=[ProfilerActivity.CPU]) as record:
            call()
        parts = dict.fromkeys(KINDS, 0.0)
        for row in record.key_averages():
            if kind := kind_of(row.key):
                parts[kind] += row.self_cpu_time_total / 1e6 / steps
        parts["between"] = max(0.0, seconds - sum(parts.values()))
        print(
            f"\n{options.entrant} {case}: {seconds * 1e3:.4g} ms; floor {floor(measure, model, int(length)) * 1e3:.4g} ms"
        )
        for kind, time_ in sorted(parts.items(), key=lambda item: -item[1]):
            if time_:
                print(f"    {kind:16} {time_ * 1e3:9.4g} ms {time_ / seconds:6.1%}")


if __name__ == "__main__":
    main()
