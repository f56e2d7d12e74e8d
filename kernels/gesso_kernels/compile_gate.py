"""Compile every Triton kernel for every architecture without a GPU, and check the machine code.

    python -m gesso_kernels.compile_gate [--arch 90 ...] [--kernel NAME ...] [--json FILE]

Each kernel file offers ``compile_specs()``. A build breaks its budget when it

* spills registers or uses a stack,
* needs more shared memory than a program may have on that architecture,
* needs more registers than one program may have, or than its spec allows to a thread,
* lacks the instruction that its spec expects (the tensor core of that architecture).

Pointers, and integers that a kernel specializes on, are declared multiples of 16, which is how
Triton finds the shapes of these models at launch. Exit status: 0, or 1 with the reasons on stderr.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Final

from gesso_kernels.compile_spec import ARCHS, CompileSpec

KERNEL_MODULES: Final = (
    "gesso_kernels.quant_down",
    "gesso_kernels.norm_quant_down",
    "gesso_kernels.glu_quant_down",
    "gesso_kernels.gemm_w8a8",
    "gesso_kernels.gemm_w4a8",
    "gesso_kernels.gemm_w4a4",
    "gesso_kernels.gemm_w4a16",
    "gesso_kernels.gemm_nvfp4",
    "gesso_kernels.relu_linear_attention",
    "gesso_kernels.modulated_norm",
    "gesso_kernels.depthwise_glu",
)

# Most shared memory that one block may ask for, bytes (CUDA programming guide, by capability).
SHARED_BYTES: Final[Mapping[int, int]] = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    103: 227 * 1024,
    120: 99 * 1024,
    121: 99 * 1024,
}
REGISTERS_PER_BLOCK: Final = 65_536


@dataclass(frozen=True, kw_only=True)
class Build:
    """What one variant became on one architecture.

    Attributes:
        name: of the `CompileSpec`.
        arch: compute capability times ten.
        registers: of one thread.
        threads: of one program.
        stack: bytes of one thread in local memory: spilled registers or indexed arrays.
        shared: bytes of shared memory of one program.
        found: whether the expected instruction is there; None if none is expected.
        seconds: processor time it took, ptxas included; near 0 from Triton's cache.
    """

    name: str
    arch: int
    registers: int
    threads: int
    stack: int
    shared: int
    found: bool | None
    seconds: float


Report = tuple[Build | None, list[str]]


def problems(spec: CompileSpec, build: Build) -> list[str]:
    """Every budget that a build breaks, one sentence each."""
    limit, expected = SHARED_BYTES[build.arch], (spec.expects or {}).get(build.arch)
    most, threads = spec.max_registers, build.threads
    checks = [
        (build.stack > 0, f"uses {build.stack} bytes of stack per thread; expected none"),
        (
            build.shared > limit,
            f"needs {build.shared} bytes of shared memory; the limit is {limit}",
        ),
        (
            most is not None and build.registers > most,
            f"uses {build.registers} registers per thread; its budget is {most}",
        ),
        (
            build.registers * threads > REGISTERS_PER_BLOCK,
            f"{threads} threads of {build.registers} registers exceed {REGISTERS_PER_BLOCK}",
        ),
        (build.found is False, f"its machine code has no {expected}"),
    ]
    where = f"{build.name} for sm_{build.arch}"
    return [f"{where}: {reason}" for broken, reason in checks if broken]


def compile_one(spec: CompileSpec, arch: int) -> Build:
    """Compile one variant and read its resources from the binary; needs no device."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    start = _processor_seconds()
    names = spec.kernel.arg_names
    signature = {name: spec.signature.get(name, "constexpr") for name in names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if (signature[name].startswith("*") or re.fullmatch(r"[iu]\d+", signature[name]))
        and not spec.kernel.params[index].do_not_specialize
    }
    source = ASTSource(spec.kernel, signature, dict(spec.constexprs), attributes)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        usage = dict(re.findall(r"(\w+):(\d+)", _cuobjdump("--dump-resource-usage", binary)))
        expected = (spec.expects or {}).get(arch)
        found = None if expected is None else expected in _cuobjdump("--dump-sass", binary)
    return Build(
        name=spec.name,
        arch=arch,
        registers=int(usage["REG"]),
        threads=32 * compiled.metadata.num_warps,
        stack=int(usage["STACK"]) + int(usage["LOCAL"]),
        shared=compiled.metadata.shared,
        found=found,
        seconds=round(_processor_seconds() - start, 2),
    )


