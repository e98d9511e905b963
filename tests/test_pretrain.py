"""examples/pretrain.py on a text of a few pages: a run, a run in two parts, and one that goes on from a model's weights."""

import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import pretrain  # noqa: E402


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


def test_a_run_in_two_parts_is_the_run(run, tmp_path):
    whole = run("whole", *sizes(), "--steps", "4", "--save-every", "2")
    (tmp_path / "parts").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "parts" / "checkpoint-2")
    parts = run("parts", *sizes(), "--steps", "4", "--save-every", "2", "--resume")
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_a_run_starts_from_the_weights_of_a_model(run, tmp_path):
    first = run("first", *sizes(), "--steps", "2")
    init = ("--init", str(tmp_path / "first" / "final"), "--steps", "2")
    kept, trained = run("kept", *init, "--learning-rate", "0"), run("trained", *init)
    assert all(torch.equal(kept[name], first[name]) for name in first)
    assert not any(torch.equal(trained[name], first[name]) for name in first if name.endswith("proj.weight"))


def test_sizes_beside_the_weights_of_a_model_are_refused(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("any", "--init", str(tmp_path), "--hidden-size", "16")
    assert "leave out --hidden-size" in capsys.readouterr().err
