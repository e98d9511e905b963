"""Quantized loading with bitsandbytes and torchao on a CPU, against the same model with the weights that the quantizer made of its own."""

import copy

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig, TorchAoConfig

from bmojo.modeling_bmojo import BMojoForCausalLM
from bmojo.ssm_bmojo import BMojoTimeStepProjection
from bmojo_tests.kernel_checks import rel_error


MIXED = {"layers_block_type": ["bmojo", "mamba", "sliding_attention", "gated_deltanet"], "num_hidden_layers": 4}
VARIANTS = [pytest.param({}, id="bmojo"), pytest.param(MIXED, id="mixed")]


@pytest.mark.parametrize("fields", VARIANTS)
def test_projections_are_of_the_class_that_quantizers_look_for(tiny_model, fields):
    """Some replace modules whose type is nn.Linear, not those of a subclass, and say nothing about the others."""
    linear = [module for module in tiny_model(**fields).modules() if isinstance(module, nn.Linear)]
    assert len(linear) > 10
    assert {type(module) for module in linear} <= {nn.Linear, BMojoTimeStepProjection}


# ----------------------------------------------------------------------------------------------------------------------
# Each quantizer: how to ask for it, the weight that a layer of it stands for, and how far its own products may be off
# ----------------------------------------------------------------------------------------------------------------------


def bitsandbytes_int8():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True)


def int8_weight(module):
    return module.weight.data.float() * module.weight.SCB[:, None] / 127


def bitsandbytes_nf4():
    pytest.importorskip("bitsandbytes")
    skipped = ["lm_head", "in_proj", "x_proj"]  # its product on CPUs takes multiples of 32 rows only
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skipped)


def nf4_weight(module):
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(module.weight.data, module.weight.quant_state).float()


def torchao_int8():
    return TorchAoConfig(quant_type=pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())


def torchao_weight(module):
    return module.weight.dequantize()


QUANTIZERS = [
    pytest.param(bitsandbytes_int8, int8_weight, 0.1, id="bitsandbytes-int8"),  # rounds activations as well
    pytest.param(bitsandbytes_nf4, nf4_weight, 0.03, id="bitsandbytes-nf4"),  # bfloat16 products where a CPU has them
    pytest.param(torchao_int8, torchao_weight, 1e-4, id="torchao-int8"),
]


def is_quantized(module) -> bool:
    return hasattr(module, "weight") and type(module.weight) is not nn.Parameter


@pytest.fixture
def load(tiny_config, tmp_path):
    """A function from fields and a quantizer to the float32 model and the quantized one, of sizes that all of them take."""

    def load(fields: dict, quantizer):
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
        sizes["eidetic_size"] = 64  # room for all tokens: rounding chooses no other ones
        torch.manual_seed(0)
        plain = BMojoForCausalLM(tiny_config(**sizes, **fields)).eval()
        plain.save_pretrained(tmp_path / "model")
        return plain, BMojoForCausalLM.from_pretrained(
            tmp_path / "model", quantization_config=quantizer(), device_map="cpu"
        )

    return load


@pytest.fixture
def ids():
    return torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("fields", VARIANTS)
@pytest.mark.parametrize(("quantizer", "get_weight", "bound"), QUANTIZERS)
def test_a_quantized_model_is_the_model_of_its_weights(load, ids, fields, quantizer, get_weight, bound):
    plain, model = load(fields, quantizer)
    expected = copy.deepcopy(plain)
    quantized = [name for name, module in model.named_modules() if is_quantized(module)]
    for name in quantized:
        expected.get_submodule(name).weight.data.copy_(get_weight(model.get_submodule(name)))
    assert len(quantized) >= 5 * model.config.num_hidden_layers
    assert "lm_head" not in quantized
    with torch.no_grad():
        want, before = expected(ids).logits, plain(ids).logits
        got, cache, parts = model(ids).logits, None, []
        for part in (ids[:, :25], *ids[:, 25:].split(1, 1)):
            out = model(part, cache=cache, use_cache=True)
            cache, parts = out.cache, [*parts, out.logits]
    assert rel_error(got, want) < bound
    assert rel_error(torch.cat(parts, 1), want) < bound
    assert rel_error(before, want) > 0
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 43)


@pytest.mark.parametrize("quantizer", [bitsandbytes_int8, torchao_int8])
def test_lora_trains_on_a_quantized_model(load, ids, quantizer):
    peft = pytest.importorskip("peft")
    _, model = load({}, quantizer)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(p.grad.any() for name, p in model.named_parameters() if "lora_B" in name)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
