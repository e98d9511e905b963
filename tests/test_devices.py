"""No tensor is left behind on the CPU: the model runs on another device, here `meta`, which refuses to be mixed."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"ssm_type": "mamba", "eidetic_position": "rank"},
        {"innovation_predictor": "random"},
        {"innovation_predictor": "learnable", "use_qk_norm": True, "tie_attn_weights": False},
        {
            "layers_block_type": ["mamba2", "full_attention", "sliding_attention", "mamba", "bmojo"],
            "num_hidden_layers": 5,
        },
    ],
)
def test_everything_follows_the_input(tiny_model, monkeypatch, overrides):
    from bmojo.cache_bmojo import BMojoCache

    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # nothing may be read back from a meta tensor
    model = tiny_model(**overrides).to("meta")
    ids, mask = (
        torch.zeros(2, 29, dtype=torch.int64, device="meta"),
        torch.ones(2, 29, dtype=torch.int64, device="meta"),
    )
    loss = model.train()(ids, attention_mask=mask, labels=ids).loss
    loss.backward()
    assert all(parameter.grad.device.type == "meta" for parameter in model.parameters())
    cache = BMojoCache(model.config)
    with torch.no_grad():
        for count in (9, 1, 1, 5, 1):
            model.eval()(ids[:, :count], cache=cache, output_eidetic=True)
    assert {tensor.device.type for tensor in cache.tensors().values()} == {"meta"}


class Questions(TorchDispatchMode):
    """Counts the times that a tensor is asked for a number, for which a GPU would have to be waited for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(("lengths", "allowed"), [((70, 70), 0), ((70, 40), 1), ((60, 40), 1)])
def test_layers_do_not_wait_for_the_device(tiny_model, monkeypatch, lengths, allowed):
    monkeypatch.setenv("BMOJO_KERNELS", "definition")  # as on a GPU
    model = tiny_model(num_hidden_layers=3).train()
    mask = (torch.arange(70) < torch.tensor(lengths)[:, None]).long()
    with Questions() as asked:
        model(torch.randint(3, 50, (2, 70)), attention_mask=mask).logits.sum().backward()
    assert asked.count <= allowed


def test_frequencies_stay_where_a_gpu_asked_for_them(tiny_model, monkeypatch):
    from bmojo import modeling_bmojo

    config, other = tiny_model().config, tiny_model(rope_theta=500.0).config
    made, make = [], torch.tensor

    def on_no_gpu(values, dtype, device):
        made.append(str(device))
        return make(values, dtype=dtype)

    monkeypatch.setattr(modeling_bmojo, "_on_gpus", {})
    monkeypatch.setattr(torch, "tensor", on_no_gpu)
    expected, _ = modeling_bmojo.rotary_frequencies(config)
    for device in ("cuda:1", "cuda:1", "mps", "cpu", "meta", "cuda:0", "cuda:1"):
        assert torch.equal(modeling_bmojo.rotary_frequencies(config, torch.device(device))[0], expected)
    assert made == ["cpu", "cuda:1", "cpu", "cpu", "cpu", "cuda:0"]
    found, _ = modeling_bmojo.rotary_frequencies(other, torch.device("cuda:1"))
    torch.testing.assert_close(found, 500.0 ** -(torch.arange(0, 6, 2, dtype=torch.float64) / 6))


def test_table_of_rotary_angles_needs_no_float64_on_the_device():
    """Devices without float64 (MPS) get float32 tables of angles that were formed in float64 elsewhere."""
    from bmojo.ops_bmojo import rotary_table

    cos, _ = rotary_table(torch.tensor([[10**7]]), torch.ones(2, dtype=torch.float64), 1.0, torch.float32)
    assert cos.dtype == torch.float32
    assert cos[0, 0, 0].item() == pytest.approx(torch.tensor(1e7, dtype=torch.float64).cos().item(), abs=1e-6)
