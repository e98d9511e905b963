"""The converter's engine and command: what it reads, what it refuses, what it leaves behind, and what it costs."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Mamba2Config, Mamba2ForCausalLM

from bmojo.convert import Refusal, check, convert, read, write
from bmojo.convert.__main__ import main
from bmojo.convert.core import Piece, assemble
from bmojo.convert.engine import join, size_in_bytes
from bmojo.convert.source import name_tokenizer_class
from bmojo.convert.tensors import Assembled, Computed
from bmojo.modeling_bmojo import BMojoForCausalLM
from bmojo_tests.fake_hub import FakeHub, run_python


ROOT = Path(__file__).resolve().parent.parent
IDS = torch.arange(3, 40)[None]


def silently(source, destination, **options):
    return convert(source, destination, progress=False, say=lambda line: None, **options)


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def source(llama, tmp_path) -> Path:
    """A folder with a tiny Llama, its tokenizer and licence."""
    folder = tmp_path / "source"
    llama.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / name, folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "LICENSE").write_text("MIT")
    (folder / "README.md").write_text("their model card")
    (folder / "modeling_evil.py").write_text("raise RuntimeError('code of a source must not run')")
    return folder


def assert_nothing_left(tmp_path, *names):
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def edit(folder: Path, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def logits(folder, **options):
    with torch.no_grad():
        return BMojoForCausalLM.from_pretrained(folder, **options).eval()(IDS, use_cache=False).logits


# ----------------------------------------------------------------------------------------------------------------------
# What comes out
# ----------------------------------------------------------------------------------------------------------------------


def test_command_from_the_hub_makes_a_folder_that_loads_alone(source, llama, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with FakeHub() as hub:
        commit = hub.publish("acme/tiny-llama", source)
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        arguments = ["acme/tiny-llama", "result", "--revision", commit, "--verify"]
        done = subprocess.run(
            [sys.executable, str(ROOT / "convert"), *arguments],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
        )
        asked = {path.rpartition("/")[2] for _, path, _ in hub.requests if "/resolve/" in path}
    assert done.returncode == 0, done.stderr
    assert "is llama" in done.stdout
    assert "Verified" in done.stdout
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= asked
    assert not asked & {"README.md", "modeling_evil.py", "pytorch_model.bin"}
    loaded = run_python(
        """
