"""examples/pretrain.py on a text of a few pages: a run, a run in two parts, and one that goes on from a model's weights."""

import copy
import gzip
import itertools
import json
import random
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import pretrain  # noqa: E402
import rename_names  # noqa: E402
from pretrain_windows import RecallWindows, TokenWindows  # noqa: E402


SIZES = {
    "hidden_size": 64,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "sliding_window": 8,
    "eidetic_size": 4,
    "eidetic_chunk_size": 4,
    "state_size": 8,
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function from the folder of a run and further options to the weights that it leaves."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("It was a dark night, and the sea was high. " * 60, encoding="utf-8")
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}

    def run(name: str, *options: str) -> dict[str, torch.Tensor]:
        output = tmp_path / name
        given = ["--data", str(tmp_path / "texts"), "--output", str(output), "--seq-len", "16", "--batch-size", "2"]
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *given, "--log-every", "1", *options])
        pretrain.main()
        return load_file(output / "final" / "model.safetensors")

    yield run
    for name, handler in handlers.items():
        signal.signal(name, handler)


def sizes() -> list[str]:
    return [part for name, value in SIZES.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def make_model(**fields) -> torch.nn.Module:
    """A small model with fresh weights, the same ones at every call."""
    torch.manual_seed(0)
    config = get_class_from_dynamic_module("configuration_bmojo.BMojoConfig", str(ROOT))
    return pretrain.build_model(config(vocab_size=50, **SIZES, **fields))


def test_two_runs_can_tokenise_the_same_texts_at_once(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("It was a dark night. " * 40, encoding="utf-8")
    tokenizer, read = AutoTokenizer.from_pretrained(str(ROOT), trust_remote_code=True), pretrain.read_text
    made = []

    def read_while_another_run_comes_and_ends(path):
        monkeypatch.setattr(pretrain, "read_text", read)
        made.append(pretrain.tokenize_files([path], tokenizer, tmp_path))
        return read(path)

    monkeypatch.setattr(pretrain, "read_text", read_while_another_run_comes_and_ends)
    assert pretrain.tokenize_files([tmp_path / "a.txt"], tokenizer, tmp_path) == made[0]
    ids = np.fromfile(made[0], dtype=np.uint16)
    assert tokenizer.decode(ids[:-1]) == "It was a dark night. " * 40
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", made[0].name]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_in_two_parts_is_the_run(run, tmp_path, optimizer):
    options = (*sizes(), "--steps", "4", "--save-every", "2", "--optimizer", optimizer)
    whole = run("whole", *options)
    (tmp_path / "parts").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "parts" / "checkpoint-2")
    parts = run("parts", *options, "--resume")
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(run, tmp_path):
    options = (*sizes(), "--steps", "4", "--save-every", "2")
    whole = run("whole", *options)
    parts = tmp_path / "parts"
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", parts / "checkpoint-2")
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", parts / "checkpoint-4")
    (parts / "checkpoint-4" / "trainer_state.json").unlink()
    again = run("parts", *options, "--resume")
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert len(list(parts.glob("unfinished-checkpoint-4-*/config.json"))) == 1
    assert (parts / "checkpoint-4" / "trainer_state.json").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--learning-rate", "0.1"], "learning_rate 0.002 -> 0.1"),
        (["--hidden-size", "32"], "hidden_size 64 -> 32"),
        (["--config", '{"eidetic_size": 3}'], "config None -> "),
    ],
)
def test_a_resumed_run_keeps_its_model_and_rates(run, changes, said):
    run("run", *sizes(), "--steps", "1")
    with pytest.raises(SystemExit, match=re.escape(said)):
        run("run", *sizes(), "--steps", "1", "--resume", *changes)


