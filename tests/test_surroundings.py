"""What goes on around a call: other modes, devices and dtypes before it, hooks of the Hub, records that went stale."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch._subclasses.fake_tensor import FakeTensorMode

from bmojo import kernels_bmojo, linear_bmojo
from bmojo.configuration_bmojo import BMojoConfig
from bmojo.modeling_bmojo import BMojoCache, BMojoForCausalLM


@pytest.fixture(scope="module")
def make_model(tiny_config):
    def make(**fields):
        torch.manual_seed(0)
        return BMojoForCausalLM(tiny_config(**fields)).eval()

    return make


def make_ids(rows=2, columns=23):
    return torch.randint(3, 97, (rows, columns), generator=torch.Generator().manual_seed(1))


def forget_tables():
    """As in a process that has just begun."""
    from bmojo import cpu_bmojo, modeling_bmojo

    for table in (modeling_bmojo._default_frequencies, cpu_bmojo._age_mask):
        table.cache_clear()


def _export(model, ids):
    torch.export.export(model, (ids,), {"use_cache": False})


def _fake(model, ids):
    with FakeTensorMode(allow_non_fake_inputs=True):
        BMojoForCausalLM(model.config)(torch.ones(1, 9, dtype=torch.long), use_cache=False)


@pytest.mark.parametrize("trace", [_export, _fake])
def test_a_trace_leaves_nothing_behind(make_model, trace):
    model, ids = make_model(), make_ids(1, 9)
    expected = model(ids, use_cache=False).logits
    forget_tables()
    trace(model, ids)
    assert torch.equal(model(ids, use_cache=False).logits, expected)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 12)


def test_the_default_device_changes_nothing(make_model):
    model, ids = make_model(), make_ids(1, 7)
    expected = model(ids).logits
    forget_tables()
    with torch.device("meta"):
        assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("types", [["full_attention", "bmojo"], ["hybrid", "sliding_attention"], ["mamba2", "bmojo"]])
@pytest.mark.parametrize("fixed", [True, False])
def test_autocast_changes_no_dtype_of_the_cache(make_model, types, fixed):
    model, ids = make_model(layers_block_type=types), make_ids(1, 9)
    cache = BMojoCache(model.config, max_cache_len=64 if fixed else None)
    model(ids[:, :3], cache=cache)
    before = [{name: tensor.dtype for name, tensor in layer.state.items()} for layer in cache.layers]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(ids[:, 3:8], cache=cache)
        model(ids[:, 8:], cache=cache)
        new = BMojoCache(model.config, max_cache_len=64 if fixed else None)
        assert model.generate(ids, max_new_tokens=3, do_sample=False, cache=new).shape == (1, 12)
    assert [{name: tensor.dtype for name, tensor in layer.state.items()} for layer in cache.layers] == before
    assert (
        model(ids[:, :1], cache=cache).logits - model(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:]
    ).abs().max() < 0.1


def test_generate_leaves_no_record_that_it_began(make_model):
    model, ids = make_model(), make_ids(1, 9)
    settings = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    cache = model.generate(ids, max_new_tokens=8, prompt_lookup_num_tokens=3, **settings).cache
    assert not cache.is_recording_past()
    assert not cache._log
    cache = BMojoCache(model.config)
    cache.activate_past_recording()  # the caller's own goes on
    model.generate(ids, max_new_tokens=8, cache=cache, **settings)
    cache.crop(-2)
    cache.stop_past_recording()
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-1)


def test_a_record_with_a_gap_is_not_used(make_model):
    model, ids = make_model(), make_ids(1, 12)
    cache = BMojoCache(model.config)
    model(ids[:, :4], cache=cache)
    cache.activate_past_recording()
    model(ids[:, 4:8], cache=cache)
    for layer in cache.layers:
        layer.record_past = False
    model(ids[:, 8:], cache=cache)
    cache.activate_past_recording()
    with pytest.raises(ValueError, match="the log holds the last 0"):
        cache.crop(-2)
    assert cache.seen_tokens == 12


@pytest.mark.parametrize("types", [["mamba2", "bmojo"], ["mamba", "bmojo"], ["bmojo", "bmojo"]])
def test_a_cache_whose_call_was_interrupted_is_not_gone_on_with(make_model, types):
    model, ids = make_model(layers_block_type=types), make_ids(1, 12)
    cache = BMojoCache(model.config)

    def interrupt(*_):
        raise KeyboardInterrupt

    with torch.no_grad():
        model(ids[:, :8], cache=cache)
        expected, twin = model(ids[:, 8:9], cache=copy.deepcopy(cache)).logits, copy.deepcopy(cache)
        hook = model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, 8:9], cache=cache)
        hook.remove()
        for same in (cache, copy.deepcopy(cache)):
            with pytest.raises(RuntimeError, match="interrupted"):
                model(ids[:, 8:9], cache=same)
        assert torch.equal(model(ids[:, 8:9], cache=twin).logits, expected)
        cache.reset()
        model(ids[:, :8], cache=cache)
        assert torch.equal(model(ids[:, 8:9], cache=cache).logits, expected)


def test_a_pickled_cache_has_no_record(make_model):
    model, ids = make_model(), make_ids(1, 12)
    cache = BMojoCache(model.config)
    cache.activate_past_recording()
    size = len(pickle.dumps(cache))
    model(ids, cache=cache)
    assert len(pickle.dumps(cache)) < size + 3 * cache.num_bytes()
    twin = pickle.loads(pickle.dumps(cache))
    with pytest.raises(ValueError, match="the log holds the last 0"):
        twin.crop(-1)
    assert torch.equal(model(ids[:, :1], cache=twin).logits, model(ids[:, :1], cache=cache).logits)


@pytest.mark.parametrize("columns", [1, 4])
@pytest.mark.parametrize("types", [["bmojo", "full_attention"], ["hybrid", "mamba2"]])
def test_training_goes_on_from_a_cache_read_in_inference_mode(make_model, types, columns):
    model, ids = make_model(layers_block_type=types), make_ids(1, 9 + columns)
    with torch.inference_mode():
        cache = model(ids[:, :9], use_cache=True).cache
    model(ids[:, 9:], cache=cache).logits.square().mean().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_gradients_of_every_sample_by_vmap(make_model):
    model, ids = make_model(), make_ids(3, 11)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters, row):
        call = torch.func.functional_call(model, parameters, (row[None],), {"use_cache": False})
        return call.logits.square().mean()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, ids)
    for number, row in enumerate(ids):
        for name, gradient in torch.func.grad(loss)(parameters, row).items():
            torch.testing.assert_close(found[name][number], gradient, rtol=1e-3, atol=1e-6)


def test_an_empty_call_where_rows_have_a_product_of_their_own(make_model, monkeypatch):
    model = make_model(pad_token_id=None, bos_token_id=None, eos_token_id=None)
    monkeypatch.setitem(linear_bmojo.ROW_PRODUCTS, torch.float32, (2, 10**6, 0))
    with torch.no_grad():
        assert model(torch.zeros(1, 0, dtype=torch.long)).logits.shape == (1, 0, 97)


def test_a_folder_that_is_gone_is_not_asked_of_the_hub(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(kernels_bmojo, "snapshot_download", lambda *args, **kwargs: asked.append(args))
    monkeypatch.setattr(kernels_bmojo, "__path__", [])
    kernels_bmojo._fetch.cache_clear()
    monkeypatch.chdir(tmp_path)
    kernels_bmojo.attach(SimpleNamespace(auto_map=None, name_or_path="models/bmojo-large"))
    assert asked == []
    assert kernels_bmojo.__path__ == []


def test_kernels_are_there_when_a_save_is_pushed(make_model, monkeypatch, tmp_path):
    model, uploaded = make_model(), []
    monkeypatch.setattr(BMojoForCausalLM, "is_remote_code", lambda self: True)

    def upload(self, folder, repo_id, times, **kwargs):
        kernels = tmp_path / "kernels"
        uploaded.append(
            (sorted(file.name for file in kernels.iterdir()), kernels.stat().st_mtime > times.get("kernels", 0))
        )

    monkeypatch.setattr("transformers.utils.hub.PushToHubMixin._upload_modified_files", upload)
    monkeypatch.setattr(
        "transformers.modeling_utils.create_repo", lambda *a, **k: SimpleNamespace(repo_id="me/m"), raising=False
    )
    for _ in range(2):
        model._upload_modified_files(tmp_path, "me/m", model._get_files_timestamps(tmp_path))
    assert len(uploaded) == 2
    assert all("ssd.py" in names and newer for names, newer in uploaded)


def test_a_save_keeps_the_entry_of_a_tokenizer(make_model, tmp_path):
    model = make_model(auto_map={"AutoTokenizer": ["tok.Mine", None]})
    model.save_pretrained(tmp_path)
    kept = BMojoConfig.from_pretrained(tmp_path).auto_map
    assert kept["AutoTokenizer"] == ["tok.Mine", None]
    assert kept["AutoConfig"] == "configuration_bmojo.BMojoConfig"


def test_rope_theta_beside_rope_scaling(tiny_config, tmp_path):
    scaling = {"rope_type": "linear", "factor": 2.0}
    config = tiny_config(rope_theta=5e5, rope_scaling=dict(scaling))
    assert config.rope_parameters == scaling | {"rope_theta": 5e5}
    assert tiny_config(rope_scaling=dict(scaling)).rope_parameters["rope_theta"] == 10000.0
    assert tiny_config(rope_theta=5e5).rope_parameters == {"rope_type": "default", "rope_theta": 5e5}
    config.save_pretrained(tmp_path)
    for name in ("rope_scaling", "rope_parameters"):
        with pytest.raises(StrictDataclassClassValidationError, match="rope_theta"):
            BMojoConfig.from_pretrained(tmp_path, **{name: dict(scaling)})


def test_a_negative_number_of_columns_is_refused(make_model):
    with pytest.raises(ValueError, match="logits_to_keep is -2"):
        make_model()(make_ids(), logits_to_keep=-2)