import json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("result", trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained("result", trust_remote_code=True)
text = tokenizer.apply_chat_template([{"role": "user", "content": "a word"}], tokenize=False)
ids = torch.arange(3, 40)[None]
print(json.dumps({"logits": model(ids).logits[0, -1].tolist(), "text": text, "type": model.config.model_type}))
""",
        home=tmp_path / "other-home",
        cwd=elsewhere,
    ).answer
    assert loaded["type"] == "bmojo"
    assert loaded["text"] == "a word"
    with torch.no_grad():
        assert loaded["logits"] == pytest.approx(llama(IDS).logits[0, -1].tolist(), rel=1e-4, abs=1e-6)


def test_shards_and_pickles_from_the_hub_and_from_its_cache(source, tmp_path):
    want = silently(source, tmp_path / "want")
    weights, half = load_file(source / "model.safetensors"), 9
    shards = {"first.safetensors": sorted(weights)[:half], "second.safetensors": sorted(weights)[half:]}
    with FakeHub() as hub:
        (source / "model.safetensors").unlink()
        torch.save(weights, source / "pytorch_model.bin")
        hub.publish("acme/pickled", source)
        for file, names in shards.items():  # beside the pickle, which then is not asked for
            save_file({name: weights[name] for name in names}, source / file)
        weight_map = {name: file for file, names in shards.items() for name in names}
        (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        hub.publish("acme/sharded", source)
        code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from huggingface_hub import constants
from convert import convert
for name in ("pickled", "sharded"):
    convert("acme/" + name, name, progress=False, say=lambda line: None)
constants.HF_HUB_OFFLINE = True
convert("acme/pickled", "offline", progress=False, say=lambda line: None)
print("{{}}")
"""
        run_python(code, home=tmp_path / "home", cwd=tmp_path, HF_ENDPOINT=hub.url)
        asked = [path for _, path, _ in hub.requests]
    assert any("pickled/resolve" in path and path.endswith("pytorch_model.bin") for path in asked)
    assert not any("sharded/resolve" in path and path.endswith("pytorch_model.bin") for path in asked)
    for name in ("pickled", "sharded", "offline"):
        assert (tmp_path / name / "model.safetensors").read_bytes() == (want / "model.safetensors").read_bytes()


def test_module_form_of_the_command(source, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "convert", "--help"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "--to-bmojo" in done.stdout


def test_everything_that_belongs_comes_along(source, tmp_path):
    result = silently(source, tmp_path / "deep" / "er" / "result")
    names = {path.name for path in result.iterdir()}
    code = {path.name for path in ROOT.glob("*_bmojo.py")}
    along = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE", "generation_config.json"}
    assert names - {"kernels"} == code | along | {"config.json", "model.safetensors"}
    shipped = {path.name for path in (ROOT / "kernels").glob("*.py")}
    assert {path.name for path in (result / "kernels").glob("*")} == shipped
    assert result.stat().st_mode & 0o777 == source.stat().st_mode & 0o777


def test_tokenizer_of_another_folder(source, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text("{}")
    result = silently(source, tmp_path / "result", tokenizer=other)
    assert (result / "tokenizer.json").read_text() == "{}"
    assert not (result / "tokenizer_config.json").exists()
    assert (result / "generation_config.json").exists()
    with pytest.raises(Refusal, match="no tokenizer"):
        silently(source, tmp_path / "again", tokenizer=tmp_path)


@pytest.mark.parametrize(("kind", "name"), [("mamba", "GPTNeoXTokenizer"), ("llama", "PreTrainedTokenizerFast")])
def test_tokenizer_class_that_the_model_type_implied_is_written_down(tmp_path, kind, name):
    path = tmp_path / "tokenizer_config.json"
    path.write_text("{}")
    name_tokenizer_class(path, kind)
    assert json.loads(path.read_text())["tokenizer_class"] == name
    name_tokenizer_class(path, "qwen3")
    assert json.loads(path.read_text())["tokenizer_class"] == name


def test_shards_and_their_index_hold_the_same_model(source, llama, tmp_path):
    one, many = silently(source, tmp_path / "one"), silently(source, tmp_path / "many", max_shard_size="5KB")
    index = json.loads((many / "model.safetensors.index.json").read_text())
    shards = sorted(many.glob("model-*.safetensors"))
    assert len(shards) > 3
    assert {path.name for path in shards} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(4 * parameter.numel() for parameter in llama.parameters())
    for path in shards:
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert path.stat().st_size < 5500 or len(file.keys()) == 1
            assert all(index["weight_map"][name] == path.name for name in file.keys())  # noqa: SIM118
    assert torch.equal(logits(one), logits(many))
    again = silently(many, tmp_path / "again", export="llama")
    want = load_file(source / "model.safetensors")
    got = load_file(again / "model.safetensors")
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_sharded_source(llama, tmp_path):
    llama.save_pretrained(tmp_path / "source", max_shard_size="5KB")
    llama.save_pretrained(tmp_path / "whole")
    assert (tmp_path / "source" / "model.safetensors.index.json").exists()
    results = [silently(tmp_path / name, tmp_path / f"{name}-result") for name in ("source", "whole")]
    assert (results[0] / "model.safetensors").read_bytes() == (results[1] / "model.safetensors").read_bytes()


@pytest.mark.parametrize("shards", [1, 2])
def test_pickled_source(llama, source, tmp_path, shards):
    weights = load_file(source / "model.safetensors")
    want = silently(source, tmp_path / "result")
    (source / "model.safetensors").unlink()
    weights["model.norm.weight"] = torch.stack([weights["model.norm.weight"], torch.zeros(24)], 1)[:, 0]  # strided
    names = sorted(weights)
    parts = [names] if shards == 1 else [names[:7], names[7:]]
    files = (
        [f"pytorch_model-{i:05d}-of-{shards:05d}.bin" for i in range(shards)] if shards > 1 else ["pytorch_model.bin"]
    )
    for file, part in zip(files, parts, strict=True):
        torch.save({name: weights[name] for name in part}, source / file)
    if shards > 1:
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    got = silently(source, tmp_path / "pickled")
    assert (got / "model.safetensors").read_bytes() == (want / "model.safetensors").read_bytes()


def test_dtypes_are_kept_or_changed_but_for_the_dynamics(tmp_path):
    torch.manual_seed(0)
    model = Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=50, hidden_size=16, num_heads=4, head_dim=8, num_hidden_layers=2, state_size=4, n_groups=1
        )
    ).bfloat16()
    model.backbone.layers[0].mixer.A_log.data = model.backbone.layers[0].mixer.A_log.data.float() + 0.01
    model.save_pretrained(tmp_path / "source")
    stored = load_file(tmp_path / "source" / "model.safetensors")
    kept = load_file(silently(tmp_path / "source", tmp_path / "kept") / "model.safetensors")
    assert {name for name, tensor in kept.items() if tensor.dtype == torch.float32} == {
        "model.layers.0.mixer.dynamics.A_log"
    }
    assert torch.equal(kept["model.layers.0.mixer.dynamics.A_log"], stored["backbone.layers.0.mixer.A_log"])
    assert json.loads((tmp_path / "kept" / "config.json").read_text())["dtype"] == "bfloat16"

    result = silently(tmp_path / "source", tmp_path / "half", dtype="float16", verify=True)
    for name, tensor in load_file(result / "model.safetensors").items():
        assert tensor.dtype == (torch.float32 if "dynamics" in name else torch.float16)
    assert json.loads((result / "config.json").read_text())["dtype"] == "float16"
    back = load_file(silently(result, tmp_path / "back", export="mamba2", dtype="bfloat16") / "model.safetensors")
    dynamics = {"A_log", "D", "dt_bias"}
    for name, tensor in back.items():
        assert tensor.dtype == (torch.float32 if name.rpartition(".")[2] in dynamics else torch.bfloat16)


def test_tied_embeddings_that_are_stored_twice(source, tmp_path, capsys):
    edit(source, tie_word_embeddings=True)
    weights = load_file(source / "model.safetensors")
    weights |= {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    config = LlamaConfig.from_pretrained(source)
    frequencies = config.rope_parameters["rope_theta"] ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
    weights |= {"model.layers.1.self_attn.rotary_emb.inv_freq": frequencies}
    save_file(weights, source / "model.safetensors")
    result = convert(source, tmp_path / "result", progress=False)
    told = capsys.readouterr().out
    assert "Not used (repeats model.embed_tokens.weight): lm_head.weight." in told
    assert "Not used (a table that follows from rope_theta): model.layers.1.self_attn.rotary_emb.inv_freq." in told
    assert "lm_head.weight" not in load_file(result / "model.safetensors")
    weights["lm_head.weight"][7, 3] += 1
    save_file(weights, source / "model.safetensors")
    with pytest.raises(Refusal, match="differs"):
        silently(source, tmp_path / "again")
    for wrong in (frequencies * 1.1, frequencies[1:], torch.arange(len(frequencies))):
        save_file(
            weights | {"model.layers.1.self_attn.rotary_emb.inv_freq": wrong.contiguous()},
            source / "model.safetensors",
        )
        with pytest.raises(Refusal, match="does not hold the rotary frequencies"):
            silently(source, tmp_path / "again")


def test_force_replaces_a_model_folder_only_after_success(source, tmp_path):
    result = silently(source, tmp_path / "result")
    (result / "old").touch()
    with pytest.raises(Refusal, match="exists"):
        silently(source, result)
    edit(source, hidden_act="unheard_of")
    with pytest.raises(Refusal):
        silently(source, result, force=True)
    assert (result / "old").exists()
    edit(source, hidden_act="silu")
    silently(source, result, force=True)
    assert not (result / "old").exists()
    assert_nothing_left(tmp_path, "source", "result")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").touch()
    for precious in (tmp_path / "letters", source, tmp_path):
        with pytest.raises(Refusal):
            silently(source, precious, force=True)
    assert (tmp_path / "letters" / "dear.txt").exists()


def test_force_replaces_no_checkout_and_not_where_one_is(source, tmp_path, monkeypatch):
    result = silently(source, tmp_path / "result")
    (result / ".git").mkdir()
    with pytest.raises(Refusal, match="result is a checkout"):
        silently(source, result, force=True)
    (result / ".git").rmdir()
    monkeypatch.chdir(result)
    for destination in ("", ".", result, write.ROOT):
        with pytest.raises(Refusal, match="--force does not replace it"):
            silently(source, destination, force=True)
    assert (result / "config.json").exists()
    assert (write.ROOT / "config.json").exists()


def test_a_tokenizer_with_code_of_its_own_is_refused(source, tmp_path):
    fields = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["tok_mine.Mine", None]}}
    (source / "tokenizer_config.json").write_text(json.dumps(fields))
    with pytest.raises(Refusal, match="auto_map, code of its own, which is not copied"):
        silently(source, tmp_path / "result")
    assert_nothing_left(tmp_path, "source")


