"""examples/pretrain.py on a text of a few pages: a run, a run in two parts, and one that goes on from a model's weights."""

import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.dynamic_module_utils import get_class_from_dynamic_module


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


def make_model(**fields) -> torch.nn.Module:
    """A small model with fresh weights, the same ones at every call."""
    torch.manual_seed(0)
    config = get_class_from_dynamic_module("configuration_bmojo.BMojoConfig", str(ROOT))
    return pretrain.build_model(config(vocab_size=50, **SIZES, **fields))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_in_two_parts_is_the_run(run, tmp_path, optimizer):
    options = (*sizes(), "--steps", "4", "--save-every", "2", "--optimizer", optimizer)
    whole = run("whole", *options)
    (tmp_path / "parts").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "parts" / "checkpoint-2")
    parts = run("parts", *options, "--resume")
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_a_run_starts_from_the_weights_of_a_model(run, tmp_path):
    first = run("first", *sizes(), "--steps", "2")
    init = ("--init", str(tmp_path / "first" / "final"), "--steps", "2")
    kept, trained = run("kept", *init, "--learning-rate", "0"), run("trained", *init)
    assert all(torch.equal(kept[name], first[name]) for name in first)
    assert not any(torch.equal(trained[name], first[name]) for name in first if name.endswith("proj.weight"))


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


def test_muon_with_adamw_is_each_of_them_on_its_part():
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


def test_several_gpus_in_one_process_are_refused(run, monkeypatch):
    monkeypatch.setattr(pretrain.TrainingArguments, "n_gpu", 2)
    with pytest.raises(SystemExit, match="torchrun --nproc-per-node 2"):
        run("any", *sizes(), "--steps", "1")


def test_sizes_beside_the_weights_of_a_model_are_refused(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("any", "--init", str(tmp_path), "--hidden-size", "16")
    assert "leave out --hidden-size" in capsys.readouterr().err
