"""What the repository ships: the model card, its snippets as pasted, the weights and the tokenizer."""

import gzip
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open

from bmojo_tests.fake_hub import run_python


ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_card_has_what_the_hub_filters_by():
    data = ModelCard(README).data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert data["license"] == "apache-2.0"
    assert data["language"] == ["en"]
    assert "custom_code" in data["tags"]
    assert data["datasets"]
    assert (ROOT / "LICENSE").is_file()


def test_card_names_every_file_that_runs():
    for file in ROOT.glob("*_bmojo.py"):
        assert f"`{file.name}`" in README


def test_snippets_of_the_card_run_as_pasted(tmp_path):
    """All of them in one process, from another folder, with an empty cache; nothing warns on the way."""
    code = "\n".join(python_blocks()).replace("path/to/bmojo", str(ROOT))
    done = run_python(f"{code}\nimport json; print(json.dumps(type(out.cache).__name__))", tmp_path / "hf", tmp_path)
    assert done.answer == "BMojoCache"
    assert (tmp_path / "prompt.safetensors").is_file()
    peft = "`is_gradient_checkpointing` is deprecated"  # peft 0.21 asks transformers under its old name
    told = [line for line in done.stderr.splitlines() if "Warning" in line or "deprecated" in line]
    noise = [line for line in told if peft not in line]
    assert not noise, noise


def test_weights_are_small_safetensors_and_all_finite():
    path = ROOT / "model.safetensors"
    assert path.stat().st_size < 40e6
    assert not list(ROOT.glob("*.bin")) + list(ROOT.glob("*.pt"))
    with safe_open(path, "pt") as file:
        assert all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118


@pytest.fixture(scope="module")
def shipped():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)
    return AutoModelForCausalLM.from_pretrained(ROOT, trust_remote_code=True).eval(), tokenizer


def test_tokenizer_loses_nothing_and_pads_with_a_token_of_its_own(shipped):
    model, tokenizer = shipped
    text = "\tIt  was—he said—the “best” of times;\n\n  café, naïve, 東京 <DW1> 1859.\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    ids = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert len(ids) == 3
    for config in (model.config, model.generation_config):
        assert config.pad_token_id == tokenizer.pad_token_id
        assert config.eos_token_id == tokenizer.eos_token_id
    assert len(tokenizer) == model.config.vocab_size


def test_model_has_learned_the_language_of_the_books(shipped, shared):
    """A page of a validation book costs far less than the 8 bits of a byte."""
    model, tokenizer = shipped
    book = sorted((shared / "data" / "pg19" / "validation").glob("*.txt.gz"))[0]
    text = gzip.decompress(book.read_bytes()).decode()[20_000:26_000]
    ids = torch.tensor([tokenizer(text).input_ids])
    with torch.no_grad():
        nats = model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    assert nats / torch.log(torch.tensor(2.0)).item() / len(text.encode()) < 2.2


def test_memory_is_full_and_is_used(shipped):
    """The same weights without eidetic memory give other logits from the first query on that could look something up."""
    from transformers import AutoModelForCausalLM

    model, _ = shipped
    without = AutoModelForCausalLM.from_pretrained(ROOT, trust_remote_code=True, eidetic_size=0).eval()
    ids = torch.randint(3, model.config.vocab_size, (1, 900), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = model(ids, output_eidetic=True)
        blind = without(ids).logits
    for kind, positions in zip(model.config.layers_block_type, output.eidetic_positions, strict=True):
        assert (positions is None) == (kind == "bmojo_f")
        assert positions is None or (positions[0, -1] >= 0).all()  # 900 tokens fill 512 places
    assert "bmojo" in model.config.layers_block_type
    first = -(-model.config.sliding_window // model.config.eidetic_chunk_size) * model.config.eidetic_chunk_size
    difference = (output.logits - blind)[0].abs().amax(-1)
    assert difference[:first].max() < 1e-4
    assert difference[first:].min() > 1e-4