def test_an_empty_destination_is_not_touched_either(source, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refusal, match="exists"):
        silently(source, tmp_path / "empty")


# ----------------------------------------------------------------------------------------------------------------------
# Damaged and hostile sources: a clear error, an exit status, nothing left
# ----------------------------------------------------------------------------------------------------------------------


def truncate(folder):
    path = folder / "model.safetensors"
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 5)


def lengthen(folder):
    with open(folder / "model.safetensors", "ab") as file:
        file.write(b"?")


def cut_header(folder):
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(100)


def garbage(folder):
    (folder / "model.safetensors").write_bytes(b"\x10" + bytes(7) + b"no header at all")


def overlap(folder):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))


def change(folder, edit_weights):
    weights = load_file(folder / "model.safetensors")
    edit_weights(weights)
    save_file(weights, folder / "model.safetensors")


NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"


def damage(folder: Path, how: str):
    """Do to a source what the name says."""
    weights = folder / "model.safetensors"
    if how in globals():
        globals()[how](folder)
    elif how == "unknown key":
        change(folder, lambda tensors: tensors.update({"model.layers.0.surprise": torch.ones(2)}))
    elif how == "missing key":
        change(folder, lambda tensors: tensors.pop(NORM))
    elif how == "wrong shape":
        change(folder, lambda tensors: tensors.update({NORM: torch.ones(25)}))
    elif how == "transposed":
        change(folder, lambda tensors: tensors.update({EMBEDDING: tensors[EMBEDDING].T.contiguous()}))
    elif how == "nan":
        change(folder, lambda tensors: tensors[EMBEDDING][3].fill_(torch.nan))
    elif how == "integers":
        change(folder, lambda tensors: tensors.update({NORM: torch.ones(24, dtype=torch.int8)}))
    elif how == "no weights":
        weights.unlink()
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "config is a list":
        (folder / "config.json").write_text("[1]")
    elif how == "config is cut":
        (folder / "config.json").write_text('{"model_type": "lla')
    elif how == "unknown format":
        edit(folder, model_type="gpt2")
    elif how in ("cut pickle", "pickle of noise"):
        torch.save(load_file(weights), folder / "pytorch_model.bin")
        content = (folder / "pytorch_model.bin").read_bytes()
        (folder / "pytorch_model.bin").write_bytes(content[:-700] if how == "cut pickle" else content[::-1])
        weights.unlink()
    elif how == "too many layers":
        edit(folder, num_hidden_layers=10**9)
    elif how == "missing shard":
        weight_map = dict.fromkeys(load_file(weights), "model-00001-of-00001.safetensors")
        weights.unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    elif how == "escaping index":
        shutil.copy(weights, folder.parent / "elsewhere.safetensors")
        weight_map = dict.fromkeys(load_file(weights), "../elsewhere.safetensors")
        weights.unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


