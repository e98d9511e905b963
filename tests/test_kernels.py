"""Which of kernel and definition runs, what is said about it, and where the kernels are found."""

import logging
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from transformers.utils.logging import info_once, warning_once

from bmojo import kernels_bmojo
from bmojo_tests.kernel_checks import needs_triton


ON_GPU = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)  # all that the choice looks at
ON_CPU = torch.zeros(2)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder in place of the checkout's kernels, on a machine with triton."""
    monkeypatch.setattr(kernels_bmojo, "__path__", [str(tmp_path / "kernels")])
    monkeypatch.setattr(kernels_bmojo, "_has_triton", lambda: True)
    monkeypatch.delenv("BMOJO_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(kernels_bmojo, "_loaded", {})
    for once in (info_once, warning_once):
        once.cache_clear()
    (tmp_path / "kernels").mkdir()
    return tmp_path / "kernels"


@pytest.fixture
def said(monkeypatch):
    """What is logged, as pairs of level and text."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append((record.levelname, record.getMessage()))
    monkeypatch.setattr(kernels_bmojo.logger, "handlers", [handler])
    monkeypatch.setattr(kernels_bmojo.logger, "level", logging.INFO)
    kernels_bmojo.logger.manager._clear_cache()  # of which levels are enabled
    yield lines
    kernels_bmojo.logger.manager._clear_cache()


def make_op(name: str, cpu=None):
    """An op of that name, a new one for every test since Python keeps the modules that it imported."""

    def definition(x):
        return "definition"

    definition.__name__ = name
    return kernels_bmojo.dispatch(definition, cpu, kernel=name)


def write_kernel(folder, name: str, text: str | None = None):
    (folder / f"{name}.py").write_text(text or f"def {name}(x):\n    return 'kernel'\n")


def test_the_device_decides(folder, said):
    write_kernel(folder, "by_device")
    op = make_op("by_device")
    assert [op(ON_GPU), op(ON_GPU), op(ON_CPU), op(ON_CPU)] == ["kernel", "kernel", "definition", "definition"]
    assert op.definition(ON_GPU) == "definition"
    [kernel, definition] = said
    assert kernel == ("INFO", f"by_device on cuda: Triton kernel of {folder}.")
    assert definition[0] == "INFO"
    assert "the tensors are on cpu" in definition[1]


@pytest.mark.parametrize("mode", ["torch", "definition"])
def test_torch_can_be_forced(folder, said, monkeypatch, mode):
    write_kernel(folder, "by_force")
    monkeypatch.setenv("BMOJO_KERNELS", mode)
    assert make_op("by_force")(ON_GPU) == "definition"
    assert said == [("INFO", f"B'MOJO runs in plain torch: BMOJO_KERNELS={mode}.")]


def test_the_form_for_a_cpu_runs_on_a_cpu_alone(folder, monkeypatch):
    write_kernel(folder, "in_three_forms")
    op = make_op("in_three_forms", cpu=lambda x: "cpu")
    assert (op(ON_CPU), op(ON_GPU), op.cpu(ON_GPU)) == ("cpu", "kernel", "cpu")
    wanted = {"torch": ("cpu", "definition"), "definition": ("definition", "definition")}
    for mode, answers in wanted.items():
        monkeypatch.setenv("BMOJO_KERNELS", mode)
        assert (op(ON_CPU), op(ON_GPU)) == answers
    monkeypatch.setenv("BMOJO_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert op(ON_CPU) == "kernel"


def test_sizes_beyond_a_kernels_room_go_another_way(folder, monkeypatch):
    def definition(x, size):
        return "definition"

    definition.__name__ = "roomy"
    write_kernel(folder, "roomy", "def roomy(x, size):\n    return 'kernel'\n")
    op = kernels_bmojo.dispatch(definition, kernel="roomy", room=lambda x, size: size <= 8)
    assert [op(ON_GPU, 8), op(ON_GPU, 9), op(ON_GPU, size=9)] == ["kernel", "definition", "definition"]
    monkeypatch.setenv("BMOJO_KERNELS", "triton")
    assert op(ON_GPU, 9) == "kernel"


@needs_triton
def test_room_is_what_the_kernels_have():
    """The largest size that is let through is the largest that each kernel takes."""

    def shape(*sizes):
        return torch.empty(sizes, device="meta")

    for file, fits, settings in (
        (
            "selective",
            lambda n: kernels_bmojo._scan_fits(None, None, shape(8, n)),
            lambda m, n: m.settings("forward", 8, n),
        ),
        ("innovation", lambda n: kernels_bmojo._memory_fits(None, shape(1, n)), lambda m, n: m.settings(n)),
        ("attention", lambda n: kernels_bmojo._heads_fit(shape(n)), lambda m, n: m.settings("keys", n, 2, "ampere")),
        ("step", lambda n: kernels_bmojo._heads_fit(shape(n)), lambda m, n: m.attention_settings(n, 1, 4, "ampere")),
    ):
        module = import_module(f"{kernels_bmojo.__name__}.{file}")
        largest = max(n for n in range(1, 2048) if fits(n))
        settings(module, largest)
        with pytest.raises(ValueError, match=f" is {largest + 1};"):
            settings(module, largest + 1)


def test_a_missing_kernel_is_normal(folder, said):
    assert make_op("not_there")(ON_GPU) == "definition"
    [(level, text)] = said
    assert (level, "not_there.py" in text) == ("INFO", True)


def test_a_missing_triton_is_said_once_where_it_costs_speed(folder, said, monkeypatch):
    monkeypatch.setattr(kernels_bmojo, "_has_triton", lambda: False)
    for name in ("first", "second"):
        write_kernel(folder, name)
        assert make_op(name)(ON_GPU) == "definition"
    [(level, text)] = said
    assert (level, "pip install -U triton" in text) == ("WARNING", True)


def test_a_triton_without_what_the_kernels_use_is_none(monkeypatch):
    def find(name):
        return None if name == "triton.knobs" else object()

    monkeypatch.setattr(kernels_bmojo, "find_spec", find)
    kernels_bmojo._has_triton.cache_clear()
    assert not kernels_bmojo._has_triton()
    kernels_bmojo._has_triton.cache_clear()


def test_a_required_kernel_says_what_is_missing(folder, monkeypatch):
    monkeypatch.setenv("BMOJO_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="no kernel absent ships"):
        make_op("absent")(ON_GPU)
    write_kernel(folder, "required")
    assert make_op("required")(ON_GPU) == "kernel"
    with pytest.raises(RuntimeError, match=r"tensors are on cpu .*TRITON_INTERPRET=1"):
        make_op("required")(ON_CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert make_op("required")(ON_CPU) == "kernel"
    monkeypatch.setattr(kernels_bmojo, "_has_triton", lambda: False)
    with pytest.raises(RuntimeError, match="pip install -U triton"):
        make_op("required")(ON_CPU)


def test_an_op_without_kernel_needs_none(folder, said, monkeypatch):
    op = kernels_bmojo.dispatch(lambda x: "definition", cpu=lambda x: "cpu")
    assert (op(ON_GPU), op(ON_CPU)) == ("definition", "cpu")
    monkeypatch.setenv("BMOJO_KERNELS", "triton")
    assert (op(ON_GPU), op(ON_CPU)) == ("definition", "cpu")
    assert said == []


def test_a_kernel_in_a_file_of_another_name(folder):
    (folder / "several.py").write_text("def one_of_them(x):\n    return 'kernel'\n")

    def one_of_them(x):
        return "definition"

    assert kernels_bmojo.dispatch(one_of_them, kernel="several")(ON_GPU) == "kernel"


def test_float64_goes_through_the_definition(folder, said, monkeypatch):
    write_kernel(folder, "in_float32")
    op, wide = make_op("in_float32"), SimpleNamespace(device=ON_GPU.device, dtype=torch.float64)
    assert (op(ON_GPU), op(wide)) == ("kernel", "definition")
    assert "float64" in said[1][1]
    monkeypatch.setenv("BMOJO_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="float64"):
        op(wide)


def test_transforms_go_through_the_definition(folder, monkeypatch):
    monkeypatch.setenv("BMOJO_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    write_kernel(folder, "transformed", "def transformed(x):\n    return x * 0\n")

    def transformed(x):
        return x * 3

    op = kernels_bmojo.dispatch(transformed, kernel="transformed")
    assert op(ON_CPU).tolist() == [0, 0]
    assert torch.func.grad(lambda x: op(x).sum())(ON_CPU).tolist() == [3, 3]
    assert torch.func.jvp(op, (ON_CPU,), (ON_CPU + 1,))[1].tolist() == [3, 3]


def test_an_unknown_mode_is_refused(folder, monkeypatch):
    monkeypatch.setenv("BMOJO_KERNELS", "cuda")
    with pytest.raises(
        ValueError, match="BMOJO_KERNELS is 'cuda'; allowed are 'auto', 'torch', 'triton', 'definition'"
    ):
        make_op("any")(ON_CPU)


def test_a_kernel_that_fails_to_import_is_not_hidden(folder):
    write_kernel(folder, "broken", "import no_such_package_anywhere\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_package_anywhere"):
        make_op("broken")(ON_GPU)


def test_the_choice_leaves_no_trace_in_a_compiled_graph(folder, monkeypatch):
    write_kernel(folder, "compiled", "def compiled(x):\n    return x * 5\n")

    def compiled(x):
        return x * 3

    compiled = kernels_bmojo.dispatch(compiled, kernel="compiled")

    run = torch.compile(lambda x: compiled(x) + 1, backend="eager", fullgraph=True)
    assert run(torch.ones(2)).tolist() == [4, 4]
    torch.compiler.reset()
    monkeypatch.setenv("BMOJO_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert run(torch.ones(2)).tolist() == [6, 6]


# ----------------------------------------------------------------------------------------------------------------------
# attach and copy_kernels; test_loading.py has the real cases
# ----------------------------------------------------------------------------------------------------------------------


def config(name_or_path: str = "", **auto_map):
    return SimpleNamespace(name_or_path=str(name_or_path), auto_map=auto_map)


def test_attach_finds_the_folder_the_model_came_from(folder, tmp_path, monkeypatch):
    kernels_bmojo.__path__.clear()
    kernels_bmojo.attach(config())  # made from scratch
    kernels_bmojo.attach(config(folder))  # a folder without kernels
    assert kernels_bmojo.__path__ == []
    monkeypatch.chdir(tmp_path)
    kernels_bmojo.attach(config("."))
    assert kernels_bmojo.__path__ == [str(folder)]
    kernels_bmojo.attach(config("/elsewhere"))
    assert kernels_bmojo.__path__ == [str(folder)]  # one that is there stays


def test_attach_follows_the_code_to_another_repository(folder, tmp_path):
    kernels_bmojo.__path__.clear()
    kernels_bmojo.attach(config("some/weights", AutoConfig=f"{tmp_path}--configuration_bmojo.BMojoConfig"))
    assert kernels_bmojo.__path__ == [str(folder)]


@pytest.mark.parametrize("source", ["acme/never-downloaded", "/a/folder/that/is gone"])
def test_kernels_out_of_reach_are_said_once(folder, said, source):
    kernels_bmojo.__path__.clear()
    for _ in range(3):
        kernels_bmojo.attach(config(source))
    [(level, text)] = said
    assert (level, source in text) == ("WARNING", True)


def test_copies_hold_kernels_only(folder, tmp_path):
    write_kernel(folder, "copied")
    for name in ("__init__.py", "README.md", "__pycache__/copied.pyc"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    kernels_bmojo.copy_kernels(config(), tmp_path / "saved")
    assert [path.name for path in (tmp_path / "saved" / "kernels").iterdir()] == ["copied.py"]
    kernels_bmojo.copy_kernels(config(), tmp_path)  # onto itself
    assert (folder / "copied.py").read_text() == (tmp_path / "saved" / "kernels" / "copied.py").read_text()


def test_nothing_is_copied_where_nothing_ships(folder, tmp_path):
    kernels_bmojo.copy_kernels(config(), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
