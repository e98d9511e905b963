"""The program that trains on books at one length and measures beyond it: what its figures mean."""

import argparse
import importlib.util
import itertools
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F


ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "examples"))

import books  # noqa: E402
import recall_report  # noqa: E402
from common import load_model, save_tokenizer  # noqa: E402
from pretrain import build_model, get_class_from_dynamic_module  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402


def test_all_models_have_as_many_parameters():
    config_class = get_class_from_dynamic_module("configuration_bmojo.BMojoConfig", str(ROOT))
    model_class = get_class_from_dynamic_module("modeling_bmojo.BMojoForCausalLM", str(ROOT))
    for name, (model, _) in books.MODELS.items():
        config = config_class(**json.loads(json.dumps(books.make_config(name, 4096, 1_300_000))))
        with torch.device("meta"):
            made = model_class(config)
        assert abs(sum(p.numel() for p in made.parameters()) - 1_300_000) < 0.002 * 1_300_000
        assert config.num_hidden_layers == books.LAYERS
        assert ("bmojo" in config.layers_block_type) == ("bmojo" in model)
        assert (config.eidetic_size == 0) == (model == "bmojo-f")


def test_pairs_and_how_long_ago_they_were():
    ids = np.array([5, 6, 7, 5, 6, 5, 6, 9], dtype=np.uint16)
    assert len(set(books.pair_keys(ids))) == 5  # (5, 6) occurs three times
    assert books.pair_keys(ids)[0] == books.pair_keys(ids)[3] != books.pair_keys(np.array([6, 5]))[0]
    assert books.distances(ids).tolist() == [0, 0, 0, 3, 0, 2, 0]


@pytest.fixture
def trained(tmp_path):
    """The folder of a tiny model with random weights, as pretrain.py leaves it, and a book."""
    tokenizer = AutoTokenizer.from_pretrained(str(ROOT), trust_remote_code=True)
    config_class = get_class_from_dynamic_module("configuration_bmojo.BMojoConfig", str(ROOT))
    config = config_class(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        sliding_window=8, eidetic_size=8, eidetic_chunk_size=8, mamba_head_dim=16, state_size=8,
    )  # fmt: skip
    torch.manual_seed(0)
    build_model(config).save_pretrained(tmp_path / "m" / "final")
    save_tokenizer(tokenizer, tmp_path / "m" / "final")
    (tmp_path / "m" / "log.jsonl").write_text(json.dumps({"step": 3, "tokens": 12, "seconds": 1.5, "loss": 1}) + "\n")
    words = ["one", "two", "three", "four", "five", "six", "seven"]
    rng = np.random.default_rng(0)
    (tmp_path / "book.txt").write_text(" ".join(rng.choice(words, 2000)))
    (tmp_path / "short.txt").write_text("too short")
    return tmp_path


def test_what_is_measured(trained):
    args = argparse.Namespace(length=1024, seq_len=256, max_books=5)
    text = [trained / "book.txt", trained / "short.txt"]
    model, tokenizer = load_model(str(trained / "m" / "final"))
    everything = books.measure(model, tokenizer, "m", text, np.array([], dtype=np.int64), args)
    assert everything["books"] == ["book.txt"]
    assert everything["reach"] == 16
    assert books.training_of(trained / "m" / "final") == {"tokens": 12, "training_seconds": 1.5}
    assert list(everything["positions"]) == ["0-256", "256-512", "512-1024"]
    total = sum(
        (high - low) * values[0]
        for (low, high), values in zip(
            ((0, 256), (256, 512), (512, 1024)), everything["positions"].values(), strict=True
        )
    )
    counts = [values[0][1] for values in everything["rare"].values()]
    assert sum(counts) == 1024
    assert sum(values[0][0] for values in everything["rare"].values()) == pytest.approx(total)
    assert total / 1024 == pytest.approx(math.log(4096), rel=0.2)  # it knows nothing
    ids = tokenizer(text[0].read_text())["input_ids"][:1024]
    nothing = books.measure(model, tokenizer, "m", text, np.unique(books.pair_keys(np.array([0, *ids]))), args)
    left = sum(values[0][1] for values in nothing["rare"].values())
    assert left <= 1  # the pair of the end-of-text token with the first word
    table = books.summarise({"m": [everything]})
    assert f"| {everything['positions']['256-512'][0]:.3f} |" in table
    worse = everything | {"positions": {name: [values[0] + 0.1] for name, values in everything["positions"].items()}}
    table = books.summarise({"m": [everything, worse]})
    loss = everything["positions"]["256-512"][0]
    assert f"| {loss + 0.05:.3f} [{loss:.3f}, {loss + 0.1:.3f}] |" in table
    assert books.summarise_afresh({"m": [everything | {"afresh": {}}], "n": [{}]}) == ""
    books.plot({"m": [everything, worse], "n": [nothing]}, 256, trained / "books.png")
    assert (trained / "books.png").stat().st_size > 10_000