DAMAGES = [
    ("truncate", r"model.safetensors is truncated: \d+ bytes are announced"),
    ("lengthen", "model.safetensors is longer than its header"),
    ("cut_header", "model.safetensors is truncated"),
    ("garbage", "model.safetensors is no safetensors file"),
    ("overlap", "overlap"),
    ("unknown key", "1 tensors that its config.json does not mean: model.layers.0.surprise"),
    ("missing key", "lacks 1 tensors that its config.json means: model.norm.weight"),
    ("wrong shape", r"model.norm.weight has shape \(25,\), config.json means \(24,\)"),
    ("transposed", r"model.embed_tokens.weight has shape \(24, 61\)"),
    ("nan", "model.embed_tokens.weight holds values that are not finite"),
    ("integers", "quantised.*model.norm.weight"),
    ("cut pickle", "pytorch_model.bin cannot be read"),
    ("pickle of noise", "pytorch_model.bin (cannot be read|was refused)"),
    ("no weights", "holds no weights"),
    ("no config", "config.json is missing"),
    ("config is a list", "not a JSON object"),
    ("config is cut", "no valid JSON"),
    ("unknown format", "model_type 'gpt2'. Known are llama, mistral, qwen3, mamba"),
    ("too many layers", "num_hidden_layers = 1000000000"),
    ("missing shard", "missing: model-00001-of-00001.safetensors"),
    ("escaping index", "no weight file beside it"),
]


