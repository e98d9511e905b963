"""Special cases against recordings of transformers' own models: converted weights give the same logits, and export again.

The recordings lie beside the checkout (`shared/golden/transformers`); these tests skip where they are absent.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from bmojo.cache_bmojo import BMojoCache
from bmojo.convert import convert
from bmojo.modeling_bmojo import BMojoForCausalLM


CASES = ["llama", "llama_opt", "mistral", "qwen3", "qwen3_opt", "mamba", "mamba_opt", "mamba2", "mamba2_opt"]
CASES += ["falcon_h1", "falcon_h1_gnorm"]


def silently(source, destination, **options):
    return convert(source, destination, progress=False, say=lambda line: None, **options)


@pytest.fixture(scope="module", params=CASES)
def case(request, shared, tmp_path_factory):
    """The recorded folder, its conversion, and the recording."""
    folder = shared / "golden" / "transformers" / request.param
    result = silently(folder, tmp_path_factory.mktemp("golden") / request.param)
    recorded = load_file(folder / "io.safetensors")
    recorded["embeddings"] = load_file(result / "model.safetensors")["model.embed_tokens.weight"]
    return folder, result, recorded


def rel_error(got, want) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def test_logits_and_hidden_states_are_the_recorded_ones(case):
    _, result, recorded = case
    ids, want = recorded["input_ids"], recorded["logits_f64"]
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model = BMojoForCausalLM.from_pretrained(result, dtype=dtype).eval()
        with torch.no_grad():
            full = model(ids, labels=ids, use_cache=False, output_hidden_states=True)
            cache = BMojoCache(model.config)
            pieces = [model(piece, cache=cache).logits for piece in ids.split([11, 1, 1, ids.shape[1] - 13], 1)]
        assert rel_error(full.logits, want) <= tolerance
        assert rel_error(torch.cat(pieces, 1), want) <= tolerance
        assert full.loss.item() == pytest.approx(recorded["loss"].item(), rel=1e-5)
        for number, state in enumerate(full.hidden_states):
            assert rel_error(state, recorded_state(recorded, number, model.config)) <= 1e-5


def recorded_state(recorded, number: int, config):
    """Input of the layer of that number, or the last normalised state: transformers' Mambas leave the embeddings out."""
    last = config.num_hidden_layers
    if number == 0 and not config.has_attention:
        return torch.nn.functional.embedding(recorded["input_ids"], recorded["embeddings"])
    return recorded[f"hf_hidden_states.{number if config.has_attention or number == last else number - 1}"]


def test_greedy_decoding_gives_the_recorded_ids(case):
    _, result, recorded = case
    model = BMojoForCausalLM.from_pretrained(result, dtype=torch.float64)
    greedy = model.generate(recorded["greedy_10_plus_8"][:, :10], max_new_tokens=8, do_sample=False)
    assert torch.equal(greedy, recorded["greedy_10_plus_8"])


def test_export_gives_the_recorded_checkpoint(case, tmp_path):
    folder, result, _ = case
    want = json.loads((folder / "config.json").read_text())
    back = silently(result, tmp_path / "back", export=want["model_type"])
    tensors = load_file(back / "model.safetensors"), load_file(folder / "model.safetensors")
    assert tensors[0].keys() == tensors[1].keys()
    assert all(
        torch.equal(tensors[0][name].view(torch.uint8), tensors[1][name].view(torch.uint8)) for name in tensors[0]
    )
    got = json.loads((back / "config.json").read_text())
    if want["model_type"] == "qwen3":  # layer_types says it all; this only says where it comes from
        del got["max_window_layers"], want["max_window_layers"]
    del got["transformers_version"], want["transformers_version"]  # that of whoever wrote it
    assert got == want
