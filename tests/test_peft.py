"""PEFT on B'MOJO: adapters reach every linear layer, merge, and load again; prompt tuning works, prefix tuning says why not."""

from functools import partial

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from bmojo.modeling_bmojo import BMojoForCausalLM
from bmojo_tests.fake_hub import build_repository


peft = pytest.importorskip("peft")

VARIANTS = [
    pytest.param({"tie_attn_weights": False, "use_qk_norm": True}, id="bmojo-mamba2"),
    pytest.param({"ssm_type": "mamba"}, id="bmojo-mamba"),
    pytest.param(
        {"layers_block_type": ["mamba", "mamba2", "sliding_attention", "full_attention"], "num_hidden_layers": 4},
        id="other-layers",
    ),
    pytest.param(
        {
            "layers_block_type": ["gated_deltanet", "bmojo"],
            "ssm_type": "gated_kalmanet",
            "tie_attn_weights": False,
            "fading_query": True,
            "kv_proj_rank": 3,
        },
        id="deltas",
    ),
]
DYNAMICS = ("A_log", "D", "dt_bias")


@pytest.fixture
def ids():
    return torch.randint(3, 97, (3, 23), generator=torch.Generator().manual_seed(1))


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


def adapted(model, **options):
    """The model with a LoRA adapter whose weights are as they begin, zero in B."""
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, **options))


def train(model, ids, steps=3, lr=0.05):
    """A few steps of AdamW on what is trainable; the losses before each."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def state(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def assert_same_bits(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("overrides", VARIANTS)
def test_all_linear_reaches_every_linear_layer_with_a_gradient(tiny_model, ids, overrides):
    base = tiny_model(**overrides)
    linears = {name for name, module in base.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    before = logits(base, ids)
    model = adapted(base, target_modules="all-linear")
    assert (
        set(model.targeted_module_names) == linears
    )  # PEFT keeps `out_proj` from model types on a list; not from ours
    assert torch.equal(logits(model, ids), before)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if "lora_B" in name}
    assert len(gradients) == len(linears)
    assert [
        name for name, grad in gradients.items() if grad is None or not grad.any() or not grad.isfinite().all()
    ] == []
    assert [name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name] == []


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
@pytest.mark.parametrize("overrides", VARIANTS)
def test_adapters_train_merge_and_unload(tiny_model, ids, overrides, options):
    before = state(tiny_model(**overrides, dtype=torch.float64))
    model = adapted(tiny_model(**overrides, dtype=torch.float64), target_modules="all-linear", **options)
    losses = train(model, ids)
    assert losses[-1] < losses[0]
    trained = logits(model, ids)
    with model.disable_adapter():
        assert (trained - logits(model, ids)).abs().max() > 1e-2
    model.merge_adapter()
    assert torch.allclose(logits(model, ids), trained, rtol=1e-9, atol=1e-10)
    model.unmerge_adapter()
    assert torch.allclose(logits(model, ids), trained, rtol=1e-9, atol=1e-10)
    merged = model.merge_and_unload()
    assert isinstance(merged, BMojoForCausalLM)
    assert torch.allclose(logits(merged, ids), trained, rtol=1e-9, atol=1e-10)
    assert merged.state_dict().keys() == before.keys()


@pytest.mark.parametrize("overrides", VARIANTS)
def test_unload_restores_every_bit(tiny_model, ids, overrides):
    model = adapted(tiny_model(**overrides), target_modules="all-linear")
    train(model, ids)
    restored = model.unload()
    want = tiny_model(**overrides)
    assert_same_bits(restored.state_dict(), want.state_dict())
    assert torch.equal(logits(restored, ids), logits(want, ids))


@pytest.mark.parametrize("overrides", VARIANTS)
def test_disabled_adapter_is_the_base(tiny_model, ids, overrides):
    """With trained dynamics too, which `unload` of PEFT would keep."""
    model = adapted(tiny_model(**overrides), target_modules="all-linear", modules_to_save=["dynamics"])
    train(model, ids)
    want = logits(tiny_model(**overrides), ids)
    assert not torch.equal(logits(model, ids), want)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), want)


@pytest.mark.parametrize("overrides", VARIANTS)
def test_adapters_of_a_bfloat16_base(tiny_model, ids, overrides):
    """PEFT keeps LoRA's weights in float32, so dtypes are mixed inside a layer."""
    base = tiny_model(**overrides, dtype=torch.bfloat16)
    model = adapted(base, target_modules="all-linear", modules_to_save=["dynamics"])
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
    losses = train(model, ids)
    assert losses[-1] < losses[0]
    assert logits(model, ids).dtype == torch.bfloat16
    assert [name for name, p in model.named_parameters() if "lora_B" in name and not p.any()] == []