@pytest.mark.parametrize(("how", "told"), DAMAGES, ids=[how for how, _ in DAMAGES])
def test_damaged_source(source, tmp_path, capfd, how, told):
    damage(source, how)
    before = {path.name for path in tmp_path.iterdir()}
    assert main([str(source), str(tmp_path / "new" / "result")]) == 1
    error = capfd.readouterr().err
    assert re.search(told, error), error
    assert "Traceback" not in error
    assert {path.name for path in tmp_path.iterdir()} == before


class Malice:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['MALICE']}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_malicious_pickle_does_not_run(source, tmp_path, capfd, monkeypatch, zipped):
    monkeypatch.setenv("MALICE", str(tmp_path / "was-run"))
    weights = dict(load_file(source / "model.safetensors")) | {"model.norm.weight": Malice()}
    (source / "model.safetensors").unlink()
    torch.save(weights, source / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert main([str(source), str(tmp_path / "result")]) == 1
    error = capfd.readouterr().err
    assert "pytorch_model.bin" in error
    assert "Traceback" not in error
    if zipped:
        assert "system" in error
    assert_nothing_left(tmp_path, "source")


@pytest.mark.parametrize(
    "content", [[1, 2], {"model": {"a": torch.ones(1)}}, {3: torch.ones(1)}, {"a": torch.ones(2).to_sparse()}]
)
def test_pickle_of_something_else(source, tmp_path, content):
    (source / "model.safetensors").unlink()
    torch.save(content, source / "pytorch_model.bin")
    with pytest.raises(Refusal, match=r"pytorch_model\.bin"):
        silently(source, tmp_path / "result")


def test_pickle_under_an_old_torch(source, tmp_path, monkeypatch):
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    silently(source, tmp_path / "result")  # safetensors are read where they are beside it
    (source / "model.safetensors").unlink()
    with pytest.raises(Refusal, match=r"torch 2\.6 or newer"):
        silently(source, tmp_path / "again")


@settings(max_examples=150, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.booleans(), st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=3)
)
def test_flipped_bytes_are_read_or_refused(tmp_path_factory, pickled, flips):
    folder, weights = tmp_path_factory.mktemp("flipped"), {"a": torch.randn(3, 4), "b.c": torch.randn(5).bfloat16()}
    path = folder / ("pytorch_model.bin" if pickled else "model.safetensors")
    (torch.save if pickled else save_file)(weights, path)
    content = bytearray(path.read_bytes())
    for place, byte in flips:
        content[int(place * (len(content) if pickled else 150))] = byte  # of safetensors, in the header
    path.write_bytes(content)
    with contextlib.suppress(Refusal):
        for tensor in read.read_checkpoint(folder).values():
            if tensor.dtype is not None:
                tensor.whole()