def test_the_same_tokens_are_read_with_a_shorter_past(trained):
    """Against forward calls without cache: of every 256 tokens the second half, from all before them and from those 256 alone."""
    args = argparse.Namespace(length=1024, seq_len=256, max_books=5)
    model, tokenizer = load_model(str(trained / "m" / "final"))
    found = books.measure(model, tokenizer, "m", [trained / "book.txt"], np.array([], dtype=np.int64), args)
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer((trained / "book.txt").read_text())["input_ids"][:1024]]])
    with torch.no_grad():
        whole = F.cross_entropy(model(ids[:, :-1], use_cache=False).logits[0], ids[0, 1:], reduction="none")
        parts = [model(part, use_cache=False).logits[0] for part in ids[:, :-1].split(256, 1)]
        afresh = F.cross_entropy(torch.cat(parts), ids[0, 1:], reduction="none")
    assert list(found["afresh"]) == ["256-512", "512-1024"]
    for name, places in (("256-512", [*range(384, 512)]), ("512-1024", [*range(640, 768), *range(896, 1024)])):
        want = [whole[places].mean().item(), afresh[places].mean().item()]
        assert found["afresh"][name] == [pytest.approx(want, abs=1e-4)]
        assert abs(want[0] - want[1]) > 1e-3
    (all_, one), *_ = found["afresh"]["256-512"]
    assert f"| m | {all_:.3f} / {one:.3f} |" in books.summarise_afresh({"m": [found]})


def test_rates_are_chosen_by_the_first_seed_and_nothing_is_trained_twice(tmp_path, monkeypatch, capsys):
    made = []
    losses = {("bmojo", 0.1): 2.0, ("bmojo", 0.2): 1.0, ("sliding", 0.1): 3.0, ("sliding", 0.2): 4.0}

    def train(name, rate, seed, tokens, vocab_size, args):
        assert tokens.stat().st_size > 3 * 2  # of the three words
        made.append((name, rate, seed))
        folder = tmp_path / f"{name}-lr{rate}-seed{seed}" / "final"
        folder.mkdir(parents=True)
        (folder.parent / "log.jsonl").write_text('{"tokens": 12, "seconds": 1.5}\n')
        return folder

    def measure(model, tokenizer, title, *others):
        name, rate, seed = title.split(", ")
        near = losses[name, float(rate.split()[1])] + int(seed.split()[1])
        positions = {"0-256": [near, near + 2], "256-512": [near], "512-1024": [-10 * near]}
        rare = {key: [[near, 1]] for key in ("first", "within", "beyond")}
        return {"positions": positions, "rare": rare, "edges": [0, 256, 512, 1024]}

    monkeypatch.setattr(books, "train", train)
    monkeypatch.setattr(books, "measure", measure)
    monkeypatch.setattr(books, "load_model", lambda folder: (None, None))
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "book.txt").write_text("one two three")
    args = argparse.Namespace(
        data=str(tmp_path), output=str(tmp_path), models=["bmojo", "sliding"], seeds=[0], seq_len=512, learning_rates=[0.1, 0.2]
    )  # fmt: skip
    books.compare_models([], args)
    args.seeds = [0, 1]
    results = books.compare_models([], args)
    grid = [(name, rate, 0) for name in args.models for rate in args.learning_rates]
    assert made == [*grid, ("bmojo", 0.2, 1), ("sliding", 0.1, 1)]  # by the loss up to 512, not by the one beyond
    assert results == books.compare_models([], args)
    assert len(made) == 6
    rates = json.loads((tmp_path / "rates.json").read_text())
    assert rates == {"bmojo": {"0.1": 2.5, "0.2": 1.5}, "sliding": {"0.1": 3.5, "0.2": 4.5}}
    assert [found["learning_rate"] for found in results["sliding"]] == [0.1, 0.1]
    assert [found["positions"]["256-512"] for found in results["bmojo"]] == [[1.0], [2.0]]
    assert results["bmojo"][1]["tokens"] == 12
    shown = capsys.readouterr().out
    assert "1.500 [1.000, 2.000]" in shown
    assert "bmojo, up to 512 tokens: 2.500 at 0.1, 1.500 at 0.2" in shown


