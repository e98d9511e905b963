"""EleutherAI's lm-evaluation-harness on B'MOJO: padded batches score as single texts do. Skipped where lm_eval is not installed."""

import json
import random

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from bmojo_tests.fake_hub import ROOT


lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install lm-eval)")
WORDS = "the old man went to sea and saw a great white whale in dark night with his ship he had no fear of death but".split()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A task of every kind of request, on texts of 3 to 300 words."""
    rng, folder = random.Random(0), tmp_path_factory.mktemp("task")

    def text(length):
        return " ".join(rng.choices(WORDS, k=length))

    rows = [
        {"text": text(n), "ends": [" " + text(k) for k in (1, 3, 7)], "gold": 0} for n in (3, 10, 40, 120, 300) * 2
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
    }
    choice = {"doc_to_text": "{{text}}", "doc_to_choice": "{{ends}}", "doc_to_target": "gold", "target_delimiter": ""}
    until = {"max_gen_toks": 12, "until": ["."], "do_sample": False}
    kinds = {
        "multiple_choice": choice | {"metric_list": [{"metric": "acc"}]},
        "loglikelihood_rolling": {
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        "generate_until": {
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{ends[0]}}",
            "generation_kwargs": until,
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    return [common | {"task": kind, "output_type": kind} | fields for kind, fields in kinds.items()]


def answers(tasks, batch_size: int) -> dict:
    """What the harness got for every request: log-likelihoods, or texts."""
    from lm_eval.models.huggingface import HFLM

    model = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(ROOT, trust_remote_code=True),
        tokenizer=AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True),
        batch_size=batch_size,
        device="cpu",
    )
    samples = lm_eval.simple_evaluate(model, tasks=[dict(task) for task in tasks], log_samples=True)["samples"]
    return {kind: [sample["resps"] for sample in of_kind] for kind, of_kind in samples.items()}


def test_batches_of_eight_are_scored_as_single_texts(tasks):
    one, eight = answers(tasks, 1), answers(tasks, 8)
    assert one.keys() == eight.keys() == {"multiple_choice", "loglikelihood_rolling", "generate_until"}
    assert one["generate_until"] == eight["generate_until"]
    for kind in ("multiple_choice", "loglikelihood_rolling"):
        flat = [
            [float(resp[0][0] if isinstance(resp[0], (list, tuple)) else resp[0]) for r in run[kind] for resp in r]
            for run in (one, eight)
        ]
        assert len(flat[0]) >= 10
        assert flat[0] == pytest.approx(flat[1], rel=1e-5)
