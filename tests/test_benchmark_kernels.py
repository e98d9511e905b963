"""The benchmark of the kernels at toy sizes, under Triton's interpreter where there is no GPU."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch


EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import benchmark_kernels

    monkeypatch.setattr(benchmark_kernels, "peaks", lambda dtype: {"bytes": 1e9, "operations": 1e9})
    yield benchmark_kernels
    sys.modules.pop("benchmark_kernels", None)


def run(benchmark, tmp_path, *arguments):
    """The exit code and the records by op, title, way and pass."""
    path = tmp_path / "kernels.json"
    code = benchmark.main(["--shapes", "toy", "--output", str(path), *arguments])
    found = json.loads(path.read_text(encoding="utf-8"))
    return code, {(r["op"], r["title"], r["way"], r["pass"]): r for r in found["records"]}


@pytest.fixture
def without_kernels(benchmark, monkeypatch):
    """As if no file of kernels shipped: the interpreter's time is spent on the test that is about them."""
    monkeypatch.setattr(benchmark.module("kernels_bmojo"), "load", lambda name, file: None)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_attention_is_checked_against_every_way(benchmark, tmp_path, capsys, dtype):
    code, records = run(benchmark, tmp_path, "--ops", "memory_attention", "--dtype", dtype)
    assert code == 0
    table = capsys.readouterr().out
    most = 0.02 if dtype == "bfloat16" else 1e-6
    for title, peers in (("", 1), ("no memory", 2)):
        ways = {way for _, of, way, _ in records if of == title}
        assert len(ways) == 3 + peers + (title != "")
        for way in ways - {"two passes, flash"}:
            forward, backward = (records["memory_attention", title, way, name] for name in ("forward", "backward"))
            assert forward["state"] == "timed"
            assert forward["error"] < most
            assert forward["ms"] > 0
            if torch.cuda.is_available() or "flex" not in way:
                assert backward["error"] < most
            else:
                assert backward["state"] == "no gradient without a GPU"
    ours = records["memory_attention", "", "ours", "forward"]
    shape = benchmark.SHAPES["toy"]
    size = {"bfloat16": 2, "float32": 4}[dtype]
    tokens = shape.rows * shape.seq_len
    bytes_of_memory = 8 * shape.rows * -(-shape.seq_len // shape.chunk) * shape.memory
    moved = tokens * 16 * (2 * shape.heads + 6 * shape.kv_heads) * size + bytes_of_memory
    assert ours["bytes"] == moved
    assert ours["of_bandwidth"] == pytest.approx(moved / ours["ms"] * 1000 / 1e9)
    assert ours["of_matrix_peak"] == pytest.approx(4 * tokens * shape.heads * 16 * 17 / ours["ms"] * 1000 / 1e9)
    [line] = [line for line in table.splitlines() if line.startswith("memory_attention              forward  ours")]
    assert line.split()[-1] == "1.00"
    if not torch.cuda.is_available():
        assert "two passes, flash    needs a GPU" in table


def test_every_op_has_its_rows(benchmark, tmp_path, without_kernels):
    code, records = run(benchmark, tmp_path)
    assert code == 0
    for case in benchmark.CASES:
        for name in ["forward", "backward"] if case.backward else ["forward"]:
            of_case = {
                way: r
                for (op, title, way, part), r in records.items()
                if (op, title, part) == (case.op, case.title, name)
            }
            assert of_case["ours"]["state"] == "no kernel ships"
            assert of_case["definition"]["state"] == "timed"
            assert of_case.keys() == {"ours", "definition", *(peer.name for peer in case.peers)}


def test_a_kernel_that_ships_is_checked(benchmark, tmp_path, monkeypatch, capsys):
    """Right, wrong in its gradient alone, wrong, of another shape, or raising."""
    ops = benchmark.module("ops_bmojo")

    def right(*tensors):
        return ops.selective_scan(*tensors)

    def wrong_gradient(x, *others):
        return ops.selective_scan(x.detach() + (x - x.detach()) * 1.1, *others)

    def slightly_wrong(*tensors):
        y, state = ops.selective_scan(*tensors)
        return y * 1.05, state

    def not_a_number(*tensors):
        y, state = ops.selective_scan(*tensors)
        return y, state * torch.nan

    def shorter(*tensors):
        y, state = ops.selective_scan(*tensors)
        return y[:, 1:], state

    def raises(*tensors):
        raise RuntimeError("no such instruction\nand more")

    expected = {
        right: (0, "timed", "timed"),
        wrong_gradient: (1, "untimed", "WRONG"),
        slightly_wrong: (1, "WRONG", "WRONG"),
        not_a_number: (1, "WRONG", "untimed"),
        shorter: (1, "WRONG", "WRONG"),
        raises: (1, "raised", "raised"),
    }
    for kernel, (code, *states) in expected.items():
        monkeypatch.setattr(benchmark.module("kernels_bmojo"), "load", lambda name, file, kernel=kernel: kernel)
        found, records = run(benchmark, tmp_path, "--ops", "selective_scan")
        of_ours = [records["selective_scan", "", "ours", name] for name in ("forward", "backward")]
        assert (found, *(record["state"] for record in of_ours)) == (code, *states), kernel
        assert all("ms" in record for record in of_ours) == (code == 0)
        assert records["selective_scan", "", "definition", "backward"]["state"] == "timed", "the others go on"
    assert "RuntimeError: no such instruction\n" in capsys.readouterr().out


def one_too_wide(age, newest: int, window: int):
    return (age >= newest) & (age <= newest + window)


def test_a_wrong_peer_is_not_timed_and_no_failure_of_ours(benchmark, tmp_path, monkeypatch, without_kernels):
    monkeypatch.setattr(benchmark, "near", one_too_wide)
    code, records = run(benchmark, tmp_path, "--ops", "memory_attention")
    assert code == 0
    for way in ("torch, dense mask", "flex_attention", "two passes, flex"):
        assert records["memory_attention", "no memory", way, "forward"]["state"] == "WRONG"


def test_shapes_by_name_and_by_difference(benchmark, capsys):
    assert benchmark.shape_of("batch") == benchmark.SHAPES["batch"]
    assert benchmark.shape_of("seq_len=32768,window=1024") == benchmark.Shape(seq_len=32768, window=1024)
    for text, said in (
        ("huge", "neither one of long"),
        ("width=3", "width=3"),
        ("seq_len=512", "above the window, 512"),
    ):
        with pytest.raises(SystemExit):
            benchmark.main(["--shapes", text])
        assert said in capsys.readouterr().err
