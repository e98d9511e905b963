"""The benchmark program: what it writes agrees with what it timed, and it refuses what it cannot measure."""

import json
import statistics
import sys
from pathlib import Path

import pytest
import torch
import transformers


EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TINY = "--layers 2 --hidden-size 32 --window 8 --eidetic-size 4 --vocab-size 64".split()


@pytest.fixture
def benchmark(monkeypatch):
    """The program as a module; limits of the process and the loudness of transformers stay as they are."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import benchmark

    monkeypatch.setattr(benchmark, "usable_memory", lambda: 0)
    verbosity = transformers.logging.get_verbosity()
    yield benchmark
    transformers.logging.set_verbosity(verbosity)
    for name in ("benchmark", "common"):
        sys.modules.pop(name, None)


@pytest.fixture
def sizes(benchmark):
    return benchmark.Sizes(layers=2, hidden_size=32, window=8, eidetic_size=4, vocab_size=64)


def test_results_agree_with_the_times(benchmark, sizes, tmp_path):
    arguments = "--entrants mistral bmojo --measures train prefill decode --lengths 16 32 --rounds 3 --output".split()
    benchmark.main([*TINY, *arguments, str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    records = {(r["measure"], r["entrant"], r["length"]): r for r in results["records"]}
    assert len(records) == 3 * 2 * 2
    for (measure, _, _), record in records.items():
        assert [len(turn) for turn in record["seconds"]] == [32 if measure == "decode" else 1] * 3
        assert all(seconds > 0 for turn in record["seconds"] for seconds in turn)

    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    for title, measure in (("Training step", "train"), ("Decoding", "decode")):
        ours, peer = ([statistics.median(t) for t in records[measure, e, 32]["seconds"]] for e in ("bmojo", "mistral"))
        ratio = statistics.median(a / b for a, b in zip(ours, peer, strict=True))
        section = table.split(f"### {title}: B'MOJO, SSD / peer")[1].split("###")[0]
        row = next(line for line in section.splitlines() if line.startswith("| Mistral |"))
        assert float(row.split("|")[-2]) == pytest.approx(ratio, abs=0.006)
    section = table.split("### Decoding: a token against one after 16")[1].split("###")[0]
    for name, label in (("bmojo", "B'MOJO, SSD"), ("mistral", "Mistral")):
        short, long = ([statistics.median(t) for t in records["decode", name, n]["seconds"]] for n in (16, 32))
        growth = statistics.median(b / a for a, b in zip(short, long, strict=True))
        row = next(line for line in section.splitlines() if line.startswith(f"| {label} |"))
        assert float(row.split("|")[-2]) == pytest.approx(growth, abs=0.006)
    for name in ("machine", "torch", "transformers", "date", "command"):
        assert results[name] in table
    for name in ("time.png", "memory.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")

    (cache,) = benchmark.prefill(benchmark.build("bmojo", sizes), benchmark.make_tokens(32, sizes, "cpu")).values()
    assert records["prefill", "bmojo", 32]["cache_bytes"] == cache.num_bytes()
    keys_and_values = 2 * 2 * 2 * (sizes.window - 1) * 8 * 4  # both, layers, heads, the window before a token, width
    for length in (16, 32):  # the sliding window is at work: one more number per layer, its size, is a tensor too
        assert records["prefill", "mistral", length]["cache_bytes"] - keys_and_values in range(40)


def test_every_entrant_trains_and_decodes(benchmark, sizes):
    for name, entrant in benchmark.ENTRANTS.items():
        model = benchmark.build(name, sizes)
        if entrant.has_mlp:
            assert benchmark.count_body(model) == pytest.approx(sizes.body, rel=0.02)
        benchmark.train_step(model, benchmark.make_tokens(16, sizes, "cpu"))
        tokens = benchmark.make_tokens(17, sizes, "cpu")
        cache = benchmark.prefill(model, tokens[:, :16])
        with torch.no_grad():
            step, whole = model(input_ids=tokens[:, 16:], use_cache=True, **cache).logits, model(tokens).logits
        assert torch.allclose(step[:, -1], whole[:, -1], atol=1e-4)


def test_bodies_are_of_equal_size(benchmark):
    for name in benchmark.ENTRANTS:
        rel = 0.06 if name.endswith("-wide") else 0.02  # of a width that is eight times another there is no nearer
        assert benchmark.count_body(benchmark.build(name, benchmark.Sizes())) == pytest.approx(1e7, rel=rel)


def test_a_call_beyond_the_limit_is_estimated(benchmark, sizes, tmp_path):
    options = benchmark.parse_options([*TINY, "--entrants", "bmojo", "mistral", "--output", str(tmp_path)])
    run = benchmark.Benchmark(options, sizes)
    run.known = {("train", "mistral"): {256: 1.0, 512: 4.0}, ("train", "bmojo"): {256: 1.0, 512: 1.9}}
    mine, theirs = ({"measure": "train", "entrant": name, "length": 8192} for name in ("bmojo", "mistral"))
    run.records = {("train", record["entrant"], 8192): record for record in (mine, theirs)}
    assert not run.skip(mine)
    assert run.skip(theirs)
    assert theirs["estimate"] == pytest.approx(4 * 16**2)
    mine["seconds"] = [[32.0]]
    report = benchmark.make_report(run.about, run.records)
    assert "| Mistral | > 300 s (est. 1,024 s) |" in report
    assert "| Mistral | ~0.03 (est.) |" in report
    peak = {"measure": "memory train", "entrant": "mistral", "length": 8192}
    assert run.skip(peak), "what takes too long to time takes too long to measure"
    assert peak["skipped"] == "> 300 s"


def test_peak_memory_is_measured_in_a_fresh_process(benchmark, sizes, tmp_path):
    options = benchmark.parse_options([*TINY, "--entrants", "mistral", "--output", str(tmp_path)])
    run = benchmark.Benchmark(options, sizes)
    record = {"measure": "memory train", "entrant": "mistral", "length": 4096}
    run.known["train", "mistral"] = {4096: 0.1}  # known to be short
    with benchmark.tqdm(disable=True) as run.progress:
        run.measure_peaks([record])
    logits = 4096 * sizes.vocab_size * 4
    assert logits < record["bytes"] < 2**31, "some activations, and not all the process"


def test_lack_of_memory_is_reported(benchmark, sizes, tmp_path, monkeypatch):
    arguments = ["--entrants", "bmojo", "mistral", "--measures", "prefill", "--output", str(tmp_path)]
    run = benchmark.Benchmark(benchmark.parse_options([*TINY, *arguments]), sizes)
    monkeypatch.setattr(run.models["mistral"], "forward", lambda **_: torch.empty(2**60, dtype=torch.uint8))
    records = [{"measure": "prefill", "entrant": name, "length": 16} for name in run.models]
    with benchmark.tqdm(disable=True) as run.progress:
        run.measure_times(records)
    assert "seconds" in records[0]
    assert records[1]["skipped"] == "out of memory"
    with pytest.raises(RuntimeError, match="another"):
        benchmark.explain(RuntimeError("another error"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--entrants", "gpt-7"], "--entrants has gpt-7; there are bmojo, "),
        (["--rounds", "0"], "--rounds is 0; it must be at least 1"),
        (["--hidden-size", "100"], "--hidden-size is 100; up to 256 it must be a multiple of 32"),
        (["--lengths", "1"], "--lengths has 1; a text needs 2 tokens"),
        (["--device", "mps"], "--device is mps; memory can be measured on cpu and cuda"),
        (["--measures", "beauty"], "invalid choice: 'beauty'"),
    ],
)
def test_bad_arguments_are_refused(benchmark, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("entrant", ["bmojo", "mistral"])
def test_profile_adds_up(benchmark, sizes, monkeypatch, capsys, entrant):
    """Shares of a case sum to the whole, or to more where the profiler's own cost exceeds what lies between operations."""
    import profile_model

    monkeypatch.setattr(profile_model, "Sizes", lambda: sizes)
    monkeypatch.setattr(sys, "argv", ["profile_model.py", "train:9", "prefill:9", "decode:9", "--entrant", entrant])
    profile_model.main()
    sys.modules.pop("profile_model")
    cases = capsys.readouterr().out.split(f"\n{entrant} ")[1:]
    assert [case.partition(": ")[0] for case in cases] == ["train:9", "prefill:9", "decode:9"]
    for case in cases:
        total = float(case.split(": ")[1].split(" ms")[0])
        floor = float(case.split("floor ")[1].split(" ms")[0])
        shares = [float(line.split()[-1].rstrip("%")) for line in case.strip().split("\n")[1:]]
        assert total > 0
        assert floor > 0
        assert sum(shares) > 99


def test_profile_refuses_what_it_cannot_read(benchmark, monkeypatch, capsys):
    import profile_model

    monkeypatch.setattr(sys, "argv", ["profile_model.py", "learn:9"])
    with pytest.raises(SystemExit):
        profile_model.main()
    sys.modules.pop("profile_model")
    assert "'learn:9' is no case" in capsys.readouterr().err
