"""Two processes on CPUs: DDP and FSDP2 against one process with both batches, in training and in decoding."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


HERE = Path(__file__).resolve().parent

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this torch has no gloo: torch.distributed is not there",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What distributed_worker.py measured, by case."""
    file = tmp_path_factory.mktemp("distributed") / "found.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(HERE / "distributed_worker.py"), str(file)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
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
