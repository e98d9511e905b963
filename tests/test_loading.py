"""Loading as users do it: new processes with an empty cache that cannot see this checkout, from folders and from a Hub.

Several loads share a process, since starting one costs as much as ten loads.
"""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

from bmojo.configuration_bmojo import AUTO_MAP
from bmojo_tests.fake_hub import ROOT, FakeHub, build_repository, run_python
from bmojo_tests.inspection import fingerprint, last_logits


INSPECTION = Path(__file__).with_name("inspection.py").read_text()
HAS_TRITON = importlib.util.find_spec("triton") is not None
WITH_KERNEL = {"TRITON_INTERPRET": "1"} if HAS_TRITON else {}
REFUSE_TRITON = "sys.meta_path.insert(0, RefuseTriton)\n"
PREAMBLE = (
    INSPECTION
    + """
import json, os
from pathlib import Path
from transformers import AutoModelForCausalLM

def load(name, **options):
    return AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, **options)
"""
)


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model()


@pytest.fixture(scope="module")
def repository(model, tmp_path_factory) -> Path:
    """A model repository in a folder, with a kernel; not to be changed."""
    return build_repository(tmp_path_factory.mktemp("repository") / "bmojo-tiny", model)


def assert_is(answer: dict, model, kernels: Path | None = None):
    """The inspected model has the weights and answers of this one, knows all its classes, and its kernel is that one."""
    assert answer["weights"] == fingerprint(model)
    assert answer["logits"] == pytest.approx(last_logits(model), rel=1e-5, abs=1e-6)
    assert_complete(answer, kernels)


def assert_complete(answer: dict, kernels: Path | None = None):
    assert {name: path.rpartition("--")[2] for name, path in answer["auto_map"].items()} == AUTO_MAP
    if kernels is not None:
        assert [Path(folder).resolve() for folder in answer["kernels"]] == [kernels.resolve()]
        if HAS_TRITON:
            assert Path(answer["probe"]).resolve() == (kernels / "probe.py").resolve()


def spoken_of_kernels(stderr: str) -> list[str]:
    """The lines in which the model, not transformers' list of downloaded files, speaks of its kernels."""
    return [line for line in stderr.splitlines() if "kernels/" in line or "triton" in line.lower()]


# ----------------------------------------------------------------------------------------------------------------------
# From a Hub: first online, without triton; then offline, with it; then what was saved there, alone
# ----------------------------------------------------------------------------------------------------------------------

PINNED, DOTTED, WEIGHTS = "acme/bmojo-tiny", "acme/bmojo.v1.5-tiny", "acme/weights-only"


@pytest.fixture(scope="module")
def hub_session(repository, model, tmp_path_factory):
    """Load from three repositories of a Hub, then once more from the cache, where a copy is also trained and saved."""
    work = tmp_path_factory.mktemp("hub")
    weights_only = work / "weights-only"
    model.save_pretrained(weights_only)
    shutil.rmtree(weights_only / "kernels", ignore_errors=True)
    config = json.loads((weights_only / "config.json").read_text())
    config["auto_map"] = {name: f"{DOTTED}--{path}" for name, path in AUTO_MAP.items()}
    (weights_only / "config.json").write_text(json.dumps(config))
    broken = work / "broken"
    shutil.copytree(repository, broken)
    (broken / "modeling_bmojo.py").write_text("raise RuntimeError('this commit was not asked for')\n")
    elsewhere = work / "elsewhere"
    elsewhere.mkdir()

    with FakeHub() as hub:
        commit = hub.publish(PINNED, repository)
        hub.publish(PINNED, broken)  # `main` moves on, the pinned revision does not
        hub.publish(DOTTED, repository)
        hub.publish(WEIGHTS, weights_only)
        loads = f"""
models = [load({PINNED!r}, revision={commit!r}), load({DOTTED!r}), load({WEIGHTS!r})]
"""
        online = run_python(
            PREAMBLE + REFUSE_TRITON + loads + "print(json.dumps([inspect(model, probe=False) for model in models]))",
            home=work / "home",
            cwd=elsewhere,
            HF_ENDPOINT=hub.url,
        )
        requests = list(hub.requests)
    offline = run_python(
        PREAMBLE
        + loads
        + f"""
answers = [inspect(model, probe={HAS_TRITON}) for model in models]
model = models[0].train()
ids = torch.arange(3, 14)[None]
model(ids, labels=ids).loss.backward()
with torch.no_grad():
    for parameter in model.parameters():
        parameter -= 0.1 * parameter.grad
copies = [model.eval()]
for name in ("once", "twice"):
    copies[-1].save_pretrained(Path("..") / name)
    copies.append(load(Path("..") / name))
copies[-1].save_pretrained(Path("..") / name)  # into the folder it was loaded from
print(json.dumps({{"answers": answers, "copies": [inspect(copy, probe={HAS_TRITON}) for copy in copies]}}))
""",
        home=work / "home",
        cwd=elsewhere,
        HF_HUB_OFFLINE="1",
        **WITH_KERNEL,
    )
    return {"work": work, "commit": commit, "online": online, "requests": requests, "offline": offline}


