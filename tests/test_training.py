"""Training as users do it: losses, accumulation, checkpointing, precision, Trainer and TRL, and what the weights become."""

import importlib.util
import logging
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload, disk_offload
from torch import nn
from transformers import AutoTokenizer, Trainer, TrainingArguments

from bmojo.attention_bmojo import BMojoMixer
from bmojo.kernels_bmojo import ssd_scan
from bmojo.modeling_bmojo import (
    BMojoForCausalLM,
    BMojoForQuestionAnswering,
    BMojoForSequenceClassification,
    BMojoForTokenClassification,
    BMojoModel,
    get_parameter_groups,
)
from bmojo.norms_bmojo import BMojoRMSNorm


ROOT = Path(__file__).resolve().parent.parent
EVERYTHING = {  # every kind of layer and of parameter
    "num_hidden_layers": 6,
    "layers_block_type": ["bmojo", "mamba", "mamba2", "sliding_attention", "full_attention", "bmojo"],
    "tie_attn_weights": False,
    "use_qk_norm": True,
    "attention_bias": True,
    "mlp_bias": True,
    "use_bias": True,
    "innovation_predictor": "learnable",
    "innovation_loss_coef": 0.5,
}
DELTAS = {
    "num_hidden_layers": 3,
    "layers_block_type": ["gated_kalmanet", "gated_deltanet", "bmojo"],
    "ssm_type": "gated_kalmanet",
    "tie_attn_weights": False,
    "fading_query": True,
    "use_qk_norm": True,
    "kv_proj_rank": 3,
    "kv_learnable_residual": True,
}
VARIANTS = [
    pytest.param({}, id="mamba2"),
    pytest.param({"ssm_type": "mamba"}, id="mamba"),
    pytest.param(EVERYTHING, id="every-layer"),
    pytest.param(DELTAS, id="deltas"),
]
FLOAT32 = 1e-6  # relative; transformers takes every loss in float32
LENGTHS = [23, 9, 1, 14]  # of the rows of a ragged batch: several windows (5) and chunks (3), and a single token


@pytest.fixture
def ids():
    return torch.randint(3, 97, (4, 23), generator=torch.Generator().manual_seed(1))


def pad(ids, side):
    """The rows cut to LENGTHS and padded again, or left as they are for "none": ids and attention mask."""
    if side == "none":
        return ids, torch.ones_like(ids)
    columns = torch.arange(ids.shape[1])
    lengths = torch.tensor(LENGTHS)[:, None]
    mask = columns < lengths if side == "right" else columns >= ids.shape[1] - lengths
    return ids.masked_fill(~mask, 0), mask.long()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train_step(model, **inputs):
    """Loss and gradients of one call in training mode."""
    model.train().zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), gradients(model)


def assert_close(got, want, rel=1e-12):
    """Equal up to `rel` of the largest entry, for every tensor of two dicts."""
    assert got.keys() == want.keys()
    for name in want:
        error = (got[name] - want[name]).abs().max().item()
        assert error <= rel * max(1.0, want[name].abs().max().item()), f"{name}: {error}"


