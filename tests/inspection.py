"""What the loading tests ask a model. Sent as text into processes that cannot import from this checkout: standalone."""

import hashlib
import sys

import torch


def fingerprint(model) -> str:
    """A digest of names, dtypes and bits of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def last_logits(model) -> list[float]:
    with torch.no_grad():
        return model(torch.arange(3, 20)[None]).logits[0, -1].tolist()


def face_of(model):
    """The module `kernels_bmojo` that belongs to the model's code."""
    return sys.modules[type(model).__module__.rpartition(".")[0] + ".kernels_bmojo"]


def run_probe(face) -> str | None:
    """Run the kernel `probe` and check its answer; the file it came from, or None where it does not ship."""
    kernel = face.load("probe")
    if kernel is None:
        return None
    x = torch.arange(37, dtype=torch.float32)
    assert torch.equal(kernel(x), 3 * x)
    return sys.modules[kernel.__module__].__file__


def inspect(model, probe: bool = True) -> dict:
    face = face_of(model)
    return {
        "weights": fingerprint(model),
        "logits": last_logits(model),
        "auto_map": model.config.auto_map,
        "kernels": face.__path__,
        "probe": run_probe(face) if probe else None,
    }


class RefuseTriton:
    """An entry of `sys.meta_path`: triton cannot be imported, as where it is not installed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
