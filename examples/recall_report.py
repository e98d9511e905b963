r"""Tables and plots of the results that recall.py has kept.

    python examples/recall_report.py runs/recall/eight --plot assets/recall/eight.png
    python examples/recall_report.py runs/recall/memory --plot assets/recall/memory.png --against memory
    python examples/recall_report.py runs/recall/mad --plot assets/recall/mad.png --against task

One line per row of the suite, at the learning rate that won its grid: mean over seeds, lowest and highest in brackets; at the
lengths that all of them were tested at.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np


def read_rows(folder: Path) -> dict[str, list[dict]]:
    """Row name to its results at the chosen learning rate, one per seed.

    The chosen rate is the one that most seeds were run with; where a single seed is there, the most accurate one over all lengths.
    """
    rows = {}
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        by_rate = {}
        for path in sorted(place.glob("*.json")):
            result = json.loads(path.read_text(encoding="utf-8"))
            by_rate.setdefault(result["run"]["lr"], []).append(result)
        if by_rate:
            rows[place.name] = max(by_rate.values(), key=lambda found: (len(found), np.mean(accuracies(found))))
    return rows


def accuracies(results: list[dict], key: str = "accuracy") -> list[list[float]]:
    """For every length tested the seeds' accuracies; NaN where a length has no such question."""
    lengths = results[0]["tests"]
    return [[result["tests"][length].get(key, float("nan")) for result in results] for length in lengths]


def spread(values: list[float]) -> str:
    """Mean and range of the seeds."""
    if np.isnan(values).all():
        return ""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"**{np.mean(values):.3f}** [{min(values):.3f}, {max(values):.3f}]"


def keep_common_lengths(rows: dict[str, list[dict]]):
    """Drop the tests at lengths that not all rows were tested at."""
    common = set.intersection(*(set(result["tests"]) for results in rows.values() for result in results))
    for results in rows.values():
        for result in results:
            result["tests"] = {length: test for length, test in result["tests"].items() if length in common}


