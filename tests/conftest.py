"""Makes the checkout importable as the package `bmojo` and this folder as `bmojo_tests`; fixtures for tiny models."""

import os
import sys
import tempfile
from contextlib import contextmanager, nullcontext
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path

import pytest
import torch


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read by huggingface_hub when it is imported; no test here needs the Hub
_modules = tempfile.TemporaryDirectory(
    prefix="bmojo-modules-"
)  # for as long as this process: one cache of remote code
os.environ["HF_MODULES_CACHE"] = _modules.name  # for all its tests, and none of the user's

ROOT = Path(__file__).resolve().parent.parent
TINY = {  # odd sizes on purpose: none is a multiple of another where it need not be
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "sliding_window": 7,
    "mamba_head_dim": 8,
    "state_size": 4,
    "chunk_size": 4,
    "eidetic_size": 4,
    "eidetic_chunk_size": 3,
    "innovation_kernel": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _make_package(name: str, folder: Path):
    """A package without `__init__.py`, under a name that does not depend on how the folder is called."""
    spec = ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    sys.modules[name] = module_from_spec(spec)


pytest.register_assert_rewrite("bmojo_tests")
_make_package("bmojo", ROOT)
_make_package("bmojo_tests", ROOT / "tests")
torch.set_num_threads(1)  # tiny tensors, and other test processes beside this one
if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # read when triton is imported; without BMOJO_KERNELS it changes nothing


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of recorded outputs and checkpoints beside the checkout."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no folder `shared` beside the checkout: the recordings this test compares with are missing")
    return folder


@contextmanager
def casts_to_float32_ignored():
    """Casts of float64 tensors to float32 do nothing: transformers' models, which have many, then compute in float64."""
    cast, to = torch.Tensor.float, torch.Tensor.to

    def keep(tensor, *args, **kwargs):
        narrows = tensor.dtype is torch.float64 and torch.float32 in (*args, kwargs.get("dtype"))
        return tensor if narrows else to(tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", lambda tensor: tensor if tensor.dtype is torch.float64 else cast(tensor))
        patch.setattr(torch.Tensor, "to", keep)
        yield


@pytest.fixture(scope="session")
def in_float64():
    """The context `casts_to_float32_ignored`; in a session's scope, as Hypothesis wants it."""
    return casts_to_float32_ignored


@contextmanager
def cut_small(block: int = 64, queries: int = 4):
    """Blocks of so many elements and queries in the forms for a CPU: many of them in small tensors."""
    from bmojo import cpu_bmojo

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_bmojo, "_SMALL", 1)
        patch.setattr(cpu_bmojo, "_BLOCK", block)
        patch.setattr(cpu_bmojo, "_QUERIES", queries)
        patch.setattr(cpu_bmojo, "_RUN", 4 * queries, raising=False)
        yield


@pytest.fixture(scope="session")
def cut():
    """The context `cut_small`; in a session's scope, as Hypothesis wants it."""
    return cut_small


@pytest.fixture
def small_blocks():
    with cut_small():
        yield


@pytest.fixture(params=["auto", "blocks", "definition"])
def form(request, monkeypatch):
    """Which form of the ops runs: what is chosen by itself, the same cut into blocks of very few tokens, or the definitions."""
    monkeypatch.setenv("BMOJO_KERNELS", "definition" if request.param == "definition" else "auto")
    with cut_small() if request.param == "blocks" else nullcontext():
        yield request.param


@pytest.fixture(scope="session")
def tiny_config():
    """Make the configuration of a tiny model; keyword arguments override."""
    from bmojo.configuration_bmojo import BMojoConfig

    return lambda **overrides: BMojoConfig(**TINY | overrides)


@pytest.fixture(scope="session")
def tiny_model(tiny_config):
    """Make a tiny causal language model, equal for equal arguments."""
    from bmojo.modeling_bmojo import BMojoForCausalLM

    def make(seed: int = 0, dtype: torch.dtype = torch.float32, **overrides):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return BMojoForCausalLM(tiny_config(**overrides)).to(dtype).eval()

    return make