def run_books(monkeypatch, folder, *options):
    given = ["--data", str(folder), "--output", str(folder / "out"), "--max-books", "1", "--seq-len", "128", *options]
    monkeypatch.setattr(sys, "argv", ["books.py", *given])
    books.main()
    return json.loads((folder / "out" / "books.json").read_text())


@pytest.fixture
def parts(trained):
    for part in ("train", "validation"):
        (trained / part).mkdir()
        (trained / part / "book.txt").write_text((trained / "book.txt").read_text())
    return trained


def test_results_of_other_options_are_not_taken_for_these(parts, monkeypatch):
    final, length = str(parts / "m" / "final"), ("--length", "512")
    one = run_books(monkeypatch, parts, "--trained", final, *length, "--choices", "none")
    both = run_books(monkeypatch, parts, "--trained", final, *length, "--choices", "recent")
    assert list(both) == ["none", "recent"]
    assert both["none"] == one["none"]
    with pytest.raises(SystemExit, match="holds results with length 512: choose another --output"):
        run_books(monkeypatch, parts, "--trained", final, "--length", "256", "--choices", "none")
    with pytest.raises(SystemExit, match=r"holds results with trained .*m/final: choose another --output"):
        run_books(monkeypatch, parts, *length)


def test_books_that_are_too_short_are_refused_before_anything_is_trained(parts, monkeypatch):
    for options in (("--trained", str(parts / "m" / "final"), "--choices", "none"), ("--models", "bmojo")):
        with pytest.raises(SystemExit, match="None of the 1 books has 32768 tokens: lower --length"):
            run_books(monkeypatch, parts, *options)
    assert not list((parts / "out").iterdir())


def test_a_training_that_was_interrupted_goes_on(parts, monkeypatch):
    """What an interrupted training leaves as its model is not measured."""
    commands = []

    class Training:
        returncode = 0

        def __init__(self, command):
            commands.append(command)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def wait(self):
            folder = Path(commands[-1][commands[-1].index("--output") + 1])
            shutil.copytree(parts / "m" / "final", folder / "final", dirs_exist_ok=True)
            tokens = 2 * 128 * (1 if len(commands) == 1 else 2)
            (folder / "log.jsonl").write_text(json.dumps({"tokens": tokens, "seconds": 1}) + "\n")

    monkeypatch.setattr(books.subprocess, "Popen", Training)
    options = ("--models", "bmojo", "--steps", "2", "--batch-size", "2", "--learning-rates", "1e-3", "--length", "512")
    with pytest.raises(SystemExit, match=r"bmojo-lr0.001-seed0 did not reach its end"):
        run_books(monkeypatch, parts, *options)
    found = run_books(monkeypatch, parts, *options)
    assert [command.count("--resume") for command in commands] == [1, 1]
    assert found["bmojo"][0]["tokens"] == 512
    assert found == run_books(monkeypatch, parts, *options)
    assert len(commands) == 2


def test_choices_of_a_trained_model(trained, capsys):
    """The same weights read with their own memory, with what other choices put into it, and without one."""
    for part in ("train", "validation"):
        (trained / part).mkdir()
        (trained / part / "book.txt").write_text(
            (trained / "book.txt").read_text()[: 9000 if part == "train" else None]
        )
    args = argparse.Namespace(
        data=str(trained), output=str(trained / "out"), trained=str(trained / "m" / "final"), length=1024, seq_len=256, max_books=5,
        choices=["innovation", "random", "recent", "oldest", "none", "half-life=50"],
    )  # fmt: skip
    (trained / "out").mkdir()
    text = [trained / "validation" / "book.txt"]
    results = books.compare_choices(text, args)
    assert list(results) == ["innovation", "random", "recent", "oldest", "none", "half-life=50"]
    losses = {name: result["positions"]["512-1024"][0] for name, (result,) in results.items()}
    assert len(set(losses.values())) == 6  # every choice is another memory
    model, tokenizer = load_model(args.trained)
    common = books.common_pairs(next((trained / "out").glob("tokens-*.uint16")))
    assert books.measure(model, tokenizer, "m", text, common, args) == results["innovation"][0]
    capsys.readouterr()
    args.max_books = 0  # nothing is measured again
    assert books.compare_choices(text, args) == results
    books.plot(results, None, trained / "choices.png")
    assert "| none |" in capsys.readouterr().out