def test_overflow_in_a_narrower_dtype(source, tmp_path):
    change(source, lambda tensors: tensors[EMBEDDING][3].fill_(1e6))
    with pytest.raises(Refusal, match=r"1e\+06, too large for torch.float16"):
        silently(source, tmp_path / "result", dtype="float16")
    assert_nothing_left(tmp_path, "source")


def test_failed_verification_leaves_nothing(source, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "LARGEST", 1e-12)
    with pytest.raises(Refusal, match="verification failed"):
        silently(source, tmp_path / "result", verify=True)
    assert_nothing_left(tmp_path, "source")


def test_verification_sees_a_wrong_conversion(source, tmp_path, monkeypatch):
    load = check.load_result

    def swapped(*args):
        model = load(*args)
        mlp = model.model.layers[0].mlp
        mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj
        return model

    monkeypatch.setattr(check, "load_result", swapped)
    with pytest.raises(Refusal, match="verification failed: logits differ"):
        silently(source, tmp_path / "result", verify=True)
    assert_nothing_left(tmp_path, "source")


def test_interruption_leaves_nothing(source, tmp_path, capfd, monkeypatch, request):
    change(source, lambda tensors: tensors[EMBEDDING][3].fill_(torch.nan))
    for number in (signal.SIGINT, signal.SIGHUP):
        request.addfinalizer(partial(signal.signal, number, signal.getsignal(number)))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and what nohup has started this one
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        monkeypatch.setattr(write, "say_not_finite", lambda *_, number=number: signal.raise_signal(number))
        assert main([str(source), str(tmp_path / "result")]) == 130
        assert "Stopped" in capfd.readouterr().err
        assert_nothing_left(tmp_path, "source")
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # under nohup it goes on
    assert main([str(source), str(tmp_path / "result")]) == 0


def test_file_that_cannot_grow(source, tmp_path, capfd):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
    try:
        status = main([str(source), str(tmp_path / "result")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert status == 1
    assert "File too large" in capfd.readouterr().err
    assert_nothing_left(tmp_path, "source")


def test_full_disk(source, tmp_path, capfd):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no tmpfs may be mounted here")
    try:
        assert main([str(source), str(disk / "deep" / "result")]) == 1
        assert "No space left on device" in capfd.readouterr().err
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"layers": [0]}, "--layers goes with --to-bmojo"),
        ({"to_bmojo": True, "export": "llama"}, "exclude each other"),
        ({"export": "gpt2"}, "no format 'gpt2'"),
        ({"dtype": "int8"}, "choose from float32"),
        ({"max_shard_size": "big"}, "--max-shard-size is 'big'"),
        ({"max_shard_size": 0}, "--max-shard-size is 0"),
        ({"revision": "v1"}, "is a folder, which has no revisions"),
        ({"tokenizer": "nowhere/at-all"}, "out of reach"),
    ],
)
def test_options_that_do_not_fit(source, tmp_path, options, told):
    with pytest.raises(Refusal, match=told):
        silently(source, tmp_path / "result", **options)
    assert_nothing_left(tmp_path, "source")