def _processor_seconds() -> float:
    return sum(os.times()[:4])  # of this process and of the tools it has run


def _cuobjdump(option: str, binary: Path) -> str:
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, option, str(binary)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def compile_specs_of(module: str) -> list[CompileSpec]:
    """The variants that a kernel file offers to the gate."""
    specs: list[CompileSpec] = importlib.import_module(module).compile_specs()
    return specs


def _run(job: tuple[str, int, int]) -> Report:
    """Compile the variant ``index`` of ``module`` for ``arch``, in a worker."""
    from triton.errors import TritonError
    from triton.runtime.errors import PTXASError

    module, index, arch = job
    spec = compile_specs_of(module)[index]
    try:
        build = compile_one(spec, arch)
    except (TritonError, PTXASError, RuntimeError) as error:
        reason = str(error).strip() or type(error).__name__
        return None, [f"{spec.name} for sm_{arch}: does not compile: {reason}"]
    return build, problems(spec, build)


def _jobs(
    modules: Sequence[str], archs: Sequence[int], kernels: Sequence[str]
) -> list[tuple[str, int, int]]:
    return [
        (module, index, arch)
        for module in modules
        for index, spec in enumerate(compile_specs_of(module))
        if not kernels or spec.name in kernels
        for arch in spec.archs
        if arch in archs
    ]


def gate(
    modules: Sequence[str] = KERNEL_MODULES,
    archs: Sequence[int] = ARCHS,
    kernels: Sequence[str] = (),
    workers: int = 2,
    on_report: Callable[[Report], None] = lambda report: None,
) -> list[Report]:
    """Build everything that is asked for, in worker processes.

    Args:
        modules: importable names of kernel files.
        archs: compute capabilities times ten.
        kernels: names of variants; all if empty.
        workers: processes.
        on_report: called with each result, in order.

    Raises:
        RuntimeError: when Triton's interpreter is on: kernels are then not compiled at all.
        ValueError: nothing matches.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 replaces the compiler; unset it for the gate")
    jobs = _jobs(modules, archs, kernels)
    if not jobs:
        raise ValueError(f"no kernel matches {list(kernels)} for {list(archs)} in {list(modules)}")
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=get_context("spawn")) as pool:
        return list(_watched(pool.map(_run, jobs), on_report))


def _watched(reports: Iterator[Report], on_report: Callable[[Report], None]) -> Iterator[Report]:
    for report in reports:
        on_report(report)
        yield report


def _print(report: Report) -> None:
    build, broken = report
    if build is not None:
        print(
            f"{build.name:36} sm_{build.arch:<4} {build.registers:4} registers x "
            f"{build.threads:<4} {build.stack:3} stack {build.shared:7} B shared "
            f"{build.seconds:5.1f} s",
            flush=True,
        )
    for reason in broken:
        print(reason, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m gesso_kernels.compile_gate", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--arch", type=int, action="append", choices=ARCHS, metavar="CAPABILITY")
    parser.add_argument("--kernel", action="append", default=[], metavar="NAME")
    parser.add_argument("--module", action="append", metavar="MODULE", help="default: all of ours")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args(arguments)
    reports = gate(
        given.module or KERNEL_MODULES, given.arch or ARCHS, given.kernel, given.workers, _print
    )
    broken = [reason for _, reasons in reports for reason in reasons]
    builds = [asdict(build) for build, _ in reports if build is not None]
    if given.json is not None:
        given.json.write_text(json.dumps({"builds": builds, "broken": broken}, indent=1) + "\n")
    print(f"{len(builds)} of {len(reports)} compiled, {len(broken)} budgets broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
