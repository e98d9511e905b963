"""The programs of examples/ that no other test runs, as a user runs them: a command, in another directory, on small input."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer


ROOT = Path(__file__).resolve().parent.parent
TEXT = "The boy went to the river, and “nothing” came of it – so he said; it was the 3rd of May. \n"


def run(program: str, folder: Path, *arguments: str) -> str:
    """What the program prints, started in `folder`."""
    command = [sys.executable, str(ROOT / "examples" / f"{program}.py"), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8", timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def texts(tmp_path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "river.txt").write_text(TEXT * 40, encoding="utf-8")
    return folder


def test_evaluate_counts_the_bits_of_one_forward_call(texts, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(ROOT, trust_remote_code=True).eval()
    ids = tokenizer(TEXT * 40, return_tensors="pt").input_ids
    begun = torch.cat([torch.tensor([[tokenizer.eos_token_id]]), ids], 1)
    with torch.no_grad():
        logits = model(begun, use_cache=False).logits[0, :-1]
    nats = F.cross_entropy(logits.double(), ids[0], reduction="sum").item()
    size = len((TEXT * 40).encode())
    printed = run("evaluate", tmp_path, "--data", "texts", "--segment", "200", "--threads", "1").splitlines()[-1]
    bits, per_token, count, tokens = re.match(
        r"total: (\S+) bits per byte, (\S+) nats per token, (\S+) bytes, (\S+) tokens", printed
    ).groups()
    assert (int(count.replace(",", "")), int(tokens.replace(",", ""))) == (size, ids.numel())
    assert float(per_token) == pytest.approx(nats / ids.numel(), abs=2e-4)
    assert float(bits) == pytest.approx(nats / size / torch.tensor(2.0).log().item(), abs=2e-4)


def test_finetune_lora_writes_a_model_that_loads_alone(tmp_path):
    options = "--output lora --steps 2 --batch-size 2 --threads 1".split()
    printed = run("finetune_lora", tmp_path, *options)
    assert "lora loads alone and gives the same logits." in printed
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).state_dict()
        for folder in (ROOT, tmp_path / "lora")
    )
    assert before.keys() == after.keys(), "the adapters are merged: names as before"
    # examples are shorter than the window: no query reads a fading token, and the SSM gets no gradient
    projections = {name for name in before if name.endswith("_proj.weight") and ".fading." not in name}
    assert len(projections) == 28
    assert {name for name in before if not torch.equal(before[name], after[name])} == projections


def test_train_tokenizer_writes_what_auto_tokenizer_loads(texts, tmp_path):
    printed = run("train_tokenizer", tmp_path, "--data", "texts", "--output", "tokenizer", "--vocab-size", "300")
    assert printed.startswith("300 tokens; ")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert len(tokenizer) == 300
    for text in (TEXT, "", " two  spaces\r\n\ttab", "日本語 and \U0001f642"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer(TEXT).input_ids) < 0.6 * len(TEXT.encode()), "merges of this text's own were learned"


def test_benchmark_decode_prints_the_bytes_of_the_formula(tmp_path):
    printed = run("benchmark_decode", tmp_path, *"--multiples 1 2 --tokens 4 --rounds 1".split())
    rows = [line.split() for line in printed.splitlines() if line.split()[0].isdigit()]
    assert [row[0] for row in rows] == ["256", "512"]
    assert len({size for row in rows for size in row[3:]}) == 1


def test_benchmark_prefill_reads_both_ways(tmp_path):
    printed = run("benchmark_prefill", tmp_path, *"--lengths 300 --piece 128 --rounds 1".split())
    assert re.search(r"pieces of 128\n", printed)
    assert re.search(r"^ *300 +\d+\.\d+ s, -?\d+ MB +\d+\.\d+ s, -?\d+ MB", printed, re.MULTILINE)
