"""The recall tasks against their definitions, solved by readers of the prompt; and the program around them, in small."""

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch


ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "examples"))

import recall  # noqa: E402
import recall_variations  # noqa: E402
from recall_tasks import DEFAULTS, IGNORED, MAD_VARIATIONS, TASKS, choose, make_task  # noqa: E402


def draw(name, examples=32, training=False, seed=0, **fields):
    task = make_task(name, **fields)
    return task, task.sample(np.random.default_rng(seed), examples, training)


@pytest.mark.parametrize("filler", ["random", "repeated", "noise"])
@pytest.mark.parametrize(("length", "pairs", "lead"), [(64, 8, 0), (128, 16, 16), (40, 3, 4), (32, 8, 0)])
def test_mqar_is_answered_by_looking_up_the_pairs(filler, length, pairs, lead):
    task, (ids, labels, scored, evidence) = draw("mqar", filler=filler, length=length, pairs=pairs, lead=lead)
    for row in range(len(ids)):
        keys, values = ids[row, lead : lead + 2 * pairs : 2], ids[row, lead + 1 : lead + 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert (keys > 0).all()
        assert (keys < 64).all()
        assert (values >= 64).all()
        assert (values < 128).all()
        told = dict(zip(keys.tolist(), values.tolist(), strict=True))
        asked = np.flatnonzero(scored[row])
        assert sorted(ids[row, asked]) == sorted(keys)  # every key once
        assert (asked >= lead + 2 * pairs).all()
        assert ((asked - lead) % 2 == 0).all()
        assert [told[key] for key in ids[row, asked].tolist()] == labels[row, asked].tolist()
        assert np.array_equal(ids[row, evidence[row, asked]], labels[row, asked])
        rest = np.ones(length, dtype=bool)
        rest[lead : lead + 2 * pairs], rest[asked] = False, False
        low, high = {"random": (0, 128), "repeated": (0, 1), "noise": (128, 144)}[filler]
        assert (low <= ids[row, rest]).all()
        assert (ids[row, rest] < high).all()
    assert np.array_equal(scored, labels != IGNORED)
    assert ids.max() < task.num_tokens


def test_gaps_of_mqar_follow_the_power_law():
    _, (_, _, scored, _) = draw("mqar", examples=20000, length=24, pairs=1)
    found = np.bincount((np.nonzero(scored)[1] - 2) // 2, minlength=11) / 20000
    law = np.arange(1, 12) ** (0.01 - 1)
    assert np.abs(found - law / law.sum()).max() < 0.015  # 4 standard errors of the largest share


def test_draws_without_replacement_go_by_what_is_left():
    weights = np.array([5.0, 3.0, 1.0, 1.0])
    found = choose(np.random.default_rng(0), 40000, weights, 2)
    assert (found[:, 0] != found[:, 1]).all()
    first = weights / weights.sum()
    inside = [first[i] + sum(first[j] * weights[i] / (10 - weights[j]) for j in range(4) if j != i) for i in range(4)]
    assert np.abs(np.bincount(found.ravel(), minlength=4) / 40000 - inside).max() < 0.01


@pytest.mark.parametrize("fields", [{}, {"vocab_size": 64}, {"length": 256}])
@pytest.mark.parametrize("name", ["in-context-recall", "noisy-recall"])
def test_recall_in_context_is_answered_by_the_last_pair_with_the_key(name, fields):
    fields = {key: value + 16 * (key == "vocab_size" and name == "noisy-recall") for key, value in fields.items()}
    task, (ids, labels, scored, evidence) = draw(name, **fields)
    _, trained = draw(name, training=True, **fields)
    assert np.array_equal(trained.ids, ids)
    assert np.array_equal(trained.labels[:, :-1], ids[:, 1:])
    known = (task.vocab_size - task.noise_vocab_size) // 2
    assert ids.shape == (32, task.length - 1)
    for row in range(len(ids)):
        seen = {}
        for place in range(0, ids.shape[1], 2):
            key = int(ids[row, place])
            assert scored[row, place] == (key in seen)
            if key in seen:
                assert labels[row, place] == seen[key] == ids[row, evidence[row, place]]
            if key < known and place + 1 < ids.shape[1]:
                assert seen.setdefault(key, int(ids[row, place + 1])) == ids[row, place + 1]
        assert scored[row, -1]  # the last question has an answer
    share = (ids[:, :-1:2] >= 2 * known).mean()
    assert abs(share - task.noise) < 0.05


def test_fuzzy_recall_asks_for_motifs_that_were_shown():
    task, (ids, labels, scored, evidence) = draw("fuzzy-recall", examples=64)
    rows, places = np.nonzero(scored)
    assert set(rows) == set(range(64))
    assert np.array_equal(ids[rows, evidence[rows, places]], labels[rows, places])
    assert (labels[scored] >= (task.vocab_size - 1) // 2).all()
    for row in range(64):  # the longest key stands before the first token of a value, there and here
        for place in np.flatnonzero(scored[row] & ~np.roll(scored[row], 1)):
            start = evidence[row, place]
            assert np.array_equal(ids[row, start - 3 : start], ids[row, place - 2 : place + 1])
    assert (ids == task.vocab_size - 1).sum(1).max() < task.length // 3  # padding, at the front


def test_selective_copying_is_answered_by_what_is_no_blank():
    task, (ids, labels, scored, evidence) = draw("selective-copying")
    for row in range(len(ids)):
        before = ids[row, : task.length - task.copied - 1]
        assert np.array_equal(before[before != 14], labels[row, scored[row]])
        assert ids[row, len(before)] == 15
        assert (ids[row, len(before) + 1 :] == 14).all()
        assert np.array_equal(ids[row, evidence[row, scored[row]]], labels[row, scored[row]])


def test_compression_and_memorization():
    task, (ids, labels, scored, _) = draw("compression")
    assert np.array_equal(ids, labels)
    assert scored.all()
    assert (ids[:, -1] == 15).all()
    assert (ids[:, :-1] < 15).all()
    task, (ids, labels, scored, _) = draw("memorization")
    _, other = draw("memorization", seed=1)
    facts = {}
    for batch in (ids, labels), (other.ids, other.labels):
        for key, value in zip(batch[0][:, ::2].ravel().tolist(), batch[1][:, 1::2].ravel().tolist(), strict=True):
            assert facts.setdefault(key, value) == value  # the same in all examples
    assert (ids[:, 1::2] == task.vocab_size - 1).all()


@pytest.mark.parametrize("name", MAD_VARIATIONS)
def test_the_published_variations_can_be_drawn(name):
    for field, values in MAD_VARIATIONS[name].items():
        for value in values:
            task, (ids, labels, *_) = draw(name, examples=1, **{field: value})
            assert ids.min() >= 0
            assert ids.max() < task.num_tokens
            assert labels.max() < task.num_tokens
    assert set(MAD_VARIATIONS) == set(TASKS) - {"mqar"}
    assert set(DEFAULTS) <= set(TASKS)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("mqar", {"pairs": 17}, "17 pairs need 68 tokens"),
        ("mqar", {"filler": "none"}, "filler is 'none'"),
        ("mqar", {"pairs": 8, "vocab_size": 16}, "7 keys for 8 pairs"),
        ("noisy-recall", {"noise_vocab_size": 31}, "leaves no keys"),
        ("in-context-recall", {"noise": 0.5}, "needs a noise_vocab_size"),
        ("selective-copying", {"copied": 128}, "must be above"),
        ("fuzzy-recall", {"length": 18}, "needs a length above 18"),
        ("nothing", {}, "There is no task 'nothing'"),
        ("mqar", {"size": 1}, "has no size"),
    ],
)
def test_impossible_tasks_say_why(name, fields, message):
    with pytest.raises(ValueError, match=message):
        make_task(name, **fields)


@pytest.mark.parametrize("model", [*recall.LAYERS, "transformers:LlamaForCausalLM", "transformers:Mamba2ForCausalLM"])
def test_models_have_equal_parameters_and_learn_a_step(model):
    fields = {"num_heads": 4, "head_dim": 32, "n_groups": 1} if "Mamba2" in model else {}
    run = recall.Run(model=model, fields=fields, seconds=None, steps=2, batch_size=2, eval_examples=4)
    result = recall.train(run, progress_bar=False)
    assert result["steps"] == 2
    assert result["tokens"] == 2 * 2 * 64
    assert set(result["tests"]) == {"64"}
    assert 0 <= result["tests"]["64"]["accuracy"] <= 1
    base = sum(p.numel() for p in recall.build(recall.Run(), 144).parameters())
    if not model.startswith("transformers:"):
        assert abs(result["parameters"] - base) <= 64 * 3 * 2  # one unit of every MLP
    assert result["memory_floats"] > 0


@pytest.mark.parametrize("variation", recall.VARIATIONS)
def test_every_variation_trains_and_is_measured(variation):
    run = recall.Run(variation=variation, seconds=None, steps=2, batch_size=2, eval_examples=4)
    plain = recall.train(recall.Run(seconds=None, steps=2, batch_size=2, eval_examples=4), progress_bar=False)
    result = recall.train(run, progress_bar=False)
    assert result["memory_floats"] == plain["memory_floats"]
    assert result["parameters"] == plain["parameters"]
    model = recall.build(run, 144)
    ids = torch.randint(0, 144, (2, 64), generator=torch.Generator().manual_seed(1))
    difference = (model(ids).logits - recall.build(recall.Run(), 144)(ids).logits).abs().amax()
    assert difference > 1e-4, "the variation changed nothing"


def innovations(model, ids, mixer):
    """What the mixer reads, what its SSM says, and the scores."""
    seen = []
    scored = mixer.innovation

    def listen(y, *others):
        found = scored(y, *others)
        seen.append((y, found["innovation"]))
        return found

    mixer.innovation = listen
    inputs = []
    handle = mixer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    mixer.innovation = scored
    return inputs[0], *seen[0]


def test_scores_of_variations_follow_their_definitions():
    ids = torch.randint(0, 144, (2, 40), generator=torch.Generator().manual_seed(1))

    def predicted(values):  # the mean of up to eight before
        means = [values[:, max(0, t - 8) : t].mean(1) for t in range(1, values.shape[1])]
        return torch.stack([torch.zeros_like(values[:, 0]), *means], 1)

    def squared(values):
        return (values - predicted(values)).pow(2).sum(-1)

    definitions = {
        None: lambda u, y: squared(y),
        "relative": lambda u, y: squared(y) / y.pow(2).sum(-1),
        "cosine": lambda u, y: 1 - torch.cosine_similarity(y, predicted(y), dim=-1),
    }
    for variation, definition in definitions.items():
        model = recall.build(recall.Run(variation=variation), 144).double()
        (mixer,) = recall_variations.bmojo_mixers(model)
        u, y, scores = innovations(model, ids, mixer)
        torch.testing.assert_close(scores.double(), definition(u, y), rtol=1e-5, atol=1e-6)


def test_the_states_prediction_is_the_output_without_the_token():
    model = recall.build(recall.Run(variation="state-prediction"), 144).double()
    ids = torch.randint(0, 144, (1, 20), generator=torch.Generator().manual_seed(1))
    (mixer,) = recall_variations.bmojo_mixers(model)
    u, y, scores = innovations(model, ids, mixer)
    ssm, weights = mixer.fading, dict(mixer.fading.named_parameters())
    inner, state, heads = ssm.inner, mixer.config.state_size, mixer.config.mamba_num_heads
    assert mixer.config.n_groups == 1
    with torch.no_grad():
        z, xbc, dt = (u[0] @ weights["in_proj.weight"].T).split([inner, inner + 2 * state, heads], -1)
        taps = weights["conv1d.weight"][:, 0]
        padded = torch.cat([xbc.new_zeros(taps.shape[1] - 1, xbc.shape[1]), xbc])
        bias = weights.get("conv1d.bias", 0)
        dt = torch.nn.functional.softplus(dt + weights["dynamics.dt_bias"])
        memory = torch.zeros(heads, inner // heads, state, dtype=torch.float64)
        for t in range(len(z)):  # Mamba2's recurrence (arXiv 2405.21060, section 5), a token at a time
            convolved = (padded[t : t + taps.shape[1]].T * taps).sum(-1) + bias
            x, B, C = torch.nn.functional.silu(convolved).split([inner, state, state])
            x = x.view(heads, -1)
            old = memory * (-dt[t] * weights["dynamics.A_log"].exp()).exp()[:, None, None]
            memory = old + dt[t][:, None, None] * x[:, :, None] * B
            gate = torch.nn.functional.silu(z[t])
            said = (memory @ C + weights["dynamics.D"][:, None] * x).flatten() * gate
            normed = said / (said.pow(2).mean() + ssm.norm.eps).sqrt() * weights["norm.weight"]
            torch.testing.assert_close(y[0, t], normed @ weights["out_proj.weight"].T, rtol=1e-6, atol=1e-9)
            missed = (said - (old @ C).flatten() * gate) @ weights["out_proj.weight"].T
            torch.testing.assert_close(scores[0, t].double(), missed.pow(2).sum(), rtol=1e-5, atol=1e-9)


def test_memory_is_counted_alike_here_and_in_transformers():
    ours = recall.build(recall.Run(model="attention"), 144)
    theirs = recall.build(recall.Run(model="transformers:LlamaForCausalLM"), 144)
    assert recall.memory_floats(theirs, 50) == 2 * 2 * 50 * 64
    assert 0 <= recall.memory_floats(ours, 50) - 2 * 2 * 50 * 64 <= 2  # and how many tokens it has seen


@pytest.mark.parametrize("task", ["compression", "memorization", "selective-copying", "noisy-recall", "fuzzy-recall"])
def test_every_task_trains(task):
    run = recall.Run(task=task, seconds=None, steps=2, batch_size=2, eval_examples=4, train_examples=8)
    assert recall.train(run, progress_bar=False)["steps"] == 2


def test_a_memory_that_holds_everything_is_seen_to_hold_the_evidence():
    run = recall.Run(fields={"eidetic_size": 64, "eidetic_chunk_size": 1}, eval_examples=8)
    task = make_task("mqar", length=128)
    result = recall.evaluate(recall.Learner(recall.build(run, task.num_tokens), task), task, run)
    assert result["questions"] == 64
    assert result["questions_beyond"] > 0
    assert result["held"] > 0.4
    nothing = recall.Run(fields={"eidetic_size": 1}, eval_examples=8)
    result = recall.evaluate(recall.Learner(recall.build(nothing, task.num_tokens), task), task, nothing)
    assert result["held"] < 0.2


def test_training_on_one_pair_is_solved_and_repeats_itself():
    run = recall.Run(
        task_fields={"pairs": 1, "length": 8, "vocab_size": 8}, seconds=None, steps=80, lr=1e-2, eval_examples=64
    )
    first, second = (recall.train(run, progress_bar=False) for _ in range(2))
    assert first["tests"]["8"]["accuracy"] > 0.9
    assert first["tests"] == second["tests"]


def test_a_suite_runs_what_is_missing_with_the_best_rate(tmp_path, monkeypatch):
    made = []

    def train(run, bar):
        made.append((run.lr, run.seed))
        return {"run": {"model": "m", "seed": run.seed, "lr": run.lr}, "steps": 1, "cpu_seconds": 0.0,
                "tests": {"64": {"accuracy": 1 - abs(run.lr - 0.2)}}}  # fmt: skip

    monkeypatch.setattr(recall, "train", train)
    rows = {"row": {"lr": (0.1, 0.2, 0.3)}, "other": {"lr": 0.5}}
    recall.run_suite({"row": rows["row"]}, tmp_path, [0, 1], False)
    assert made == [(0.1, 0), (0.2, 0), (0.3, 0), (0.2, 1)]
    recall.run_suite(rows, tmp_path, [0, 1, 2], False)
    assert made[4:] == [(0.2, 2), (0.5, 0), (0.5, 1), (0.5, 2)]


def test_a_row_takes_the_rate_that_another_has_chosen(tmp_path, monkeypatch):
    made = []

    def train(run, bar):
        made.append((run.hidden_size, run.lr, run.seed))
        return {"run": {}, "steps": 1, "cpu_seconds": 0.0, "tests": {"64": {"accuracy": run.lr}}}

    monkeypatch.setattr(recall, "train", train)
    monkeypatch.setattr(recall, "describe", lambda result: "")
    monkeypatch.setattr(recall, "find_equal", lambda run, suites: None)
    rows = {"small": {"lr": (0.1, 0.2), "hidden_size": 8}, "large": {"lr": "small", "hidden_size": 16}}
    monkeypatch.setitem(recall.SUITES, "two", rows)
    monkeypatch.setattr(sys, "argv", ["recall.py", "--suite", "two", "--only", "large", "--output", str(tmp_path)])
    recall.main()
    assert made == [(8, 0.1, 0), (8, 0.2, 0), (8, 0.2, 1), (8, 0.2, 2), (16, 0.2, 0), (16, 0.2, 1), (16, 0.2, 2)]


def test_what_another_suite_has_run_is_not_run_again(tmp_path, monkeypatch, capsys):
    def train(run, bar):
        made.append(run)
        tests = {"64": {"accuracy": 0.1 * len(made)}}
        return {"run": json.loads(json.dumps(asdict(run))), "steps": 1, "cpu_seconds": 0.0, "tests": tests}

    made = []
    monkeypatch.setattr(recall, "train", train)
    row = {"model": "sliding", "window": 16, "stages": ((4, 32), (8, 64)), "lr": 0.1}
    recall.run_suite({"one": row}, tmp_path / "first", [0, 1], False)
    assert len(made) == 2
    assert "copied" not in capsys.readouterr().out
    recall.run_suite({"two": row, "three": row | {"window": 32}}, tmp_path / "second", [0, 1], False)
    assert (
        re.findall("^(two|three): (copied)?", capsys.readouterr().out, re.M)
        == [("two", "copied")] * 2 + [("three", "")] * 2
    )
    assert [run.window for run in made] == [16, 16, 32, 32]
    for seed in (0, 1):
        first = tmp_path / "first" / "one" / f"lr0.1-seed{seed}.json"
        assert (tmp_path / "second" / "two" / first.name).read_text() == first.read_text()


def test_single_results_do_not_overwrite_each_other(tmp_path, monkeypatch):
    options = ["--task-set", "pairs=1", "length=8", "vocab_size=8", "--steps", "1", "--eval-examples", "8"]
    for rate in ("1e-3", "2e-3", "2e-3"):
        monkeypatch.setattr(sys, "argv", ["recall.py", *options, "--lr", rate, "--output", str(tmp_path)])
        recall.main()
    found = [json.loads(path.read_text()) for path in (tmp_path / "single").iterdir()]
    assert sorted(result["run"]["lr"] for result in found) == [1e-3, 2e-3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nothing"], "There is no model 'nothing'"),
        (["--model", "transformers:Nothing"], "transformers has no class"),
        (["--task-set", "pairs=40"], "40 pairs need"),
        (["--set", "window"], "not of the form"),
        (["--suite", "nothing"], "There is no suite"),
        (["--suite", "sweep", "--only", "nothing"], "sweep has no row nothing; it has bmojo-m4"),
        (["--parameters", "100"], "without any MLP"),
        (["--variation", "cosine", "--model", "mamba2"], "mamba2 has none"),
        (["--set", "eidetic_sise=4"], "--set has the field 'eidetic_sise'"),
        (["--eval", "100", "33"], "must be even"),
        (["--stages", "8"], "--stages has '8'; write PAIRSxLENGTH"),
    ],
)
def test_the_program_says_what_is_wrong(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recall.py", "--steps", "1", "--output", str(tmp_path), *arguments])
    with pytest.raises(SystemExit, match=message):
        recall.main()