def test_sources_that_are_nowhere(tmp_path):
    for name, told in (
        ("nowhere/at-all", "out of reach"),
        ("a/b/c", "cannot be a repository"),
        (str(tmp_path / "x"), "no folder"),
    ):
        with pytest.raises(Refusal, match=told):
            silently(name, tmp_path / "result")
    (tmp_path / "file").touch()
    with pytest.raises(Refusal, match="is a file"):
        silently(tmp_path / "file", tmp_path / "result")
    assert_nothing_left(tmp_path, "file")


# ----------------------------------------------------------------------------------------------------------------------
# The way back
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "fields", "told"),
    [
        (
            "llama",
            {"layers_block_type": ["full_attention", "sliding_attention"]},
            "layers_block_type has 'sliding_attention'",
        ),
        ("llama", {"layers_block_type": ["full_attention"] * 2, "use_qk_norm": True}, "use_qk_norm is True"),
        (
            "llama",
            {"layers_block_type": ["full_attention"] * 2, "intermediate_size": None},
            "intermediate_size is None",
        ),
        (
            "mistral",
            {"layers_block_type": ["sliding_attention"] * 2, "attention_bias": True},
            "attention_bias is True",
        ),
        ("qwen3", {"layers_block_type": ["sliding_attention"] * 2}, "use_qk_norm is False"),
        ("qwen3", {"layers_block_type": ["full_attention", "bmojo"], "use_qk_norm": True}, "'bmojo' for layer 1"),
        ("mamba", {"layers_block_type": ["mamba"] * 2}, "intermediate_size is 40"),
        (
            "mamba2",
            {"layers_block_type": ["mamba2"] * 2, "intermediate_size": None, "mamba_head_dim": 5},
            "mamba_num_heads",
        ),
        (
            "mamba2",
            {"layers_block_type": ["mamba2"] * 2, "intermediate_size": None, "mamba_norm_before_gate": True},
            "mamba_norm_before_gate is True",
        ),
    ],
)
def test_export_of_what_is_no_special_case(tiny_model, tmp_path, form, fields, told):
    tiny_model(**fields).save_pretrained(tmp_path / "source")
    with pytest.raises(Refusal, match=told):
        silently(tmp_path / "source", tmp_path / "result", export=form)
    assert_nothing_left(tmp_path, "source")


def test_export_of_our_own_model_verifies(tiny_model, tmp_path, capsys):
    fields = {"layers_block_type": ["full_attention", "sliding_attention"], "use_qk_norm": True}
    tiny_model(**fields).save_pretrained(tmp_path / "source")
    result = convert(tmp_path / "source", tmp_path / "result", export="qwen3", verify=True, progress=False)
    assert "Verified" in capsys.readouterr().out
    assert not list(result.glob("*.py"))
    theirs = AutoModelForCausalLM.from_pretrained(result).eval()
    with torch.no_grad():
        assert torch.allclose(theirs(IDS).logits, logits(tmp_path / "source"), atol=1e-5)


def test_a_folder_of_ours_needs_a_wish_and_known_fields(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path / "source")
    with pytest.raises(Refusal, match="already"):
        silently(tmp_path / "source", tmp_path / "result")
    edit(tmp_path / "source", eidetic_shape="round")
    with pytest.raises(Refusal, match="eidetic_shape = 'round'"):
        silently(tmp_path / "source", tmp_path / "result", export="llama")


def test_from_one_foreign_format_to_another(source, llama, tmp_path):
    """What is a special case of both: a Llama is a Mistral without a window."""
    result = silently(source, tmp_path / "result", export="mistral", verify=True)
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(result)(IDS).logits, llama(IDS).logits)


