"""Two processes on CPUs: DDP and FSDP2 against one process with both batches, in training and in decoding."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


HERE = Path(__file__).resolve().parent
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this torch has no gloo: torch.distributed is not there",
)


def run(*command: str):
    """Run to a good end."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What distributed_worker.py measured, by case."""
    file = tmp_path_factory.mktemp("distributed") / "found.json"
    run(*LAUNCH, str(HERE / "distributed_worker.py"), str(file))
    return json.loads(file.read_text())


@pytest.mark.parametrize("length", [3, 29])  # shorter than the window; beyond all spans
@pytest.mark.parametrize("name", ["bmojo", "untied", "learnable", "mamba", "deltanet", "kalmanet", "others"])
@pytest.mark.parametrize("kind", ["ddp", "ddp, checkpointing", "fsdp"])
def test_two_processes_do_what_one_does(found, kind, name, length):
    """Every parameter has a gradient in every call, too: DDP waits for those that have none, and says so."""
    case = found[f"{kind}: {name}, {length} tokens"]
    assert case["change"] > 1e-2
    assert case["weights"] < 1e-6
    assert case["decoding"] < 1e-5


@pytest.mark.parametrize("length", [3, 29])
@pytest.mark.parametrize("name", ["bmojo", "untied", "learnable", "mamba", "deltanet", "kalmanet", "others"])
@pytest.mark.parametrize("kind", ["fsdp, mixed precision", "fsdp, bfloat16 weights"])
def test_half_precision_trains_and_decodes(found, kind, name, length):
    """To rounding, which may choose other tokens: positions, states and rotary tables pass layers as they are."""
    case = found[f"{kind}: {name}, {length} tokens"]
    assert case["weights"] < case["change"] / 2
    assert case["decoding"] < (0.02 if length == 3 else 0.2)


def test_pretraining_on_two_devices_is_one_run_with_batches_of_both(tmp_path):
    """The same windows, one log, one model; the learning rate of both follows one clock."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("It was a dark night, and the sea was high. " * 60, encoding="utf-8")
    sizes = ["--hidden-size", "64", "--intermediate-size", "24", "--num-hidden-layers", "1", "--sliding-window", "8"]
    common = ["--data", str(tmp_path / "texts"), "--seq-len", "16", "--steps", "3", "--log-every", "1", *sizes]
    script = str(HERE.parent / "examples" / "pretrain.py")
    run(*LAUNCH, script, *common, "--batch-size", "2", "--output", str(tmp_path / "two"))
    run(sys.executable, script, *common, "--batch-size", "4", "--output", str(tmp_path / "one"))
    one, two = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=2e-5, rtol=0)
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
    losses = [[json.loads(line).get("loss") for line in log] for log in logs]
    tokens = [[json.loads(line).get("tokens") for line in log] for log in logs]
    assert len(logs[0]) == len(logs[1]) == 4  # three steps and the end
    assert tokens[0] == tokens[1] == [64, 128, 192, None]
    assert losses[1][:3] == pytest.approx(losses[0][:3], rel=1e-4)
