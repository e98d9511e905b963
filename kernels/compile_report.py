"""Compiles every kernel for GPUs that need not be here, and prints what it takes of them: `python kernels/compile_report.py`.

Exits with 1 where a launch takes more shared memory than there is on any target, or where one spills registers on sm_80
or above. `--targets`, `--dtypes` and `--kernels` (a part of a name) choose; `--jobs` compiles in parallel. `--default` is what
`.ci/run` runs: each kernel at the sizes of a default configuration, for NVIDIA's GPUs from sm_80 on, in bf16 and fp32.
"""

import argparse
import io
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


# the files of kernels, each with a function `launches(itemsize, architecture)`
FILES = ["attention", "ssd", "selective", "conv", "innovation", "step"]
DTYPES = {"fp16": 2, "bf16": 2, "fp32": 4}


class Target(NamedTuple):
    gpu: GPUTarget
    architecture: str
    shared_memory: int  # bytes that a program may have
    dtypes: tuple[str, ...] = tuple(DTYPES)
    may_spill: bool = False


TARGETS = {
    "sm_75": Target(GPUTarget("cuda", 75, 32), "turing", 64 * 1024, ("fp16", "fp32"), may_spill=True),
    "sm_80": Target(GPUTarget("cuda", 80, 32), "ampere", 163 * 1024),
    "sm_86": Target(GPUTarget("cuda", 86, 32), "ampere", 99 * 1024),  # not by itself: sm_80 with less memory
    "sm_90": Target(GPUTarget("cuda", 90, 32), "ampere", 227 * 1024),
    "sm_100": Target(GPUTarget("cuda", 100, 32), "ampere", 227 * 1024),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), "amd", 64 * 1024, may_spill=True),
}


class Line(NamedTuple):
    """What one launch takes. Registers are per thread; spills in bytes (NVIDIA) or registers (AMD)."""

    kernel: str
    dtype: str
    target: str
    registers: int
    spills: int
    shared: int
    limit: int
    fails: bool


def package(name: str = "bmojo_kernels") -> str:
    """Make the folder of this file importable under that name, which no installed package has."""
    spec = ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [str(Path(__file__).resolve().parent)]
    sys.modules.setdefault(name, module_from_spec(spec))
    return name


def compile_launch(launch, dtype: str, target: Target):
    """The compiled kernel, and what ptxas said."""
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", launch.settings[name]
            continue
        kind = launch.types.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
        if kind is None:
            signature[name], constants[name] = "constexpr", None
            continue
        signature[name] = kind
        if kind.startswith("*"):
            attributes[place,] = [["tt.divisibility", 16]]  # as torch allocates
    options = {
        name: launch.settings[name]
        for name in ("num_warps", "num_stages", "enable_fp_fusion")
        if name in launch.settings
    }
    source = ASTSource(launch.kernel, signature, constants, attributes)
    said = io.StringIO()
    with redirect_stdout(said):
        compiled = triton.compile(source, target=target.gpu, options=options)
    return compiled, said.getvalue()


def inspect(case: tuple[str, str, str, int]) -> Line:
    file, dtype, target_name, number = case
    knobs.compilation.always_compile = True  # what comes from Triton's cache has no log
    knobs.nvidia.dump_ptxas_log = True
    target = TARGETS[target_name]
    module = import_module(f"{package()}.{file}")
    launch = list(module.launches(DTYPES[dtype], target.architecture))[number]
    compiled, said = compile_launch(launch, dtype, target)
    if target.gpu.backend == "hip":
        registers, spills = (
            int(re.search(rf"\.{field}:\s*(\d+)", compiled.asm["amdgcn"]).group(1))
            for field in ("vgpr_count", "vgpr_spill_count")
        )
    else:
        registers = int(re.search(r"Used (\d+) registers", said).group(1))
        spills = sum(map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said).groups()))
    shared = compiled.metadata.shared
    fails = shared > target.shared_memory or (spills > 0 and not target.may_spill)
    return Line(launch.name, dtype, target_name, registers, spills, shared, target.shared_memory, fails)


def cases(files, dtypes, targets, part: str, default: bool):
    """What there is to compile: file, dtype, target, and number of the launch."""
    for file in files:
        module = import_module(f"{package()}.{file}")
        for name in targets:
            for dtype in [dtype for dtype in TARGETS[name].dtypes if dtype in dtypes]:
                launches = list(module.launches(DTYPES[dtype], TARGETS[name].architecture))
                chosen = defaults(launches) if default else range(len(launches))
                yield from ((file, dtype, name, i) for i in chosen if part in launches[i].name)


def defaults(launches) -> list[int]:
    """Numbers of the launches with the sizes of a default configuration, one or more of every kernel."""
    by_kernel = {}
    for i, launch in enumerate(launches):
        by_kernel.setdefault(launch.kernel.__name__, []).append(i)
    return [i for found in by_kernel.values() for i in ([i for i in found if launches[i].default] or found[:1])]


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--default", action="store_true", help="the sizes of a default configuration, for sm_80 and above"
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, help="default: all but sm_86")
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, help="default: all; with --default not fp16, which takes what bf16 does"
    )
    parser.add_argument("--kernels", default="", help="part of the name of a launch")
    parser.add_argument("--jobs", type=int, default=1)
    chosen = parser.parse_args(arguments)
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET=1 leaves nothing to compile: unset it")
    unasked = ("sm_75", "sm_86", "gfx942") if chosen.default else ("sm_86",)
    targets = chosen.targets or [name for name in TARGETS if name not in unasked]
    print(f"{'kernel':48}{'dtype':6}{'target':8}{'registers':>10}{'spills':>8}{'shared':>9} of {'limit':>8}")
    dtypes = chosen.dtypes or [name for name in DTYPES if name != "fp16" or not chosen.default]
    work = list(cases(FILES, dtypes, targets, chosen.kernels, chosen.default))
    failed = 0
    pool = ProcessPoolExecutor(chosen.jobs, mp_context=get_context("spawn")) if chosen.jobs > 1 else None
    for line in (pool.map if pool else map)(inspect, work):
        failed += line.fails
        print(
            f"{line.kernel:48}{line.dtype:6}{line.target:8}{line.registers:10}{line.spills:8}{line.shared:9} of {line.limit:8}"
            f"{'  DOES NOT FIT' if line.fails else ''}",
            flush=True,
        )
    print(f"{len(work)} launches, {failed} that do not fit")
    return 1 if failed or not work else 0


if __name__ == "__main__":
    sys.exit(main())
