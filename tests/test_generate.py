"""The generation program: a long prompt shows how far it was read, and changes nothing by that."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM


ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def generate(monkeypatch):
    """The program as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import generate

    yield generate
    for name in ("generate", "common"):
        sys.modules.pop(name, None)


def random_ids(length: int) -> torch.Tensor:
    return torch.randint(3, 97, (1, length), generator=torch.Generator().manual_seed(0))


def test_a_long_prompt_is_read_in_pieces_under_a_bar(generate, tiny_model, monkeypatch, capsys):
    model = tiny_model()
    monkeypatch.setattr(generate, "LONG", 40)
    monkeypatch.setattr(type(model.model), "prefill_piece", 16)
    assert generate.read_ahead(model, random_ids(40)) is None
    assert capsys.readouterr().err == ""
    for length, ahead in ((41, 32), (48, 32), (49, 48)):  # the last piece, whole or not, is generate's
        assert generate.read_ahead(model, random_ids(length)).get_seq_length() == ahead
        assert f"{ahead}.0/{ahead}.0 [" in capsys.readouterr().err


@pytest.mark.parametrize("sample", [False, True])
def test_shipped_model_goes_on_from_a_long_prompt_as_without_bar(generate, monkeypatch, sample):
    model = AutoModelForCausalLM.from_pretrained(ROOT, trust_remote_code=True).eval()
    inputs = {"input_ids": random_ids(3000), "attention_mask": torch.ones(1, 3000, dtype=torch.int64)}
    settings = {"max_new_tokens": 12, "do_sample": sample, "return_dict_in_generate": True, "output_logits": True}
    outputs = []
    for threshold in (3000, 2000):
        monkeypatch.setattr(generate, "LONG", threshold)
        cache = generate.read_ahead(model, inputs["input_ids"])
        assert (cache is None) == (threshold == 3000)
        torch.manual_seed(0)
        outputs.append(model.generate(**inputs, cache=cache, **settings))
    plain, ahead = outputs
    assert torch.equal(ahead.sequences, plain.sequences)
    assert all(torch.equal(got, want) for got, want in zip(ahead.logits, plain.logits, strict=True)), "to the last bit"


@pytest.mark.parametrize("length", [41, 64, 77])
def test_memory_after_reading_ahead_is_that_of_the_text(generate, tiny_model, monkeypatch, length):
    model = tiny_model(dtype=torch.float64)
    monkeypatch.setattr(type(model.model), "prefill_piece", 16)
    want = generate.kept_positions(model, random_ids(length))
    monkeypatch.setattr(generate, "LONG", 40)
    assert generate.kept_positions(model, random_ids(length)) == want
    assert [len(positions) for positions in want.values()] == [model.config.eidetic_size] * 2


def test_program_prints_the_same_with_and_without_bar(generate, monkeypatch, capsys, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("The sea was calm, and nobody spoke of what had happened at the inn. " * 16, encoding="utf-8")
    options = ["--prompt-file", str(prompt), "--max-new-tokens", "8", "--show-memory"]
    model, tokenizer = generate.load_model(str(ROOT))
    model.model.prefill_piece = 64
    monkeypatch.setattr(generate, "load_model", lambda name: (model, tokenizer))
    monkeypatch.setattr(sys, "argv", ["generate.py", *options])
    shown = []
    for threshold in (4096, 100):
        monkeypatch.setattr(generate, "LONG", threshold)
        generate.main()
        shown.append(capsys.readouterr())
    assert shown[0].out == shown[1].out
    assert "reading" not in shown[0].err
    assert shown[1].err.count("\rreading:   0%") == 2  # the prompt, and the whole text for its memory
