"""The compile gate: it builds every kernel for every architecture, and notices broken budgets."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from gesso_kernels.compile_gate import (
    KERNEL_MODULES,
    SHARED_BYTES,
    Build,
    compile_specs_of,
    gate,
    problems,
)
from gesso_kernels.compile_spec import ARCHS, CompileSpec

SPEC = CompileSpec(
    name="some_kernel",
    kernel=None,
    signature={},
    constexprs={},
    num_warps=4,
    num_stages=1,
    expects={90: "HGMMA"},
    max_registers=128,
)
BUILD = Build(
    name="some_kernel",
    arch=90,
    registers=128,
    threads=512,
    stack=0,
    shared=SHARED_BYTES[90],
    found=True,
    seconds=0.0,
)

# A module that the gate can import from PYTHONPATH: x + y, and a bound that it cannot keep.
KERNEL = """
from gesso_kernels.compile_spec import CompileSpec
from gesso_kernels.triton_import import tl, triton


@triton.jit
def add(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at) + tl.load(y + at))


def compile_specs():
    spec = dict(kernel=add, signature={"x": "*fp32", "y": "*fp32"}, constexprs={"BLOCK": 64})
    spec |= dict(num_warps=1, num_stages=1)
    return [
        CompileSpec(name="kept", max_registers=255, expects={80: "FADD"}, **spec),
        CompileSpec(name="broken", max_registers=1, expects={80: "HMMA"}, **spec),
        CompileSpec(name="wrong", **{**spec, "signature": {"x": "*fp32", "y": "fp32"}}),
    ]
"""


def run_gate(
    *arguments: str, folder: Path | None = None, seconds: int = 60
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if folder is not None:
        environment |= {"PYTHONPATH": str(folder), "TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-m", "gesso_kernels.compile_gate", *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )


def test_a_build_at_its_limits_is_accepted() -> None:
    assert problems(SPEC, BUILD) == []


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (replace(BUILD, stack=8), "uses 8 bytes of stack per thread; expected none"),
        (replace(BUILD, shared=SHARED_BYTES[90] + 1), "the limit is 232448"),
        (replace(BUILD, registers=129, threads=128), "129 registers per thread; its budget is 128"),
        (replace(BUILD, threads=1024), "1024 threads of 128 registers exceed 65536"),
        (replace(BUILD, found=False), "its machine code has no HGMMA"),
    ],
    ids=["stack", "shared", "registers", "threads", "instruction"],
)
def test_every_broken_budget_is_named(build: Build, reason: str) -> None:
    (found,) = problems(SPEC, build)
    assert found.startswith("some_kernel for sm_90: ")
    assert reason in found


def test_the_gate_fails_on_a_broken_budget_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "kernels_of_a_test.py").write_text(KERNEL)
    done = run_gate(
        *("--module", "kernels_of_a_test", "--arch", "80", "--workers", "1"),
        *("--json", str(tmp_path / "report.json")),
        folder=tmp_path,
    )
    assert done.returncode == 1, done.stderr
    assert "broken for sm_80: uses" in done.stderr
    assert "broken for sm_80: its machine code has no HMMA" in done.stderr
    assert "wrong for sm_80: does not compile" in done.stderr
    assert "kept for" not in done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert [build["name"] for build in report["builds"]] == ["kept", "broken"]
    assert len(report["broken"]) == 3


def test_under_the_interpreter_the_gate_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset it for the gate"):
        gate()


def test_variants_have_names_of_their_own_and_known_architectures() -> None:
    specs = [spec for module in KERNEL_MODULES for spec in compile_specs_of(module)]
    names = [spec.name for spec in specs]
    assert sorted(set(names)) == sorted(names)
    assert all(set(spec.archs) <= set(ARCHS) for spec in specs)
    assert set(SHARED_BYTES) == set(ARCHS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_kernel_compiles_for_every_architecture_within_its_budget(tmp_path: Path) -> None:
    done = run_gate("--json", str(tmp_path / "report.json"), seconds=1700)
    assert done.returncode == 0, done.stderr
    builds = json.loads((tmp_path / "report.json").read_text())["builds"]
    built = {(build["name"], build["arch"]) for build in builds}
    for module in KERNEL_MODULES:
        specs = compile_specs_of(module)
        assert specs, module
        assert {(spec.name, arch) for spec in specs for arch in spec.archs} <= built
    assert {arch for _, arch in built} == set(ARCHS)
