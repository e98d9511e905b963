"""No tensor is left behind on the CPU: the model runs on another device, here `meta`, which refuses to be mixed."""

import pytest
import torch


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
    ids, mask = torch.zeros(2, 29, dtype=torch.int64, device="meta"), torch.ones(2, 29, device="meta")
    loss = model.train()(ids, attention_mask=mask, labels=ids).loss
    loss.backward()
    assert all(parameter.grad.device.type == "meta" for parameter in model.parameters())
    cache = BMojoCache(model.config)
    with torch.no_grad():
        for count in (9, 1, 1, 5, 1):
            model.eval()(ids[:, :count], cache=cache, output_eidetic=True)
    assert {tensor.device.type for tensor in cache.tensors().values()} == {"meta"}


def test_table_of_rotary_angles_needs_no_float64_on_the_device():
    """Devices without float64 (MPS) get float32 tables of angles that were formed in float64 elsewhere."""
    from bmojo.ops_bmojo import rotary_table

    cos, _ = rotary_table(torch.tensor([[10**7]]), torch.ones(2, dtype=torch.float64), 1.0, torch.float32)
    assert cos.dtype == torch.float32
    assert cos[0, 0, 0].item() == pytest.approx(torch.tensor(1e7, dtype=torch.float64).cos().item(), abs=1e-6)