def test_a_model_without_memory_has_no_choices(trained):
    config = trained / "m" / "final" / "config.json"
    args = argparse.Namespace(trained=str(trained / "m" / "final"), output="", data="", choices=["none"])
    for fields in ({"eidetic_size": 0}, {"layers_block_type": ["bmojo_f"]}):
        config.write_text(json.dumps(json.loads(config.read_text()) | fields))
        with pytest.raises(SystemExit, match="no eidetic memory"):
            books.compare_choices([], args)


def test_the_report_takes_the_rate_that_the_seeds_ran_with(tmp_path, capsys, monkeypatch):
    def write(row, rate, seed, accuracy):
        result = {
            "run": {"lr": rate, "seed": seed}, "parameters": 10, "memory_floats": 20, "tokens": 3e6, "cpu_seconds": 60,
            "chance": 0.1, "tests": {"64": {"accuracy": accuracy}, "512": {"accuracy": accuracy / 2, "beyond": 0.25}},
        }  # fmt: skip
        (tmp_path / row).mkdir(exist_ok=True)
        (tmp_path / row / f"lr{rate:g}-seed{seed}.json").write_text(json.dumps(result))

    write("a", 0.1, 0, 0.9)
    for seed, accuracy in enumerate((0.5, 0.6, 0.7)):
        write("a", 0.2, seed, accuracy)
    write("b", 0.1, 0, 0.3)
    write("b", 0.2, 0, 0.4)
    monkeypatch.setattr(sys, "argv", ["recall_report.py", str(tmp_path), "--plot", str(tmp_path / "plot.png")])
    recall_report.main()
    lines = capsys.readouterr().out.splitlines()
    assert "**0.600** [0.500, 0.700]" in lines[2]
    assert "**0.300** [0.250, 0.350]" in lines[2]
    assert "0.2" in lines[2]
    assert "0.400" in lines[3]
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    short = json.loads((tmp_path / "b" / "lr0.1-seed0.json").read_text())
    del short["tests"]["512"]
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "lr0.1-seed0.json").write_text(json.dumps(short))
    recall_report.main()  # what only some rows were tested at is left out
    assert "512" not in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["recall_report.py", str(tmp_path / "a")])
    with pytest.raises(SystemExit, match="holds no results"):
        recall_report.main()


@pytest.mark.parametrize("against", ["memory", "task"])
def test_the_report_draws_suites_of_many_models(against, tmp_path, capsys, monkeypatch):
    for number, (task, size, model, seed) in enumerate(
        itertools.product(("recall", "copying"), (64, 128), ("bmojo", "attention"), (0, 1))
    ):
        result = {
            "run": {"task": task, "hidden_size": size, "model": model, "lr": 0.1, "seed": seed}, "parameters": 1000 * size,
            "memory_floats": 20 * size, "tokens": 3e6, "cpu_seconds": 60, "chance": 0.1,
            "tests": {"64" if against == "memory" or task == "recall" else "256": {"accuracy": number / 20}},
        }  # fmt: skip
        row = tmp_path / "suite" / f"{task}-{size}-{model}"
        row.mkdir(exist_ok=True, parents=True)
        (row / f"lr0.1-seed{seed}.json").write_text(json.dumps(result))
    target = tmp_path / "plot.png"
    arguments = ["recall_report.py", str(tmp_path / "suite"), "--plot", str(target), "--against", against]
    monkeypatch.setattr(sys, "argv", arguments)
    recall_report.main()
    lines = capsys.readouterr().out.splitlines()
    if importlib.util.find_spec("matplotlib"):
        assert target.stat().st_size > 10_000
    if against == "memory":
        assert len(lines) == 2 + 8
    else:
        assert lines[0] == "| model | hidden size | parameters | copying, rate | recall, rate |"
        assert lines[2] == (
            "| attention | 64 | 64,000 | **0.525** [0.500, 0.550], 0.1 | **0.125** [0.100, 0.150], 0.1 |"
        )
        assert len(lines) == 2 + 4
