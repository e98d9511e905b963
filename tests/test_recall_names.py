"""examples/recall_names.py: where names stand, what is counted, and a whole run with a model of random weights."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import evaluate  # noqa: E402
import recall_names  # noqa: E402
from common import load_model, save_tokenizer  # noqa: E402
from pretrain import build_model, get_class_from_dynamic_module  # noqa: E402


BOOKS = {
    "a": "The ship saw Harding. Then old Harding, who knew Boston, said HARDING was his name. ",
    "b": "The ship saw Miller. Then old Miller, who knew Salem, said MILLER was his name. ",
    "c": "The ship saw nobody at all, and the crew was glad of it, and of the wind. ",
}


@pytest.fixture
def folder(tmp_path):
    """Books, a tiny model with memory and one without."""
    (tmp_path / "books").mkdir()
    for name, text in BOOKS.items():
        (tmp_path / "books" / f"{name}.txt").write_text(text * 20, encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(str(ROOT), trust_remote_code=True)
    config = get_class_from_dynamic_module("configuration_bmojo.BMojoConfig", str(ROOT))
    sizes = {"hidden_size": 64, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"sliding_window": 8, "eidetic_chunk_size": 4, "state_size": 8, "vocab_size": len(tokenizer)}
    for name, memory in (("with", 4), ("without", 0)):
        torch.manual_seed(0)
        build_model(config(**sizes, eidetic_size=memory)).save_pretrained(tmp_path / name)
        save_tokenizer(tokenizer, tmp_path / name)
    return tmp_path


def test_names_are_invented_and_known_where_they_stand():
    books = recall_names.invented_books([text * 5 for text in BOOKS.values()])
    for (text, names), before in zip(books, BOOKS.values(), strict=True):
        words = set(recall_names.WORD.findall(before))
        assert all(text[start:stop].capitalize() == name for start, (stop, name) in names.items())
        assert not {name for _, name in names.values()} & words
        assert not any(name in text for name in ("Harding", "HARDING", "Boston", "Miller", "MILLER", "Salem"))
    assert [len(names) for _, names in books] == [20, 20, 0]
    again = recall_names.invented_books([text * 5 for text in BOOKS.values()])
    assert again == books
    assert recall_names.invented_books([text * 5 for text in BOOKS.values()], seed=1) != books


def test_tokens_after_a_names_first_are_counted_by_distance():
    text = 'So Zorvan, "Zorvan" of Pel. ZORVAN sat.'
    parts = 'So| Z|or|van|,| "|Z|or|van|"| of| P|el|.| ZOR|VAN| sat|.'.split("|")
    offsets, at = [], 0
    for part in parts:
        offsets.append((at, at + len(part)))
        at += len(part)
    assert text == "".join(parts)
    names = {3: (9, "Zorvan"), 12: (18, "Zorvan"), 23: (26, "Pel"), 28: (34, "Zorvan")}
    assert all(text[start:stop].capitalize() == name for start, (stop, name) in names.items())
    assert recall_names.name_tokens(offsets, names) == {2: 0, 3: 0, 7: 5, 8: 5, 12: 0, 15: 8}
    # a token that reaches beyond the name says more than how it goes on
    assert recall_names.name_tokens([(0, 2), (2, 4), (4, 10)], {3: (9, "Zorvan")}) == {}
    # the text was cut within a name
    assert recall_names.name_tokens(offsets[:3], names) == {2: 0}


def test_a_run_counts_every_token_once(folder, monkeypatch, capsys):
    options = ["--data", str(folder / "books"), "--models", str(folder / "with"), str(folder / "without")]
    options += ["--length", "120", "--edges", "8", "16", "--segment", "50", "--output", str(folder / "names.json")]
    monkeypatch.setattr(sys, "argv", ["recall_names.py", *options, "--plot", str(folder / "names.png")])
    recall_names.main()
    table = capsys.readouterr().out.strip().split("\n")[-8:]
    found = json.loads((folder / "names.json").read_text())
    title = str(folder / "with")
    choices = ("innovation", "random", "recent", "oldest", "none")
    assert list(found) == [*(f"{title}, {choice}" for choice in choices), f"{folder / 'without'}, none"]
    assert len(table) == 8
    assert (folder / "names.png").stat().st_size > 1000
    sums = found[f"{title}, innovation"]
    assert sums["all"][1] == 360
    distances = {name: total for name, total in sums.items() if name not in ("all", "names", "held")}
    assert sum(count for _, count in distances.values()) == sums["names"][0] > 40
    for name, (nats, count) in distances.items():
        assert math.isfinite(nats)
        assert count == found[f"{title}, none"][name][1]
    assert sums["held"][1] == 3 * 4  # three books, one layer of four places
    assert "held" not in found[f"{title}, none"]
    recent = recall_names.change_memory(load_model(title)[0], "recent")
    with torch.inference_mode():  # the last chunk begins at 28, and at 8: what its first window has left behind
        assert recall_names.held_tokens(recent, [5] * 30) == [[17, 18, 19, 20]]
        assert recall_names.held_tokens(recent, [5] * 9) == [[0]]
    forgetful = recall_names.change_memory(
        load_model(title)[0], "half-life=1"
    )  # of what is 60 tokens old 2^-60 is left
    lasting = recall_names.change_memory(forgetful, "half-life=none")
    assert (forgetful.config.innovation_half_life, lasting.config.innovation_half_life) == (1, None)
    long = torch.arange(5, 95).tolist()
    with torch.inference_mode():
        assert min(recall_names.held_tokens(forgetful, long)[0]) > 60
        assert recall_names.held_tokens(lasting, long) == recall_names.held_tokens(load_model(title)[0], long)
        assert min(recall_names.held_tokens(lasting, long)[0]) < 60
    with torch.inference_mode():
        wide = recall_names.held_tokens(recall_names.change_memory(lasting, "half-life=1+size=6"), long)[0]
        assert wide[-4:] == recall_names.held_tokens(forgetful, long)[0]
        assert len(wide) == 6
        lasting.config.layers_block_type = ["bmojo_f"]
        nowhere = recall_names.change_memory(lasting, "innovation")
        assert recall_names.held_tokens(nowhere, long) == []
        for choice in ("layers=0", "layers=all"):
            again = recall_names.change_memory(nowhere, choice)
            assert recall_names.held_tokens(again, long) == recall_names.held_tokens(lasting, long)
    with pytest.raises(SystemExit, match="names layer 9; the layers are 0 to 0"):
        recall_names.change_memory(lasting, "layers=0,9")
    # against evaluate.py's own reading of the same texts
    model, tokenizer = load_model(title)
    books = recall_names.invented_books([text * 20 for text in BOOKS.values()])
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"][:120] for text, _ in books]
    with torch.inference_mode():
        bits = [evaluate.token_bits(model, [tokenizer.eos_token_id, *each], 400, carry=False).sum() for each in ids]
    assert sums["all"][0] == pytest.approx(sum(bits).item() * math.log(2), rel=1e-5)
    assert sums["all"][0] != pytest.approx(found[f"{title}, none"]["all"][0], rel=1e-7)


@pytest.mark.parametrize("choice", ["newest", "half-life=", "half-life=-3", "half-life=soon", "size=none"])
def test_an_unknown_choice_is_refused_with_the_known_ones(choice, folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recall_names.py", "--data", str(folder / "books"), "--choices", choice])
    with pytest.raises(SystemExit):
        recall_names.main()
    assert f"{choice!r} is none of innovation, random" in capsys.readouterr().err