def test_hub_loads_pinned_dotted_and_code_from_elsewhere(hub_session, model):
    for answer in hub_session["online"].answer:
        assert_is(answer, model)
    assert not spoken_of_kernels(hub_session["online"].stderr)  # no GPU here: nothing is missed without triton


def test_hub_is_asked_for_nothing_but_the_model(hub_session):
    asked = {path.partition("?")[0] for _, path, status in hub_session["requests"] if status == 200}
    files = {path.partition("/resolve/")[2].partition("/")[2] for path in asked if "/resolve/" in path}
    assert {"modeling_bmojo.py", "kernels/probe.py", "kernels/probe_sizes.py", "model.safetensors"} <= files
    extra = {name for name in files if not name.endswith("_bmojo.py") and not name.startswith("kernels/")}
    assert extra == {"config.json", "model.safetensors", "generation_config.json"}
    pinned = [path for _, path, _ in hub_session["requests"] if f"{PINNED}/resolve/" in path and "/main/" not in path]
    assert all(f"/resolve/{hub_session['commit']}/" in path for path in pinned)
    assert pinned


def test_offline_has_the_kernels_that_were_fetched_without_triton(hub_session, model):
    for answer, code in zip(hub_session["offline"].answer["answers"], (PINNED, DOTTED, DOTTED), strict=True):
        [folder] = answer["kernels"]
        assert f"models--{code.replace('/', '--')}" in folder
        assert_is(answer, model, Path(folder))


def test_train_save_load_save_load_loses_nothing(hub_session, model):
    trained, once, twice = hub_session["offline"].answer["copies"]
    assert trained["weights"] != fingerprint(model)
    for copy, name in ((once, "once"), (twice, "twice")):
        assert (copy["weights"], copy["logits"]) == (trained["weights"], trained["logits"])
        assert_complete(copy, hub_session["work"] / name / "kernels")
    folder = hub_session["work"] / "twice"
    assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
    shipped = {path.name for path in (ROOT / "kernels").glob("*.py")} | {"probe.py", "probe_sizes.py"}
    assert {path.name for path in (folder / "kernels").iterdir() if path.is_file()} == shipped
    assert not (hub_session["work"] / "once" / "kernels" / "__init__.py").exists()


@pytest.fixture(scope="module")
def saved_alone(hub_session):
    """Every Auto class on the folder that was saved last, moved to a place of its own, with an empty cache."""
    alone = hub_session["work"].parent / "alone"
    shutil.move(hub_session["work"] / "twice", alone / "moved")
    device_map = importlib.util.find_spec("accelerate") is not None
    return alone, run_python(
        PREAMBLE
        + f"""
import transformers

answers = {{"AutoConfig": transformers.AutoConfig.from_pretrained("moved", trust_remote_code=True).model_type}}
ids = torch.arange(3, 14)[None]
for name in {sorted(AUTO_MAP.keys() - {"AutoConfig"})}:
    model = getattr(transformers, name).from_pretrained("moved", trust_remote_code=True)
    with torch.no_grad():
        output = model(ids)
    answers[name] = {{
        "class": type(model).__name__,
        "backbone": fingerprint(model.base_model),
        "finite": all(value.isfinite().all().item() for value in output.values() if torch.is_tensor(value)),
        "auto_map": model.config.auto_map,
    }}
half = load("moved", dtype=torch.bfloat16)
answers["half"] = {{"dtypes": sorted({{str(p.dtype) for p in half.parameters()}}), "logits": str(half(ids).logits.dtype)}}
if {device_map}:
    answers["placed"] = inspect(load("moved", device_map="cpu"), probe={HAS_TRITON})
answers["plain"] = inspect(load("moved"), probe={HAS_TRITON})
print(json.dumps(answers))
""",
        home=alone / "home",
        cwd=alone,
        HF_HUB_OFFLINE="1",
        **WITH_KERNEL,
    )


def test_saved_copy_needs_nothing_else(saved_alone, hub_session):
    alone, outcome = saved_alone
    trained = hub_session["offline"].answer["copies"][0]
    for name in ("plain", "placed") if "placed" in outcome.answer else ("plain",):
        assert (outcome.answer[name]["weights"], outcome.answer[name]["logits"]) == (
            trained["weights"],
            trained["logits"],
        )
        assert_complete(outcome.answer[name], alone / "moved" / "kernels")


@pytest.mark.parametrize("name", sorted(AUTO_MAP))
def test_saved_copy_loads_by_every_auto_class(saved_alone, name):
    answers = saved_alone[1].answer
    if name == "AutoConfig":
        assert answers[name] == "bmojo"
        return
    assert answers[name]["class"] == AUTO_MAP[name].rpartition(".")[2]
    assert answers[name]["finite"]
    assert answers[name]["backbone"] == answers["AutoModel"]["backbone"]
    assert answers[name]["auto_map"] == AUTO_MAP