def table(rows: dict[str, list[dict]]) -> str:
    """Markdown."""
    lengths = list(next(iter(rows.values()))[0]["tests"])
    head = ["model", "parameters", "floats of memory", "tokens", "CPU s", "rate"]
    for length in lengths:
        head += [f"{length} tokens", "beyond reach", "held"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name, results in rows.items():
        first = results[0]
        cells = [name, f"{first['parameters']:,}", f"{first['memory_floats']:,}", f"{first['tokens'] / 1e6:.1f}M"]
        cells += [f"{np.mean([result['cpu_seconds'] for result in results]):.0f}", f"{first['run']['lr']:g}"]
        for place in range(len(lengths)):
            for key in ("accuracy", "beyond", "held"):
                cells.append(spread(accuracies(results, key)[place]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table_tasks(rows: dict[str, list[dict]]) -> str:
    """Markdown for suites with several tasks: a line for every model and hidden size, a column for every task."""
    tasks, lines = [], {}
    for results in rows.values():
        run, first = results[0]["run"], results[0]
        if run["task"] not in tasks:
            tasks.append(run["task"])
        shown = spread(accuracies(results)[-1]) + f", {run['lr']:g}"
        lines.setdefault((run["hidden_size"], run["model"]), {})[run["task"]] = shown, first["parameters"]
    head = ["model", "hidden size", "parameters", *(f"{task}, rate" for task in tasks)]
    text = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for (size, model), cells in sorted(lines.items()):
        parameters = max(count for _, count in cells.values())  # vocabularies differ
        shown = [cells[task][0] if task in cells else "" for task in tasks]
        text.append("| " + " | ".join([model, str(size), f"{parameters:,}", *shown]) + " |")
    return "\n".join(text)


def plot(rows: dict[str, list[dict]], target: Path, title: str):
    """Accuracy against test length where several were tested, else a dot for every seed; against memory beside it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    longest = len(next(iter(rows.values()))[0]["tests"])
    for number, (name, results) in enumerate(rows.items()):
        lengths, values = [int(length) for length in results[0]["tests"]], np.array(accuracies(results))
        if longest > 1:
            (line,) = left.plot(lengths, values.mean(1), marker="o", ms=4, label=name)
            left.fill_between(lengths, values.min(1), values.max(1), alpha=0.15, color=line.get_color())
        else:
            left.plot([number] * values.shape[1], values[0], "o", ms=5, label=name)
        memory = results[0]["memory_floats"]
        right.plot([memory] * values.shape[1], values[-1], "o", ms=5, alpha=0.8, label=name)
    chance = next(iter(rows.values()))[0]["chance"]
    left.axhline(chance, color="grey", ls=":", lw=1)
    if longest > 1:
        left.set(xscale="log", xlabel="tokens in the test")
    else:
        left.set_xticks(range(len(rows)), list(rows), rotation=25, ha="right")
    right.set(xscale="log", xlabel="floats of memory", ylabel="accuracy at the longest test")
    left.set(ylabel="accuracy", title=title)
    right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    for axes in (left, right):
        axes.set_ylim(-0.03, 1.03)
        axes.grid(alpha=0.3)
    save_figure(figure, target)


def draw_spread(axes, at: list[float], values: list[list[float]], label: str, **style):
    """A line through the means of the seeds, a bar from the lowest to the highest of them."""
    means = np.array([np.mean(seeds) for seeds in values])
    ends = np.abs(np.array([[np.min(seeds), np.max(seeds)] for seeds in values]).T - means)
    axes.errorbar(at, means, yerr=ends, marker="o", ms=4, lw=1.2, elinewidth=0.8, capsize=2, label=label, **style)


def plot_memory(rows: dict[str, list[dict]], target: Path, title: str):
    """Accuracy at the longest test against floats of memory, a line for every kind of model."""
    from matplotlib.figure import Figure

    kinds = {}
    for results in rows.values():
        point = results[0]["memory_floats"], accuracies(results)[-1]
        kinds.setdefault(results[0]["run"]["model"], []).append(point)
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    for kind, points in kinds.items():
        draw_spread(axes, *zip(*sorted(points), strict=True), label=kind)
    axes.axhline(next(iter(rows.values()))[0]["chance"], color="grey", ls=":", lw=1)
    axes.set(xscale="log", xlabel="floats of memory", ylabel="accuracy", ylim=(-0.03, 1.03), title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, target)


def plot_tasks(rows: dict[str, list[dict]], target: Path, title: str):
    """A panel for every task: accuracy of every kind of model, a line for every hidden size."""
    from matplotlib.figure import Figure

    tasks = {}
    for results in rows.values():
        run = results[0]["run"]
        tasks.setdefault(run["task"], {}).setdefault(run["hidden_size"], {})[run["model"]] = results
    figure = Figure(figsize=(3.2 * len(tasks) + 1, 4.2), layout="constrained")
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    names = sorted({name for sizes in tasks.values() for models in sizes.values() for name in models})
    all_sizes = sorted({size for sizes in tasks.values() for size in sizes})
    for axes, (task, sizes) in zip(panels, tasks.items(), strict=True):
        for size, models in sorted(sizes.items()):
            number = all_sizes.index(size)
            at = [names.index(name) + 0.12 * number for name in models]
            values = [accuracies(results)[-1] for results in models.values()]
            draw_spread(axes, at, values, f"hidden size {size}", ls="", color=f"C{number}")
        chance = next(iter(next(iter(sizes.values())).values()))[0]["chance"]
        axes.axhline(chance, color="grey", ls=":", lw=1)
        axes.set_xticks(range(len(names)), names, rotation=35, ha="right")
        axes.set(title=task, ylim=(-0.03, 1.03))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy")
    entries = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries, fontsize=8, loc="outside lower center", ncols=len(entries))
    figure.suptitle(title)
    save_figure(figure, target)


def save_figure(figure, target: Path):
    """PNG, its folder made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)


PLOTS = {"length": plot, "memory": plot_memory, "task": plot_tasks}


def main():
    """Print the table, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a suite's results")
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    parser.add_argument("--against", choices=PLOTS, default="length", help="what the plot shows the accuracy against")
    parser.add_argument("--title", default="")
    args = parser.parse_args()
    if not args.folder.is_dir():
        raise SystemExit(f"There is no folder {args.folder}; recall.py --suite makes one.")
    rows = read_rows(args.folder)
    if not rows:
        raise SystemExit(f"{args.folder} holds no results.")
    if args.against == "task":  # tasks have their own lengths
        print(table_tasks(rows))
    else:
        keep_common_lengths(rows)
        print(table(rows))
    if args.plot:
        try:
            PLOTS[args.against](rows, args.plot, args.title or args.folder.name)
        except ImportError:
            print("No plot: it needs matplotlib (pip install matplotlib).", file=sys.stderr)


if __name__ == "__main__":
    main()