def test_a_run_from_weights_takes_their_tokenizer(run, tmp_path):
    run("first", *sizes(), "--steps", "1")
    final = tmp_path / "first" / "final"
    fields = json.loads((final / "tokenizer_config.json").read_text(encoding="utf-8"))
    (final / "tokenizer_config.json").write_text(json.dumps(fields | {"eos_token": "<|other|>"}), encoding="utf-8")
    run("second", "--init", str(final), "--steps", "1", "--tokenizer", str(ROOT))
    with pytest.raises(SystemExit, match=r"first/final has 4097 tokens, the model room for 4096: .*--tokenizer"):
        run("third", "--init", str(final), "--steps", "1")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--config", '{"eidetic_sise": 9}'], "--config has the field 'eidetic_sise'"),
        (["--warmup", "-1"], "--warmup is -1; it must be at least 0"),
        (["--learning-rate", "-0.1"], "--learning-rate is -0.1; it must be at least 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(run, capsys, options, said):
    with pytest.raises(SystemExit) as refused:
        run("run", *sizes(), "--steps", "1", *options)
    assert said in f"{refused.value} {capsys.readouterr().err}"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("b.txt", "café".encode("latin-1"), r"b\.txt is no UTF-8 text"),
        ("b.txt.gz", gzip.compress(b"a long text " * 99, mtime=0)[:-20], r"b\.txt\.gz cannot be read: "),
        ("b.txt.gz", b"no archive", r"b\.txt\.gz cannot be read: "),
    ],
)
def test_a_text_that_cannot_be_read_is_named(run, tmp_path, name, content, said):
    (tmp_path / "texts" / name).write_bytes(content)
    with pytest.raises(SystemExit, match=said):
        run("run", *sizes(), "--steps", "1")
    assert not list(tmp_path.glob("run/*.unfinished"))


def test_what_is_no_text_is_passed_over(run, tmp_path):
    (tmp_path / "texts" / "folder.txt").mkdir()
    (tmp_path / "texts" / "._a.txt").write_bytes(b"\x00\xff what macOS writes beside a file")
    run("run", *sizes(), "--steps", "1")


def test_a_run_starts_from_the_weights_of_a_model(run, tmp_path):
    first = run("first", *sizes(), "--steps", "2")
    init = ("--init", str(tmp_path / "first" / "final"), "--steps", "2")
    kept, trained = run("kept", *init, "--learning-rate", "0"), run("trained", *init)
    assert all(torch.equal(kept[name], first[name]) for name in first)
    assert not any(torch.equal(trained[name], first[name]) for name in first if name.endswith("proj.weight"))


def test_a_run_from_weights_may_change_what_needs_no_other(run, tmp_path):
    run("first", *sizes(), "--steps", "1")
    init = ("--init", str(tmp_path / "first" / "final"), "--steps", "1")
    run("other", *init, "--config", '{"innovation_signal": "layer_input"}')
    assert json.loads((tmp_path / "other" / "final" / "config.json").read_text())["innovation_signal"] == "layer_input"
    with pytest.raises(SystemExit, match=r"do not fit .*predictor.weight"):
        run("more", *init, "--config", '{"innovation_predictor": "learnable"}')


def test_a_resumed_run_keeps_its_optimizer(run, tmp_path):
    run("any", *sizes(), "--steps", "2")
    with pytest.raises(SystemExit, match="optimizer adamw -> muon"):
        run("any", *sizes(), "--steps", "4", "--resume", "--optimizer", "muon")


@pytest.mark.parametrize("ssm_type", ["mamba2", "mamba"])
@pytest.mark.parametrize("tied", [True, False])
def test_muon_gets_the_matrices_of_linear_layers_alone(ssm_type, tied):
    model = make_model(ssm_type=ssm_type, tie_word_embeddings=tied)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = sys.modules[type(model).__module__].get_parameter_groups(model, 0.1)
    matrices, others = (
        [(names[p], group["weight_decay"]) for group in part for p in group["params"]]
        for part in pretrain.split_matrices(model, groups)
    )
    assert sorted(name for name, _ in matrices + others) == sorted(names.values())
    assert all(name.endswith("proj.weight") and decay == 0.1 for name, decay in matrices)
    assert not any(name.endswith("proj.weight") for name, _ in others)
    assert dict(others)["model.embed_tokens.weight"] == 0.1
    assert dict(others)["model.norm.weight"] == 0.0