def test_saved_copy_loads_in_bfloat16(saved_alone):
    both = ["torch.bfloat16", "torch.float32"]  # the dynamics of an SSM stay in float32
    assert saved_alone[1].answer["half"] == {"dtypes": both, "logits": "torch.bfloat16"}


# ----------------------------------------------------------------------------------------------------------------------
# From a folder
# ----------------------------------------------------------------------------------------------------------------------


def test_folders_of_any_name(repository, model, tmp_path):
    names = ("x", "x.y", "x-y")
    for name in names:
        shutil.copytree(repository, tmp_path / name)
    outcome = run_python(
        PREAMBLE
        + f"""
answers = {{name: inspect(load(name), probe={HAS_TRITON}) for name in {[*names, "x/", str(tmp_path / "x")]}}}
os.chdir("x.y")
answers["."] = inspect(load("."), probe={HAS_TRITON})
print(json.dumps(answers))
""",
        home=tmp_path / "home",
        cwd=tmp_path,
        HF_HUB_OFFLINE="1",
        **WITH_KERNEL,
    )
    for name, answer in outcome.answer.items():
        assert_is(answer, model, (tmp_path / "x.y" if name == "." else tmp_path / name) / "kernels")


def test_without_kernels_and_triton(repository, model, tmp_path):
    shutil.copytree(repository, tmp_path / "x", ignore=shutil.ignore_patterns("kernels"))
    outcome = run_python(
        PREAMBLE
        + REFUSE_TRITON
        + """
model = load("x")
tokens = model.generate(torch.arange(3, 14)[None], max_new_tokens=8, do_sample=False)
model.save_pretrained("y")
print(json.dumps({"model": inspect(model), "tokens": tokens.tolist(), "saved": sorted(os.listdir("y"))}))
""",
        home=tmp_path / "home",
        cwd=tmp_path,
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_VERBOSITY="info",
    )
    assert_is(outcome.answer["model"], model)
    assert outcome.answer["model"]["kernels"] == []
    assert "kernels" not in outcome.answer["saved"]
    expected = model.generate(torch.arange(3, 14)[None], max_new_tokens=8, do_sample=False)
    assert outcome.answer["tokens"] == expected.tolist()
    said = [line for line in outcome.stderr.splitlines() if "runs in plain torch" in line]
    assert len(said) == 1  # which path runs and why, once, though it is asked for in every layer and call
    assert "the tensors are on cpu" in said[0]


# ----------------------------------------------------------------------------------------------------------------------
# From the root of a checkout, where Python finds the folder `kernels` before any package of that name
# ----------------------------------------------------------------------------------------------------------------------

FROM_ROOT = (
    """
import transformers
from transformers import AutoModelForCausalLM
"""
    + PREAMBLE
    + f"""
from importlib.util import find_spec, module_from_spec, spec_from_file_location

found = find_spec("kernels")
answer = {{
    "model": inspect(load("."), probe={HAS_TRITON}),
    "available": transformers.utils.is_kernels_available(),
    "kernels": found and found.origin,
}}
spec = spec_from_file_location("conftest", "tests/conftest.py")
spec.loader.exec_module(module_from_spec(spec))  # what pytest does in a checkout
import bmojo.kernels_bmojo
answer["checkout"] = run_probe(bmojo.kernels_bmojo) if {HAS_TRITON} else None
print(json.dumps(answer))
"""
)
FAKE_KERNELS = """
class Anything:
    def __init__(self, *args, **kwargs): pass
    def __call__(self, *args, **kwargs): return args[0] if args else self
    def __getattr__(self, name): return Anything()

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (Anything,), {})
"""


@pytest.mark.parametrize("installed", [False, True])
def test_from_the_root_of_a_checkout(repository, model, tmp_path, installed):
    root, packages = tmp_path / "checkout", tmp_path / "packages"
    shutil.copytree(repository, root)
    shutil.copy(Path(__file__).with_name("conftest.py"), root / "tests")
    environment = WITH_KERNEL.copy()
    if installed:  # a package that is called `kernels`, in a version that transformers takes
        from transformers.utils.import_utils import KERNELS_MIN_VERSION

        metadata = packages / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
        (packages / "kernels").mkdir()
        (packages / "kernels" / "__init__.py").write_text(FAKE_KERNELS)
        environment["PYTHONPATH"] = str(packages)
    outcome = run_python(FROM_ROOT, home=tmp_path / "home", cwd=root, HF_HUB_OFFLINE="1", **environment)
    assert_is(outcome.answer["model"], model, root / "kernels")
    if HAS_TRITON:
        assert Path(outcome.answer["checkout"]) == root / "kernels" / "probe.py"
    if installed:
        assert outcome.answer["available"]
        assert outcome.answer["kernels"] == str(packages / "kernels" / "__init__.py")
    elif importlib.util.find_spec("kernels") is None or importlib.util.find_spec("kernels").origin is None:
        assert not outcome.answer["available"]