# ----------------------------------------------------------------------------------------------------------------------
# Parts
# ----------------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_stretches_of_pieces_are_those_of_the_whole(data):
    stored = {name: torch.randn(rows, 2, 3) for name, rows in (("a", 4), ("b", 6))}
    tensors = {name: Computed(tuple(t.shape), t.dtype, lambda t=t: t.split(3)) for name, t in stored.items()}
    pieces = []
    for _ in range(data.draw(st.integers(1, 4))):
        name = data.draw(st.sampled_from("ab"))
        start = data.draw(st.integers(0, len(stored[name]) - 1))
        stop = data.draw(st.one_of(st.none(), st.integers(start + 1, len(stored[name]))))
        count = (len(stored[name]) if stop is None else stop) - start
        shape = (
            data.draw(st.sampled_from([None, (2 * count, 3)])) if not pieces else pieces[0].shape and (2 * count, 3)
        )
        pieces.append(Piece(name, start, stop, shape))
    want = assemble(pieces, lambda piece: stored[piece.name][piece.start : piece.stop])
    got = join(pieces, tensors, tuple(want.shape))
    assert torch.equal(got.whole(), want)
    begin = data.draw(st.integers(0, want.numel()))
    end = data.draw(st.integers(begin, want.numel()))
    assert torch.equal(torch.cat([torch.empty(0), *got.read(begin, end)]), want.flatten()[begin:end])
    twice = Assembled((2 * want.shape[0], *want.shape[1:]), [(got, 0, want.shape[0])] * 2)
    assert torch.equal(twice.whole(), torch.cat([want, want]))


def test_reading_in_chunks(source, monkeypatch):
    want = load_file(source / "model.safetensors")
    monkeypatch.setattr(read, "CHUNK", 7)
    for name, tensor in read.read_checkpoint(source).items():
        assert torch.equal(tensor.whole(), want[name])


def test_sizes():
    sizes = {"5GB": 5 * 10**9, "200 mb": 2 * 10**8, "1.5K": 1500, "77": 77, 12: 12, "2TB": 2 * 10**12}
    assert {size: size_in_bytes(size) for size in sizes} == sizes


# ----------------------------------------------------------------------------------------------------------------------
# Memory
# ----------------------------------------------------------------------------------------------------------------------


def synthetic_llama(folder: Path) -> tuple[int, int]:
    """A Llama of 2 GB in two sparse files; returns bytes in all and of the largest tensor."""
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=4, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    names, weight_map = list(shapes), {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        header, at = {}, 0
        for name in part:
            header[name] = {"dtype": "BF16", "shape": list(shapes[name])}
            header[name]["data_offsets"] = [at, at := at + 2 * shapes[name].numel()]
        text = json.dumps(header).encode()
        file = folder / f"model-{number}.safetensors"
        file.write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(file, 8 + len(text) + at)
        weight_map |= dict.fromkeys(part, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    sizes = [2 * shape.numel() for shape in shapes.values()]
    return sum(sizes), max(sizes)


def pickle_zeros(folder: Path):
    """The same model in a .bin."""
    shapes = {name: tensor.shape for name, tensor in read.read_checkpoint(folder).items()}
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    weights = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    torch.save(weights, folder / "pytorch_model.bin")


@pytest.mark.slow
@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("options", [[], ["--dtype", "float16"], ["--to-bmojo"]], ids=["copy", "cast", "prime"])
def test_peak_memory_of_two_gigabytes(tmp_path, options, pickled):
    """Below twice the largest tensor plus 200 MB, Python and torch included."""
    total, largest = synthetic_llama(tmp_path / "source")
    if pickled:
        pickle_zeros(tmp_path / "source")
    assert total > 2e9
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from convert.__main__ import main
assert main(["source", "result", *{options!r}]) == 0
status = open("/proc/self/status").read()
print("[" + status.partition("VmHWM:")[2].split()[0] + "]")  # kilobytes; not getrusage's, which a parent can raise
"""
    peak = 1024 * run_python(code, home=tmp_path / "home", cwd=tmp_path).answer[0]
    print(f"{options}: peak {peak / 1e6:.0f} MB, largest tensor {largest / 1e6:.0f} MB, {total / 1e9:.2f} GB in all")
    for name in ("source", "result"):
        shutil.rmtree(tmp_path / name)
    assert peak < 2 * largest + 200e6