@pytest.mark.parametrize("overrides", VARIANTS)
def test_saved_adapter_and_merged_model_load_again(tiny_model, tmp_path, ids, overrides):
    """In float64: in float32 the solver of Gated KalmaNet makes 1e-4 of the rounding of merged weights."""
    load = partial(BMojoForCausalLM.from_pretrained, dtype=torch.float64)
    tiny_model(**overrides, dtype=torch.float64).save_pretrained(tmp_path / "base")
    base = load(tmp_path / "base")
    model = adapted(base, target_modules="all-linear", modules_to_save=["dynamics"])
    train(model, ids)
    trained = logits(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(again, ids), trained)
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged, info = load(tmp_path / "merged", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.allclose(logits(merged, ids), trained, rtol=1e-9, atol=1e-9)


def test_adapter_of_a_repository_with_remote_code(tiny_model, tmp_path, ids):
    repository = build_repository(tmp_path / "bmojo-tiny", tiny_model(), kernels={})
    base = AutoModelForCausalLM.from_pretrained(repository, trust_remote_code=True)
    assert type(base) is not BMojoForCausalLM
    model = adapted(base, target_modules="all-linear", modules_to_save=["dynamics"])
    train(model, ids)
    model.save_pretrained(tmp_path / "adapter")

    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", trust_remote_code=True)
    assert torch.equal(logits(again, ids), logits(model, ids))
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged" / "modeling_bmojo.py").is_file()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    assert torch.allclose(logits(merged, ids), logits(model, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("overrides", VARIANTS)
def test_dynamics_can_be_trained_and_saved(tiny_model, tmp_path, ids, overrides):
    before = state(tiny_model(**overrides))
    model = adapted(tiny_model(**overrides), target_modules=["in_proj"], modules_to_save=["dynamics"])
    train(model, ids)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_model(**overrides), tmp_path).merge_and_unload().state_dict()
    names = [name for name in before if name.endswith(DYNAMICS)]
    assert {"A_log", "dt_bias"} <= {name.rpartition(".")[2] for name in names}  # not every SSM has a D
    assert_same_bits(
        {n: again[n] for n in names}, {n: x for n, x in state(model.merge_and_unload()).items() if n in names}
    )
    assert not any(torch.equal(again[name], before[name]) for name in names)


@pytest.mark.parametrize("ssm_type", ["mamba", "mamba2"])
def test_the_convolution_as_a_target(tiny_model, ids, ssm_type):
    """It is depthwise, and PEFT needs a rank divisible by the number of channels: too large to be of use, but exact."""
    with pytest.raises(ValueError, match=r"Targeting a BMojoConv1d with groups=.*rank is divisible by groups"):
        adapted(tiny_model(ssm_type=ssm_type), target_modules=["conv1d"])
    base = tiny_model(ssm_type=ssm_type, sliding_window=5)
    before = logits(base, ids)
    channels = base.model.layers[0].mixer.fading.conv1d.groups
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["conv1d"], r=channels)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="Merging is not supported"):
        model = peft.get_peft_model(base, config)
    assert torch.equal(logits(model, ids), before)
    losses = train(model, ids, steps=6)
    assert losses[-1] < losses[0]
    with pytest.raises(NotImplementedError, match="Merging is not supported"):
        model.merge_adapter()


@pytest.mark.parametrize("ssm_type", ["mamba", "mamba2"])
def test_prompt_tuning_trains_and_generates(tiny_model, ids, ssm_type):
    """A tuned prompt is what its embeddings in front of the tokens are."""
    plain = tiny_model(ssm_type=ssm_type)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7)
    model = peft.get_peft_model(tiny_model(ssm_type=ssm_type), config)
    losses = train(model, ids, lr=0.3)
    assert losses[-1] < losses[0]
    prompt = model.get_prompt(len(ids)).detach()
    embeds = torch.cat([prompt, plain.model.embed_tokens(ids)], 1)
    with torch.no_grad():
        want = plain(inputs_embeds=embeds).logits
        assert torch.allclose(logits(model, ids), want, atol=1e-5)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    mask = torch.ones(embeds.shape[:2], dtype=torch.int64)
    continued = plain.generate(inputs_embeds=embeds, attention_mask=mask, **options)
    got = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(got[:, ids.shape[1] :], continued)
    padding = torch.zeros(len(ids), 4, dtype=torch.int64)  # lands between the prompt and the tokens
    padded, mask = torch.cat([padding, ids], 1), torch.cat([padding, torch.ones_like(ids)], 1)
    got = model.generate(input_ids=padded, attention_mask=mask, **options)
    assert torch.equal(got[:, padded.shape[1] :], continued)


def test_prefix_tuning_names_the_alternative(tiny_model, ids):
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(tiny_model(), config)
    with pytest.raises(ValueError, match="use prompt tuning"):
        model(input_ids=ids, labels=ids)
    with pytest.raises(ValueError, match="use prompt tuning"):
        model.generate(input_ids=ids, max_new_tokens=3)


def test_target_modules_must_be_named(tiny_model):
    """PEFT knows defaults for its own list of model types only; the README's "all-linear" is the answer."""
    with pytest.raises(ValueError, match="target_modules"):
        adapted(tiny_model())


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=lambda config: "-".join(config),
)
def test_embeddings_in_an_adapter(tiny_model, ids, config):
    """PEFT puts modules of its own in the place of the embeddings."""
    model = tiny_model()
    plain = logits(model, ids)
    model = adapted(model, **config)
    torch.testing.assert_close(logits(model, ids), plain, rtol=0, atol=1e-5)
    losses = train(model, ids)
    assert losses[-1] < losses[0]
