"""The stream program: bytes do not grow, rounding does not add up, and the figures mean what they say."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).resolve().parent.parent
TINY = "--tokens 800 --marks 200 400 --set hidden_size=24 intermediate_size=40 num_attention_heads=4 mamba_head_dim=8".split()
TINY += "state_size=4 sliding_window=5 eidetic_size=4 eidetic_chunk_size=3 chunk_size=4 vocab_size=97".split()


@pytest.fixture
def stream(monkeypatch):
    """The program as a module, with few tokens before a mark read one by one."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import stream

    monkeypatch.setattr(stream, "SINGLE", 48)
    monkeypatch.setattr(stream, "COMPARED", 32)
    yield stream
    for name in ("stream", "common"):
        sys.modules.pop(name, None)


@pytest.fixture
def results(stream, tmp_path):
    """Run the program with options and return what it wrote."""

    def run(*options: str) -> dict:
        stream.main([*TINY, *options, "--output", str(tmp_path)])
        return json.loads((tmp_path / "stream.json").read_text(encoding="utf-8"))

    return run


def test_bytes_stay_and_rounding_stays_small(results, tmp_path):
    from bmojo.cache_bmojo import cache_bytes
    from bmojo.configuration_bmojo import BMojoConfig

    found = results("innovation_predictor=recent")
    assert found["config"]["innovation_predictor"] == "recent"
    config = BMojoConfig(**found["config"])
    for model, dtype in (("stream", torch.float32), ("float64", torch.float64)):
        want = cache_bytes(config, 1, dtype)
        assert [mark[model]["cache_bytes"] for mark in found["marks"]] == [want] * 3
        assert [mark[model]["formula_bytes"] for mark in found["marks"]] == [want] * 3
    assert [mark["tokens"] for mark in found["marks"]] == [200, 400, 800]
    for mark in found["marks"]:
        assert 0 < mark["difference"]["median"] <= mark["difference"]["max"] < 1e-3
        assert 0 < mark["stream"]["ms_min"] <= mark["stream"]["ms_median"]
        assert mark["stream"]["cpu_ms"] > 0
        assert mark["overlap"] == {"mean": 1, "by_layer": [1, 1]}, "the choice does not look at numbers"
        assert mark["equal_memories"] == {"positions": 32, "difference": mark["difference"]}
        assert mark["kl"]["max"] < 1e-6
    assert found["marks"][0]["growth_bytes"] in (0, None)

    table = (tmp_path / "stream.md").read_text(encoding="utf-8")
    assert found["command"] in table
    assert [line.split("|")[1].strip() for line in table.splitlines()[6:]] == ["200", "400", "800"]
    assert (tmp_path / "stream.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("step", ["1", "7", "32"])
def test_float64_differs_from_itself_by_nothing(results, step):
    for mark in results("--dtype", "float64", "--step", step)["marks"]:
        assert mark["difference"] == {"median": 0, "max": 0}
        assert mark["same_top"] == 1
        assert mark["equal_memories"]["positions"] == mark["compared"] == 32


def test_logits_and_memories_are_those_of_the_whole_text(stream, tiny_model):
    """After any calls, with the positions of the memory that the last token looked into."""
    model = tiny_model(dtype=torch.float64)
    tokens = torch.randint(3, 97, (1, 60), generator=torch.Generator().manual_seed(0))
    reader = stream.Stream(model)
    reader.read(tokens[:, :43], step=7)
    _, logits, memories = reader.read(tokens[:, 43:], step=1, kept=10)
    with torch.no_grad():
        whole = model(tokens, output_eidetic=True)
    assert torch.allclose(torch.stack(logits), whole.logits[0, -10:], atol=1e-10, rtol=0)
    for layer, want in enumerate(whole.eidetic_positions):
        chunks = torch.arange(50, 60) // model.config.eidetic_chunk_size
        assert [memory[layer] for memory in memories] == want[0, chunks].tolist()


def test_difference_is_told_apart_by_memories(stream):
    logits = [torch.tensor([3.0, 4.0]), torch.tensor([0.0, 1.0])]
    true_logits = [torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])]
    memories, true_memories = [[[5, 2, -1]], [[5, 3, 2]]], [[[2, 5, -1]], [[5, 2, 4]]]
    found = stream.compare(logits, memories, true_logits, true_memories)
    assert found["difference"]["max"] == pytest.approx(2**0.5)
    assert found["overlap"]["mean"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["equal_memories"] == {"positions": 1, "difference": {"median": 0, "max": 0}}
    assert found["same_top"] == 0.5
    assert found["kl"]["max"] == pytest.approx(math.tanh(0.5))  # 2 p - 1 for the odds e


def test_a_checkpoint_reads_texts_again_and_again(stream, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("It was a dark night. " * 3, encoding="utf-8")
    options = [
        "--model",
        str(ROOT),
        "--data",
        str(folder),
        "--tokens",
        "60",
        "--marks",
        "30",
        "--set",
        "eidetic_size=0",
    ]
    stream.main([*options, "--output", str(tmp_path)])
    found = json.loads((tmp_path / "stream.json").read_text(encoding="utf-8"))
    assert found["config"]["eidetic_size"] == 0
    assert [mark["tokens"] for mark in found["marks"]] == [30, 60]
    assert all("overlap" not in mark and mark["difference"]["max"] < 1e-4 for mark in found["marks"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--tokens 0", "--tokens is 0"),
        ("--step 0", "--step is 0"),
        ("--tokens 100 --marks 50 200", "between 1 and the 100 of --tokens"),
        ("--marks 0", "between 1 and"),
        ("--set innovation_predictor", "write FIELD=VALUE"),
    ],
)
def test_bad_arguments_are_refused_by_name(stream, capsys, options, message):
    with pytest.raises(SystemExit):
        stream.main(options.split())
    assert message in capsys.readouterr().err