def assert_same_bits(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name


def randomise(model, seed=3):
    """Put a value of its own in every parameter, so that nothing hides behind an initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 0.5)
    return model


# ----------------------------------------------------------------------------------------------------------------------
# The loss
# ----------------------------------------------------------------------------------------------------------------------


def cross_entropy(logits, targets):
    """Mean of -log p(target) over the (row, column, target) that count, written out."""
    log_p = logits.log_softmax(-1)
    return -sum(log_p[row, column, target] for row, column, target in targets) / len(targets)


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_loss_is_cross_entropy_of_the_next_token(tiny_model, ids, side):
    model = tiny_model(dtype=torch.float64)
    ids, mask = pad(ids, side)
    labels = ids.clone()  # pads keep their id as label: padding must not need -100
    labels[0, 4:7] = -100
    labels[3] = -100
    output = model(ids, attention_mask=mask, labels=labels, shift_labels=None)  # None: as if not given
    targets = [
        (row, column - 1, labels[row, column])
        for row in range(4)
        for column in range(1, 23)
        if mask[row, column] and mask[row, column - 1] and labels[row, column] != -100
    ]
    assert output.loss.item() == pytest.approx(cross_entropy(output.logits, targets).item(), rel=FLOAT32)


def test_a_row_of_ignored_labels_trains_nothing(tiny_model, ids):
    model = tiny_model(dtype=torch.float64)
    labels = ids.clone()
    labels[1:3] = -100
    loss, grads = train_step(model, input_ids=ids, labels=labels)
    rest_loss, rest_grads = train_step(model, input_ids=ids[[0, 3]], labels=ids[[0, 3]])
    assert loss.item() == pytest.approx(rest_loss.item(), rel=FLOAT32)
    assert_close(grads, rest_grads, rel=FLOAT32)


def test_shift_labels_are_taken_as_they_are(tiny_model, ids):
    model = tiny_model(dtype=torch.float64)
    logits = model(ids).logits
    shifted = ids.roll(-3, 1)  # no shift by one gives these, and the last column counts
    targets = [(row, column, shifted[row, column]) for row in range(4) for column in range(23)]
    loss = model(ids, labels=ids, shift_labels=shifted).loss
    assert loss.item() == pytest.approx(cross_entropy(logits, targets).item(), rel=FLOAT32)


LEARNABLE = {"innovation_predictor": "learnable", "innovation_loss_coef": 0.5}


@pytest.mark.parametrize(
    ("overrides", "side"),
    [
        pytest.param({}, "left", id="left-padding"),
        pytest.param({}, "right", id="right-padding"),
        pytest.param(LEARNABLE, "none", id="learnable"),  # its mean error equals the mean of means for equal lengths
    ],
)
@pytest.mark.parametrize("shifted", [False, True])
def test_accumulated_micro_batches_equal_one_batch(tiny_model, ids, overrides, side, shifted):
    model = tiny_model(dtype=torch.float64, **overrides).train()
    ids, mask = pad(ids, side)
    labels = ids.masked_fill(mask == 0, -100)
    items = (mask[:, 1:] * mask[:, :-1]).sum()
    whole = train_step(model, input_ids=ids, attention_mask=mask, labels=labels)
    model.zero_grad()
    parts = []
    for row in range(4):
        inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if shifted:  # as Trainer gives them where it has split the sequence: the labels themselves are not read
            masked = labels.masked_fill(F.pad(mask, (1, 0))[:, :-1] == 0, -100)
            inputs |= {"shift_labels": F.pad(masked[:, 1:], (0, 1), value=-100), "labels": torch.zeros_like(labels)}
        loss = model(**{name: x[row : row + 1] for name, x in inputs.items()}, num_items_in_batch=items).loss
        loss.backward()
        parts.append(loss.detach())
    assert sum(parts).item() == pytest.approx(whole[0].item(), rel=FLOAT32)
    assert_close(gradients(model), whole[1], rel=FLOAT32)


# ----------------------------------------------------------------------------------------------------------------------
# Gradients
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", VARIANTS)
def test_every_parameter_gets_a_gradient(tiny_model, ids, overrides):
    model = tiny_model(dtype=torch.float64, **overrides)
    _, grads = train_step(model, input_ids=ids, labels=ids)
    assert grads.keys() == dict(model.named_parameters()).keys()
    assert [name for name, grad in grads.items() if not grad.any() or not grad.isfinite().all()] == []


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_predictor_learns_from_its_own_error_alone(tiny_model, ids, side):
    ids, mask = pad(ids, side)
    labels = ids.masked_fill(mask == 0, -100)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    model = tiny_model(dtype=torch.float64, innovation_predictor="learnable", innovation_loss_coef=0.0)
    losses, grads = {}, {}
    for coef in (0.0, 0.5, 2.0):
        model.config.innovation_loss_coef = coef
        losses[coef], grads[coef] = train_step(model, **inputs)
    predictors = [name for name in grads[0.0] if "predictor" in name]
    assert len(predictors) == 2
    for name in predictors:
        assert not grads[0.0][name].any()  # the choice of tokens passes no gradient
        assert grads[0.5][name].any()
    assert_close({n: grads[2.0][n] for n in predictors}, {n: 4 * grads[0.5][n] for n in predictors})
    assert_same_bits(*({n: g for n, g in grads[coef].items() if n not in predictors} for coef in (0.0, 2.0)))

    with torch.no_grad():
        output = model(**inputs, output_eidetic=True)
    error = sum(innovation[mask.bool()].mean() for innovation in output.innovations)
    assert (losses[2.0] - losses[0.0]).item() == pytest.approx(2 * error.item(), rel=FLOAT32)
    assert model.eval()(**inputs).loss.item() == pytest.approx(losses[0.0].item(), rel=FLOAT32)  # not in evaluation


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("adapters", ["full", "lora"])
@pytest.mark.parametrize("overrides", VARIANTS)
def test_checkpointing_changes_no_gradient_and_no_selection(
    tiny_model, ids, monkeypatch, overrides, adapters, use_reentrant
):
    chosen = {}

    def memories(self, *args, original=BMojoMixer.memories):
        found = original(self, *args)
        chosen.setdefault(self.layer_idx, []).append(found)
        return found

    def run(checkpointing):
        chosen.clear()
        model = tiny_model(**overrides)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        if adapters == "lora":
            peft = pytest.importorskip("peft")
            model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
            generator = torch.Generator().manual_seed(0)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        return *train_step(model, input_ids=ids, labels=ids), dict(chosen)

    monkeypatch.setattr(BMojoMixer, "memories", memories)
    loss, grads, selected = run(checkpointing=False)
    checkpointed_loss, checkpointed_grads, checkpointed_selected = run(checkpointing=True)
    assert torch.equal(checkpointed_loss, loss)
    assert_same_bits(checkpointed_grads, grads)
    assert selected.keys() == checkpointed_selected.keys()
    for layer_idx, passes in checkpointed_selected.items():
        assert len(passes) == 2  # the layer did run again
        for indices in passes:
            assert all(map(torch.equal, indices, selected[layer_idx][0]))


def test_checkpointing_returns_no_cache_and_says_so(tiny_model, ids, caplog):
    from bmojo.modeling_bmojo import logger

    logger.warning_once.cache_clear()
    model = tiny_model().train()
    assert model(ids, use_cache=True).cache is not None
    model.activation_checkpointing_enable()
    with caplog.at_level(logging.WARNING):
        assert model(ids, use_cache=True).cache is None
    assert "use_cache=True does not go with gradient checkpointing" in caplog.text
    assert model.eval()(ids, use_cache=True).cache is not None


def test_training_returns_no_cache_unasked(tiny_model, ids):
    assert tiny_model().train()(ids, labels=ids).cache is None


# ----------------------------------------------------------------------------------------------------------------------
# Precision
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", VARIANTS)
def test_autocast_keeps_loss_and_states(tiny_model, ids, overrides):
    model = tiny_model(**overrides)
    loss, grads = train_step(model, input_ids=ids, labels=ids)
    with torch.autocast("cpu", torch.bfloat16):
        half_loss, half_grads = train_step(model, input_ids=ids, labels=ids)
        output = model(ids, use_cache=True)
    assert output.logits.dtype == torch.bfloat16  # autocast did act
    assert half_loss.item() == pytest.approx(loss.item(), rel=1e-2)
    assert half_grads.keys() == grads.keys()
    assert all(grad.isfinite().all() and grad.dtype == torch.float32 for grad in half_grads.values())
    wide = [name for name in output.cache.tensors() if name.endswith(("ssm", "innovation"))]
    assert wide
    assert {output.cache.tensors()[name].dtype for name in wide} == {torch.float32}


def test_autocast_leaves_the_scan_alone(tiny_model, form, ids, monkeypatch):
    """Its matrix products would round what the state accumulates to bfloat16."""
    scans = []

    def scan_twice(*args):
        assert torch.is_autocast_enabled("cpu")
        scans.append(ssd_scan(*args))
        with torch.autocast("cpu", enabled=False):
            scans.append(ssd_scan(*args))
        return scans[-2]

    monkeypatch.setattr("bmojo.ssm_bmojo.ssd_scan", scan_twice)
    with torch.autocast("cpu", torch.bfloat16):
        tiny_model()(ids)
    assert len(scans) == 4
    assert all(map(torch.equal, (*scans[0], *scans[2]), (*scans[1], *scans[3])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("overrides", VARIANTS)
def test_a_step_in_any_precision(tiny_model, ids, overrides, dtype):
    want, _ = train_step(tiny_model(dtype=torch.float64, **overrides), input_ids=ids, labels=ids)
    model = tiny_model(dtype=dtype, **overrides)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss, grads = train_step(model, input_ids=ids, labels=ids)
    assert loss.item() == pytest.approx(want.item(), rel=1e-12 if dtype == torch.float64 else 2e-2)
    assert {grad.dtype for grad in grads.values()} == {dtype}
    assert all(grad.isfinite().all() for grad in grads.values())
    optimizer.step()
    with torch.no_grad():
        output = model(ids, labels=ids, use_cache=True)
    assert output.loss.item() < loss.item()
    states = {name: x.dtype for name, x in output.cache.tensors().items() if name.endswith("ssm")}
    assert set(states.values()) == {torch.promote_types(dtype, torch.float32)}


# ----------------------------------------------------------------------------------------------------------------------
# Trainer and TRL
# ----------------------------------------------------------------------------------------------------------------------


def arguments(cls, folder, **overrides):
    options = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return cls(**options | overrides)


def history(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def run_trainer(model, folder, rows, **overrides):
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(model, arguments(TrainingArguments, folder, **overrides), train_dataset=data, eval_dataset=data)
    trainer.train()
    return trainer


@pytest.mark.parametrize("overrides", VARIANTS)
def test_trainer_accumulates_to_the_same_weights(tiny_model, tmp_path, ids, overrides):
    rows = list(torch.cat([ids, ids.flip(1), ids.roll(5, 1)]))
    trained = {}
    for batch, accumulation in ((1, 4), (4, 1)):
        model = tiny_model(**overrides)
        trainer = run_trainer(
            model,
            tmp_path,
            rows,
            optim="sgd",
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
        losses = history(trainer, "loss")
        assert len(losses) == 3
        assert math.isfinite(history(trainer, "eval_loss")[0])
        trained[batch] = model.state_dict(), losses
    start = tiny_model(**overrides).state_dict()
    assert not torch.equal(start["lm_head.weight"], trained[4][0]["lm_head.weight"])
    assert_close(trained[1][0], trained[4][0], rel=1e-5)
    assert trained[1][1] == pytest.approx(trained[4][1], rel=1e-4)


def test_trainer_evaluates_the_loss_of_a_plain_forward(tiny_model, tmp_path, ids):
    model = tiny_model()
    trainer = run_trainer(model, tmp_path, list(ids), per_device_eval_batch_size=4)
    losses = history(trainer, "loss")
    assert losses[-1] < losses[0]
    with torch.no_grad():
        want = model.eval()(ids, labels=ids).loss.item()
    assert history(trainer, "eval_loss") == [pytest.approx(want, rel=1e-5)]
    prediction = trainer.predict([{"input_ids": row, "labels": row} for row in ids])
    with torch.no_grad():
        assert torch.allclose(torch.tensor(prediction.predictions), model(ids).logits, atol=1e-5)


TEXTS = [
    "A short one.",
    "B'MOJO answers each token from three memories: a window, a fading one and an eidetic one.",
    "x y z",
]


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "padding-free"])
def test_sft_trainer(tiny_model, tmp_path, padding_free):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(ROOT)
    data = Dataset.from_dict({"text": TEXTS * 2})
    model = tiny_model(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    config = arguments(
        SFTConfig, tmp_path, padding_free=padding_free, max_length=None, per_device_eval_batch_size=3, bf16=False
    )
    trainer = SFTTrainer(
        model, args=config, train_dataset=data, eval_dataset=data.select(range(3)), processing_class=tokenizer
    )
    trainer.train()
    losses = history(trainer, "loss")
    assert len(losses) == 3
    assert losses[-1] < losses[0]

    rows = [torch.tensor([*tokenizer(text).input_ids, tokenizer.eos_token_id]) for text in TEXTS]
    with torch.no_grad():
        sums = [F.cross_entropy(model(row[None]).logits[0, :-1], row[1:], reduction="sum").item() for row in rows]
    want = sum(sums) / sum(len(row) - 1 for row in rows)  # neither pads nor neighbours in a packed row are seen
    assert history(trainer, "eval_loss") == [pytest.approx(want, rel=1e-4)]


# ----------------------------------------------------------------------------------------------------------------------
# Weight decay and initial weights
# ----------------------------------------------------------------------------------------------------------------------


def decay_free(name):
    return name.endswith(("A_log", ".D", "dt_bias", "norm.weight", "layernorm.weight", ".bias"))


@pytest.mark.parametrize("tied", [False, True])
def test_parameter_groups_spare_dynamics_norms_and_biases(tiny_model, tied):
    model = tiny_model(**EVERYTHING, tie_word_embeddings=tied)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = get_parameter_groups(model, weight_decay=0.5)
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    decayed, spared = ([names[id(parameter)] for parameter in group["params"]] for group in groups)
    assert sorted(decayed + spared) == sorted(names.values())
    assert sorted(spared) == sorted(name for name in names.values() if decay_free(name))

    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.AdamW(groups, lr=0.1).step()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, before[name] * (1 if decay_free(name) else 1 - 0.1 * 0.5)), name


def test_parameter_groups_of_a_peft_model(tiny_model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules="all-linear", modules_to_save=["dynamics"], use_dora=True)
    model = peft.get_peft_model(tiny_model(**EVERYTHING), config)
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    decayed, spared = ([names[id(p)] for p in group["params"]] for group in get_parameter_groups(model, 0.5))
    assert sorted(decayed + spared) == sorted(names.values())
    assert {name.rpartition(".")[2] for name in spared if "lora" not in name} == {"A_log", "D", "dt_bias"}
    assert all(("lora_A" in name or "lora_B" in name) for name in decayed)
    assert len([name for name in spared if name.endswith("A_log")]) == 4  # of bmojo, mamba, mamba2, bmojo


@pytest.mark.parametrize("ssm_type", ["mamba", "mamba2", "gated_deltanet", "gated_kalmanet"])
def test_initial_weights_are_the_documented_ones(tiny_model, ssm_type):
    many = {} if "mamba" in ssm_type else {"num_attention_heads": 192, "num_key_value_heads": 96, "head_dim": 2}
    model = tiny_model(
        **many,
        **EVERYTHING | {"num_hidden_layers": 2, "layers_block_type": ["bmojo", ssm_type]},
        ssm_type=ssm_type,
        hidden_size=96,
        mamba_head_dim=1,  # many heads: enough numbers to see a distribution
        time_step_min=0.01,
        time_step_max=0.05,
        initializer_range=0.3,
    )
    rates = []
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if name.endswith("dt_bias"):
            rates.append(F.softplus(parameter.detach()))
        elif name.endswith("A_log") and ssm_type != "mamba":
            rate = parameter.exp()
            assert 1 <= rate.min() < 2.5
            assert 14.5 < rate.max() <= 16
        elif name.endswith("A_log"):
            assert torch.allclose(parameter.exp(), torch.arange(1.0, 5.0).expand_as(parameter))
        elif name.endswith(".D") or isinstance(owner, BMojoRMSNorm):
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        elif name.endswith("predictor.weight"):
            assert torch.equal(parameter, torch.full_like(parameter, 1 / 3))
        elif isinstance(owner, nn.Conv1d) or name.endswith("dt_proj.weight"):
            bound = 4**-0.5 if isinstance(owner, nn.Conv1d) else model.config.time_step_rank**-0.5
            assert 0.95 * bound < parameter.abs().max() <= bound, name
        else:
            assert parameter.std().item() == pytest.approx(0.3, rel=0.1), name
    rates = torch.cat(rates)
    assert 0.00999 <= rates.min() < 0.011
    assert 0.046 < rates.max() <= 0.05001
    assert rates.log().mean().exp().item() == pytest.approx(math.sqrt(0.01 * 0.05), rel=0.1)  # log-uniform


@pytest.mark.parametrize("ssm_type", ["mamba", "mamba2"])
def test_initial_time_steps_have_a_floor(tiny_model, ssm_type):
    model = tiny_model(ssm_type=ssm_type, time_step_min=1e-5, time_step_max=0.1, time_step_floor=0.01)
    steps = torch.cat([F.softplus(x.detach()) for name, x in model.named_parameters() if name.endswith("dt_bias")])
    assert steps.min().item() == pytest.approx(0.01, rel=1e-4)
    assert 0.01 < steps.max() <= 0.1001


def test_learned_mixtures_of_value_heads_begin_as_repetitions(tiny_model):
    model = tiny_model(
        num_attention_heads=4,
        num_key_value_heads=2,
        ssm_type="gated_deltanet",
        tie_attn_weights=False,
        kv_proj_rank=3,
        kv_learnable_residual=True,
    )
    mixtures = [parameter for name, parameter in model.named_parameters() if name.endswith("mixture")]
    assert mixtures
    for mixture in mixtures:
        assert torch.equal(mixture, torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]))


def test_initializer_range_defaults_to_the_width(tiny_model):
    model = tiny_model(hidden_size=64)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(64**-0.5, rel=0.1)


def test_same_seed_same_weights(tiny_config):
    def make(seed):
        torch.manual_seed(seed)
        return BMojoForCausalLM(tiny_config(**EVERYTHING)).state_dict()

    assert_same_bits(make(5), make(5))
    random = [name for name, x in make(5).items() if not torch.equal(x, make(6)[name])]
    assert any(name.endswith("A_log") for name in random)
    assert any(name.endswith("dt_bias") for name in random)


# ----------------------------------------------------------------------------------------------------------------------
# Saving and loading
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": torch.bfloat16}, {"device_map": "cpu"}, {"dtype": torch.bfloat16, "device_map": "cpu"}],
    ids=["plain", "bfloat16", "device-map", "both"],
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_saved_weights_come_back(tiny_model, tmp_path, ids, options, tied):
    model = randomise(tiny_model(**EVERYTHING, tie_word_embeddings=tied))
    model.save_pretrained(tmp_path)
    loaded, info = BMojoForCausalLM.from_pretrained(tmp_path, output_loading_info=True, **options)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    dtype = options.get("dtype", torch.float32)
    want = {name: x if ".dynamics." in name else x.to(dtype) for name, x in model.state_dict().items()}
    assert_same_bits(loaded.state_dict(), want)
    assert {x.dtype for name, x in loaded.state_dict().items() if ".dynamics." in name} == {torch.float32}
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert not loaded.training
    with torch.no_grad():
        model.load_state_dict(want, assign=True)
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


HEADS = {
    BMojoForCausalLM: {"lm_head.weight"},
    BMojoForSequenceClassification: {"score.weight"},
    BMojoForTokenClassification: {"score.weight", "score.bias"},
    BMojoForQuestionAnswering: {"qa_outputs.weight", "qa_outputs.bias"},
}


@pytest.mark.parametrize("cls", HEADS)
@pytest.mark.parametrize("saved", ["base", "causal"])
def test_only_a_missing_head_is_initialised(tiny_model, tmp_path, cls, saved):
    model = randomise(tiny_model(**EVERYTHING))
    (model.model if saved == "base" else model).save_pretrained(tmp_path)
    loaded, info = cls.from_pretrained(tmp_path, output_loading_info=True, initializer_range=0.2)
    missing = set() if (cls, saved) == (BMojoForCausalLM, "causal") else HEADS[cls]
    assert set(info["missing_keys"]) == missing
    assert_same_bits(loaded.model.state_dict(), model.model.state_dict())
    for name in missing:
        parameter = loaded.get_parameter(name)
        if name.endswith("bias"):
            assert not parameter.any()
        else:
            assert parameter.std().item() == pytest.approx(0.2, rel=0.4)


@pytest.mark.parametrize(
    ("lost", "low", "high"),  # and the range of its initial values
    [
        ("0.mixer.fading.dynamics.dt_bias", math.log(math.expm1(0.001)), math.log(math.expm1(0.1))),
        ("1.mixer.dynamics.A_log", 0.0, math.log(4)),
        ("1.mixer.dt_proj.weight", -(2**-0.5), 2**-0.5),
        ("2.mixer.conv1d.weight", -0.5, 0.5),
        ("0.mixer.predictor.weight", 1 / 3, 1 / 3),
    ],
)
def test_only_a_lost_tensor_is_initialised(tiny_model, tmp_path, lost, low, high):
    """The initialisation of a module reaches every tensor that the checkpoint lacks, and none that it has."""
    lost = f"model.layers.{lost}"
    model = randomise(tiny_model(**EVERYTHING))
    state = model.state_dict()
    model.save_pretrained(tmp_path, state_dict={name: x for name, x in state.items() if name != lost})
    loaded, info = BMojoForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {lost}
    fresh = loaded.state_dict()
    tensor = fresh.pop(lost)
    assert low - 1e-5 <= tensor.min() <= tensor.max() <= high + 1e-5
    assert (tensor.min() < tensor.max()) == (low < high)
    del state[lost]
    assert_same_bits(fresh, state)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("size", [90, 101])
def test_vocabulary_can_be_resized(tiny_model, ids, tied, size):
    model = tiny_model(tie_word_embeddings=tied)
    ids = ids.clamp(max=89)
    before = model(ids).logits
    model.resize_token_embeddings(size)
    assert model.config.vocab_size == model.lm_head.out_features == size
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    output = model(ids, labels=torch.full_like(ids, size - 1))
    common = min(size, 97)
    assert torch.equal(output.logits[..., :common], before[..., :common])
    assert output.loss.isfinite()


@pytest.mark.parametrize("cls", [BMojoModel, *HEADS])
def test_embeddings_can_be_replaced(tiny_config, ids, cls):
    model = cls(tiny_config()).eval()
    assert model.get_input_embeddings() is model.base_model.embed_tokens
    new = nn.Embedding(97, 24)
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is model.base_model.embed_tokens is new
    if cls is BMojoForCausalLM:
        assert model.get_output_embeddings() is model.lm_head
        head = nn.Linear(24, 97, bias=False)
        model.set_output_embeddings(head)
        assert model.get_output_embeddings() is model.lm_head is head
    else:
        assert model.get_output_embeddings() is None


# ----------------------------------------------------------------------------------------------------------------------
# Outputs, and the other heads
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_hidden_states_are_those_of_every_layer(tiny_model, ids, side):
    model = tiny_model(dtype=torch.float64, **EVERYTHING)
    ids, mask = pad(ids, side)
    states = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    assert len(states) == 7
    mask = mask.bool()
    assert torch.equal(states[0][mask], model.model.embed_tokens(ids)[mask])
    assert torch.equal(states[-1], model.model(ids, attention_mask=mask.long()).last_hidden_state)
    for row in range(4):
        seen = []
        hooks = [
            layer.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out[0]))
            for layer in model.model.layers
        ]
        model(ids[row][mask[row]][None])
        for hook in hooks:
            hook.remove()
        seen[-1] = model.model.norm(seen[-1])
        for state, want in zip(states[1:], seen, strict=True):
            assert torch.allclose(state[row][mask[row]], want[0], rtol=1e-10, atol=1e-12)
    assert not any(state[~mask].any() for state in states[1:])


def test_hidden_states_by_configuration(tiny_model, ids):
    assert len(tiny_model(output_hidden_states=True)(ids).hidden_states) == 3
    assert tiny_model()(ids).hidden_states is None


@pytest.mark.parametrize(
    ("cls", "where"),
    [(cls, "argument") for cls in (BMojoModel, *HEADS)] + [(cls, "configuration") for cls in HEADS],
)
def test_tuple_instead_of_an_output(tiny_config, ids, cls, where):
    torch.manual_seed(0)
    model = cls(tiny_config()).eval()
    options = {"output_hidden_states": True}
    if cls in (BMojoModel, BMojoForCausalLM):
        options["output_eidetic"] = True
    want = model(ids, **options).to_tuple()
    if where == "argument":
        options["return_dict"] = False
    else:
        model.config.return_dict = False
    got = model(ids, **options)
    assert isinstance(got, tuple)
    assert len(got) == len(want)
    assert torch.equal(got[0], want[0])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("ssm_type", ["mamba", "mamba2"])
def test_sequence_classification_of_padded_rows(tiny_config, ids, side, ssm_type):
    model = BMojoForSequenceClassification(tiny_config(num_labels=3, ssm_type=ssm_type)).double().eval()
    padded, mask = pad(ids, side)
    labels = torch.tensor([0, 2, 1, 2])
    output = model(padded, attention_mask=mask, labels=labels)
    alone = torch.cat([model(row[keep.bool()][None]).logits for row, keep in zip(padded, mask, strict=True)])
    assert torch.allclose(output.logits, alone, rtol=1e-10)
    assert output.loss.item() == pytest.approx(F.cross_entropy(alone, labels).item(), rel=1e-10)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("side", ["left", "right"])
def test_token_classification_of_padded_rows(tiny_config, ids, side):
    model = BMojoForTokenClassification(tiny_config(num_labels=3)).double().eval()
    padded, mask = pad(ids, side)
    labels = (padded % 3).masked_fill(mask == 0, -100)
    output = model(padded, attention_mask=mask, labels=labels)
    alone = [model(row[keep.bool()][None]).logits[0] for row, keep in zip(padded, mask, strict=True)]
    assert torch.allclose(output.logits[mask.bool()], torch.cat(alone), rtol=1e-10)
    want = F.cross_entropy(torch.cat(alone), labels[mask.bool()])
    assert output.loss.item() == pytest.approx(want.item(), rel=1e-6)  # transformers takes it in float32


@pytest.mark.parametrize("side", ["left", "right"])
def test_question_answering_of_padded_rows(tiny_config, ids, side):
    model = BMojoForQuestionAnswering(tiny_config()).double().eval()
    padded, mask = pad(ids, side)
    first = mask.argmax(1)
    last = first + mask.sum(1) - 1
    output = model(padded, attention_mask=mask, start_positions=first, end_positions=last)
    for row, keep in enumerate(mask.bool()):
        alone = model(padded[row][keep][None])
        for name in ("start_logits", "end_logits"):
            assert torch.allclose(output[name][row][keep], alone[name][0], rtol=1e-10)
    want = F.cross_entropy(output.start_logits, first) + F.cross_entropy(output.end_logits, last)
    assert output.loss.item() == pytest.approx(want.item() / 2, rel=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# Weights that are elsewhere, or have no `weight`
# ----------------------------------------------------------------------------------------------------------------------


def assert_answers_as(model, plain, ids):
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
    options = {"max_new_tokens": 9, "do_sample": False, "min_new_tokens": 9}
    assert torch.equal(model.generate(ids[:, :7], **options), plain.generate(ids[:, :7], **options))


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights(tiny_model, tmp_path, ids, where):
    model = tiny_model(**EVERYTHING)
    if where == "cpu":
        cpu_offload(model, torch.device("cpu"))
    else:
        disk_offload(model, str(tmp_path), torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert_answers_as(model, tiny_model(**EVERYTHING), ids)


def test_device_map_that_splits_at_every_layer(tiny_model, tmp_path, ids):
    plain = tiny_model(**EVERYTHING)
    plain.save_pretrained(tmp_path / "model")
    device_map = {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(6)}
    device_map |= {"model.embed_tokens": "disk", "model.norm": "cpu", "lm_head": "disk"}
    model = BMojoForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert model.lm_head.weight.device.type == "meta"
    assert model.model.norm.weight.device.type == "cpu"
    assert_answers_as(model, plain, ids)


class FakeQuantLinear(nn.Module):
    """A linear layer as quantisation libraries make them: the numbers are in a buffer, and `weight` is of no use."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("packed", linear.weight.detach().clone())
        self.register_buffer("offset", None if linear.bias is None else linear.bias.detach().clone())

    @property
    def weight(self):
        raise RuntimeError("the weight of a linear layer was read from outside")

    def forward(self, x):
        return F.linear(x, self.packed, self.offset)


@pytest.mark.parametrize("overrides", VARIANTS)
def test_linear_layers_are_called_and_never_read(tiny_model, ids, overrides):
    plain, model = tiny_model(**overrides), tiny_model(**overrides)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name in linears:
        model.set_submodule(name, FakeQuantLinear(model.get_submodule(name)))
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    assert_answers_as(model, plain, ids)
    loss, grads = train_step(model, input_ids=ids, labels=ids)
    want_loss, want_grads = train_step(plain, input_ids=ids, labels=ids)
    assert torch.equal(loss, want_loss)
    assert_same_bits(grads, {name: want_grads[name] for name in grads})
    assert {name.rpartition(".")[0] for name in want_grads.keys() - grads.keys()} == set(linears)


def partition(model):
    """Leave parameters empty but while the module that owns them runs, as DeepSpeed's ZeRO-3 does."""
    full = {parameter: parameter.data for parameter in model.parameters()}

    def gather(module, *_):
        for parameter in module.parameters(recurse=False):
            parameter.data = full[parameter]

    def release(module, *_):
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0, dtype=parameter.dtype)

    for module in model.modules():
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
        release(module)


@pytest.mark.parametrize("overrides", VARIANTS)
def test_parameters_are_read_by_the_modules_that_own_them(tiny_model, ids, overrides):
    plain, model = tiny_model(**overrides), tiny_model(**overrides)
    partition(model)
    assert not any(parameter.numel() for parameter in model.parameters())
    assert_answers_as(model, plain, ids)