def test_muon_with_adamw_is_each_of_them_on_its_part(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    ours, theirs = make_model(), make_model()
    get_groups = sys.modules[type(ours).__module__].get_parameter_groups
    both = pretrain.MuonWithAdamW(*pretrain.split_matrices(ours, get_groups(ours, 0.1)), lr=0.01, betas=(0.9, 0.95))
    matrices, others = pretrain.split_matrices(theirs, get_groups(theirs, 0.1))
    apart = (
        torch.optim.Muon(matrices, lr=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.01, betas=(0.9, 0.95)),
    )
    ids = torch.randint(3, 50, (2, 20), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        for model, optimizers in ((ours, [both]), (theirs, apart)):
            model.zero_grad()
            model(ids, labels=ids).loss.backward()
            for optimizer in optimizers:
                optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("has", [{}, {"avx512_bf16": True}, {"amx_bf16": True}])
def test_muon_computes_in_float32_where_a_cpu_has_no_bfloat16(monkeypatch, has):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    weights, bias = torch.nn.Linear(4, 6).parameters()
    muon, _ = pretrain.MuonWithAdamW([{"params": [weights]}], [{"params": [bias]}], 0.1, (0.9, 0.95)).parts
    assert type(muon) is (torch.optim.Muon if has else pretrain.SinglePrecisionMuon)
    assert pretrain.choose_muon([{"params": [weights.to("meta")]}]) is torch.optim.Muon


@pytest.mark.parametrize(
    "settings", [{}, {"adjust_lr_fn": "match_rms_adamw"}, {"nesterov": False, "weight_decay": 0.5}]
)
def test_muon_in_float32_is_pytorchs_but_for_rounding(settings):
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((8, 24), (24, 8), (16, 16), (4, 4))]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    apart = pretrain.SinglePrecisionMuon(ours, lr=0.1, **settings), torch.optim.Muon(theirs, lr=0.1, **settings)
    for step in range(6):
        for p, q in list(zip(ours, theirs, strict=True))[:3]:  # the last has no gradient
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        for optimizer in apart:
            optimizer.step()
        if step == 2:  # a run goes on with the other's state
            states = [copy.deepcopy(optimizer.state_dict()) for optimizer in apart]
            for optimizer, state in zip(apart, reversed(states), strict=True):
                optimizer.load_state_dict(state)
    for p, q, before in zip(ours[:3], theirs, start, strict=False):
        assert (p - q).norm() < 0.02 * (p - before).norm()
    assert torch.equal(ours[3], start[3])
    assert torch.equal(theirs[3], start[3])


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_orthogonalise_keeps_the_singular_vectors(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    settings = torch.optim.Muon([torch.nn.Parameter(matrix)]).defaults
    result = pretrain.orthogonalise(matrix, settings["ns_coefficients"], settings["ns_steps"], settings["eps"])
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    values = left.T @ result @ right.T
    assert ((values.diagonal() > 0.5) & (values.diagonal() < 1.5)).all()
    assert (values - torch.diag(values.diagonal())).abs().max() < 1e-12


def test_several_gpus_in_one_process_are_refused(run, monkeypatch):
    monkeypatch.setattr(pretrain.TrainingArguments, "n_gpu", 2)
    with pytest.raises(SystemExit, match="torchrun --nproc-per-node 2"):
        run("any", *sizes(), "--steps", "1")


def test_sizes_beside_the_weights_of_a_model_are_refused(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("any", "--init", str(tmp_path), "--hidden-size", "16")
    assert "leave out --hidden-size" in capsys.readouterr().err


# -- windows that teach to look back -------------------------------------------------------------------------------------


@pytest.fixture
def windows(tmp_path):
    """The first 400 of 600 windows teach; and the same windows without."""
    path = tmp_path / "tokens.uint16"
    np.arange(20000, dtype=np.uint16).tofile(path)  # every token once: what stands twice was copied
    return RecallWindows(path, 256, 600, 3, recall=400), TokenWindows(path, 256, 600, 3)


def repeats(window) -> torch.Tensor:
    """How far back each token of a window occurred last, 0 for never."""
    last, found = {}, []
    for place, token in enumerate(window["input_ids"].tolist()):
        found.append(place - last.get(token, place))
        last[token] = place
    return torch.tensor(found)


def test_windows_teach_to_look_back_near_and_then_far(windows):
    teaching, plain = windows
    made = [i for i in range(600) if not torch.equal(teaching[i]["input_ids"], plain[i]["input_ids"])]
    assert all(len(teaching[i]["input_ids"]) == 256 for i in range(600))
    assert all(torch.equal(teaching[i]["input_ids"], teaching[i]["labels"]) for i in made)
    assert 30 < len([i for i in made if i < 100]) < 70  # one half of the first quarter
    assert 160 < len([i for i in made if 100 <= i < 400]) < 230  # 65 in 100 of the rest
    assert max(made) < 400
    found = {i: repeats(teaching[i]) for i in made}
    usual = {i: far[far > 0].median().item() for i, far in found.items()}
    assert all(usual[i] <= 6 for i in made[:5])  # short blocks at first, one behind the other
    assert 16 < max(usual[i] for i in made if 80 <= i < 100) <= 64
    assert sum((found[i] > 64).float().mean() > 0.02 for i in made if i >= 100) > 60  # behind all blocks
    assert not any(repeats(plain[i]).any() for i in range(600))


def test_half_the_tokens_of_doubled_blocks_are_copies(windows):
    teaching, plain = windows
    doubled = [i for i in range(100) if not torch.equal(teaching[i]["input_ids"], plain[i]["input_ids"])]
    for i in doubled:
        far = repeats(teaching[i])
        assert 0.35 < (far > 0).float().mean() < 0.6
        ids, at = teaching[i]["input_ids"].tolist(), 0
        while at < 128:  # block after block, each of which comes again
            size = next(n for n in range(2, 65) if ids[at : at + n] == ids[at + n : at + 2 * n])
            at += 2 * size


def test_a_resumed_run_keeps_its_windows(run):
    run("any", *sizes(), "--steps", "2", "--recall-windows", "2")
    with pytest.raises(SystemExit, match="recall_windows 2 -> 4"):
        run("any", *sizes(), "--steps", "4", "--resume", "--recall-windows", "4")


# -- names that only the passage tells -----------------------------------------------------------------------------------


NAMED = "The ship saw Harding. Then old Harding, who knew Boston, said HARDING was his name, and Boston his town.\n\n"


@pytest.fixture
def books(tmp_path):
    """Four books; one name each, Boston in two of them, and God in all."""
    folder = tmp_path / "books"
    folder.mkdir()
    for place, name in enumerate(("Harding", "Miller", "Ahab", "Pip")):
        text = NAMED.replace("Harding", name).replace("HARDING", name.upper())
        text = (text if place < 1 else text.replace("Boston", "home")) + "So said a man of God, and the God of men. "
        with gzip.open(folder / f"{name}.txt.gz", "wt", encoding="utf-8", newline="") as file:
            file.write(text * 40)
    return folder


def rename_books(books, monkeypatch, *options: str) -> Path:
    output = books.parent / "renamed"
    monkeypatch.setattr(
        sys, "argv", ["rename_names.py", "--data", str(books), "--output", str(output), "--passage", "500", *options]
    )
    rename_names.main()
    return output


def test_names_stay_in_a_passage_and_change_with_the_next(books, monkeypatch):
    renamed = (rename_books(books, monkeypatch) / "Harding.txt").read_text(encoding="utf-8")
    with gzip.open(books / "Harding.txt.gz", "rt", encoding="utf-8") as file:
        before = file.read()
    names = re.findall(r"The ship saw (\w+)\.", renamed)
    towns = re.findall(r"who knew (\w+),", renamed)
    assert names == re.findall(r"Then old (\w+),", renamed)
    assert [name.upper() for name in names] == re.findall(r"said (\w+) was", renamed)
    assert towns == re.findall(r"and (\w+) his town", renamed)
    assert len(set(names)) > 5  # of 40 occurrences, four or so a passage
    assert 5 < sum(one != other for one, other in itertools.pairwise(names)) < 12
    pattern = r"Harding|HARDING|Boston"
    rest = re.split(pattern, before)
    at = 0
    for part in rest:  # everything else is as it was, God too, whom all books know
        found = renamed.index(part, at)
        assert found - at < 30
        at = found + len(part)
    assert at == len(renamed)


def test_renaming_depends_on_the_seed_alone(books, monkeypatch):
    first, again, other = (
        (rename_books(books, monkeypatch, "--seed", seed) / "Miller.txt").read_text(encoding="utf-8") for seed in "001"
    )
    assert first == again != other


def test_renaming_does_not_overwrite_its_texts(books, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        rename_books(books, monkeypatch, "--output", str(books))
    assert "would be lost" in capsys.readouterr().err
    (books.parent / "dull").mkdir()
    (books.parent / "dull" / "a.txt").write_text("nobody has a name here", encoding="utf-8")
    with pytest.raises(SystemExit, match="No names were found"):
        rename_books(books, monkeypatch, "--data", str(books.parent / "dull"))


def test_a_text_that_is_there_twice_is_refused(books, monkeypatch):
    (books / "Miller.txt").write_text("another one", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"both as \.txt and as \.txt\.gz"):
        rename_books(books, monkeypatch)


def test_passages_are_the_text():
    assert rename_names.split_passages("one\r\n\r\ntwo\r\n\r\n", 2) == ["one\r\n\r\n", "two\r\n\r\n"]
    text = "".join(random.Random(0).choice("a \n") for _ in range(2000))
    for length in (1, 10, 500, 5000):
        parts = rename_names.split_passages(text, length)
        assert "".join(parts) == text
        assert all(len(part) >= length and part.endswith("\n\n") for part in parts[:-1])
    assert rename_names.split_passages("", 5) == []
