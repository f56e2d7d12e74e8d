"""The choice of the mode, and the launch tables."""

import json
from importlib.resources import files
from typing import Any, get_args

import pytest
from gesso_kernels import gemm_nvfp4, gemm_w4a4, gemm_w4a8, gemm_w4a16, gemm_w8a8
from gesso_kernels.errors import UnsupportedMode
from gesso_kernels.modes import MODES, Mode, choose_mode, possible_modes
from gesso_kernels.tables import (
    ARCHITECTURES,
    Table,
    Tile,
    has_kernel,
    load_table,
    lookup_tile,
    shape_class,
    tiles_of,
)

# Weight format and architecture: the best mode for few tokens, for many within 4 bit, for many.
BEST: list[tuple[Any, tuple[int, int] | None, Mode, Mode, Mode]] = [
    ("int4", None, "dequantized", "dequantized", "dequantized"),
    ("int4", (7, 5), "dequantized", "dequantized", "dequantized"),
    ("int4", (8, 0), "w4a16", "w4a4_i8dot", "w8a8_int8"),
    ("int4", (8, 6), "w4a16", "w4a4_i8dot", "w8a8_int8"),
    ("int4", (8, 9), "w4a16", "w4a4_i8dot", "w8a8_int8"),
    ("int4", (9, 0), "w4a16", "w4a8_prog", "w8a8_int8"),
    ("int4", (10, 0), "w4a16", "w4a8_prog", "w8a8_int8"),
    ("int4", (10, 3), "w4a16", "w4a16", "w8a8_fp8"),
    ("int4", (12, 0), "w4a16", "w4a4_i8dot", "w8a8_int8"),
    ("int4", (12, 1), "w4a16", "w4a4_i8dot", "w8a8_int8"),
    ("nvfp4", None, "dequantized", "dequantized", "dequantized"),
    ("nvfp4", (7, 5), "dequantized", "dequantized", "dequantized"),
    ("nvfp4", (8, 0), "w4a16", "w4a16", "w4a16"),
    ("nvfp4", (8, 6), "w4a16", "w4a16", "w4a16"),
    ("nvfp4", (8, 9), "w4a16", "w4a16", "w8a8_fp8"),
    ("nvfp4", (9, 0), "w4a16", "w4a16", "w8a8_fp8"),
    ("nvfp4", (10, 0), "nvfp4", "nvfp4", "nvfp4"),
    ("nvfp4", (10, 3), "nvfp4", "nvfp4", "nvfp4"),
    ("nvfp4", (12, 0), "nvfp4", "nvfp4", "nvfp4"),
    ("nvfp4", (12, 1), "nvfp4", "nvfp4", "nvfp4"),
    ("int8", None, "dequantized", "dequantized", "dequantized"),
    *(("int8", arch, "w8a8_int8", "w8a8_int8", "w8a8_int8") for arch in ARCHITECTURES),
]
# Kernels of a mode in the tables, by weight format where it matters.
KERNELS = {
    ("int4", "w4a16"): "gemm_w4a16",
    ("nvfp4", "w4a16"): "gemm_w4a16_nvfp4",
    "w4a4_i8dot": "gemm_w4a4",
    "w8a8_int8": "gemm_w8a8_int8",
    "w8a8_fp8": "gemm_w8a8_fp8",
    "w4a8_prog": "gemm_w4a8",
    "nvfp4": "gemm_nvfp4",
}


@pytest.mark.parametrize(("weight", "arch", "few", "four_bit", "many"), BEST, ids=str)
def test_the_best_mode_follows_device_tokens_and_memory(
    weight: Any, arch: tuple[int, int] | None, few: Mode, four_bit: Mode, many: Mode
) -> None:
    for budget in ("4bit", "8bit"):
        for tokens in (1, 64):
            assert choose_mode(weight, arch=arch, tokens=tokens, budget=budget) == few
    for tokens in (65, 4096):
        assert choose_mode(weight, arch=arch, tokens=tokens, budget="4bit") == four_bit
        assert choose_mode(weight, arch=arch, tokens=tokens) == many


@pytest.mark.parametrize("weight", ["int4", "nvfp4", "int8"])
@pytest.mark.parametrize("arch", [None, (7, 5), *ARCHITECTURES], ids=str)
def test_a_wanted_mode_is_given_or_refused_with_the_best(
    weight: Any, arch: tuple[int, int] | None
) -> None:
    possible = possible_modes(weight, arch)
    for wanted in get_args(Mode):
        if wanted in possible:
            assert choose_mode(weight, arch=arch, tokens=4096, wanted=wanted) == wanted
            continue
        best = choose_mode(weight, arch=arch, tokens=4096)
        device = "a CPU" if arch is None else f"sm_{arch[0]}{arch[1]}"
        message = f"{wanted} cannot run {weight} weights on {device}; the best mode there is {best}"
        with pytest.raises(UnsupportedMode, match=message):
            choose_mode(weight, arch=arch, tokens=4096, wanted=wanted)


@pytest.mark.parametrize("arch", ARCHITECTURES, ids=str)
@pytest.mark.parametrize("weight", ["int4", "nvfp4", "int8"])
def test_every_possible_mode_has_a_kernel_in_the_table(weight: Any, arch: tuple[int, int]) -> None:
    for mode in possible_modes(weight, arch):
        if mode not in ("reference", "dequantized"):
            assert has_kernel(KERNELS.get((weight, mode)) or KERNELS[mode], arch)


def test_nvfp4_on_hopper_names_fp8() -> None:
    with pytest.raises(UnsupportedMode, match=r"nvfp4 .* sm_90; the best mode there is w8a8_fp8"):
        choose_mode("nvfp4", arch=(9, 0), tokens=4096, wanted="nvfp4")


def test_an_unknown_mode_is_refused_with_the_list() -> None:
    with pytest.raises(UnsupportedMode, match="unknown mode 'w2a2'; modes: reference, dequantized"):
        choose_mode("int4", arch=None, tokens=1, wanted="w2a2")  # type: ignore[arg-type]


def test_every_mode_is_described() -> None:
    assert tuple(MODES) == get_args(Mode)
    assert all(text and "\n" not in text for text in MODES.values())


@pytest.mark.parametrize("arch", ARCHITECTURES, ids=str)
def test_a_table_holds_every_shape_class_and_says_its_source(arch: tuple[int, int]) -> None:
    table = load_table(arch)
    timed = table.source.startswith("timed on NVIDIA")
    assert timed if arch == (9, 0) else table.source == "compiled, not yet timed"
    for classes in table.tiles.values():
        assert list(classes) == ["tiny", "small", "medium", "large"]
    assert json.loads(table.to_json())["kernels"].keys() == table.tiles.keys()


@pytest.mark.parametrize("arch", ARCHITECTURES, ids=str)
def test_a_table_is_written_as_it_is_read(arch: tuple[int, int]) -> None:
    path = files("gesso_kernels").joinpath("tables", f"sm_{arch[0]}{arch[1]}.json")
    written = json.loads(load_table(arch).to_json())
    read = json.loads(path.read_text())
    for classes in read["kernels"].values():
        for tile in classes.values():
            tile.setdefault("split_k", 1)
    assert written == read


@pytest.mark.parametrize(
    ("arch", "nearest"), [((8, 7), (8, 6)), ((11, 0), (10, 3)), ((13, 0), (12, 1))], ids=str
)
def test_an_unknown_architecture_uses_the_next_lower_table(
    arch: tuple[int, int], nearest: tuple[int, int]
) -> None:
    assert load_table(arch) == load_table(nearest)


def test_what_a_table_lacks_is_refused() -> None:
    with pytest.raises(UnsupportedMode, match="sm_75 is older than sm_80"):
        load_table((7, 5))
    with pytest.raises(UnsupportedMode, match=r"gemm_nvfp4 does not run on sm_90; kernels there"):
        lookup_tile("gemm_nvfp4", (9, 0), 128, 128)
    assert not has_kernel("gemm_w8a8_fp8", (8, 6))
    assert not has_kernel("gemm_w8a8_int8", (7, 5))


@pytest.mark.parametrize(
    ("tokens", "rows", "expected"),
    [
        (16, 9216, "tiny"),
        (64, 9216, "small"),
        (65, 2240, "medium"),
        (2048, 2240, "medium"),
        (2048, 6720, "large"),
        (32768, 2240, "large"),
    ],
)
def test_shape_classes_follow_tokens_and_outputs(tokens: int, rows: int, expected: str) -> None:
    assert shape_class(tokens, rows) == expected


def test_k_is_split_only_until_the_cores_are_busy() -> None:
    tile = Tile(block_m=16, block_n=64, block_k=64, warps=4, stages=4, split_k=4)
    assert tile.filling(16, 2240, cores=132).split_k == 4  # 35 tiles
    assert tile.filling(16, 11200, cores=132).split_k == 1  # 175 tiles
    assert tile.filling(1, 64, cores=132).split_k == 4


def test_steps_that_do_not_divide_k_become_one_group() -> None:
    tile = Tile(block_m=128, block_n=128, block_k=128, warps=8, stages=4)
    assert tile.dividing(2240).block_k == 64
    assert tile.dividing(11200).block_k == 64
    assert tile.dividing(5632) is tile


@pytest.mark.parametrize(
    "module", [gemm_w8a8, gemm_w4a4, gemm_w4a8, gemm_w4a16, gemm_nvfp4], ids=lambda m: m.__name__
)
def test_compile_specs_cover_every_tile_of_the_tables(module: Any) -> None:
    specs = module.compile_specs()
    assert len({spec.name for spec in specs}) == len(specs)
    for spec in specs:
        arguments = {*spec.signature, *spec.constexprs}
        assert arguments == set(spec.kernel.arg_names), spec.name
    kernels = {name for arch in ARCHITECTURES for name in load_table(arch).tiles}
    for kernel in kernels:
        if not kernel.startswith(module.__name__.rpartition(".")[2]):
            continue
        for major, minor in ARCHITECTURES:
            if has_kernel(kernel, (major, minor)):
                count = len(tiles_of(kernel, (major, minor)))
                named = [s for s in specs if s.name.startswith(f"{kernel}-")]
                assert sum(10 * major + minor in s.archs for s in named) >= count


def test_a_table_can_be_made_in_python() -> None:
    tile = Tile(block_m=16, block_n=64, block_k=64, warps=4, stages=4, split_k=2)
    table = Table(source="timed", tiles={"gemm_w4a16": {"tiny": tile}})
    assert json.loads(table.to_json())["kernels"]["gemm_w4a16"]["tiny"]["split_k"] == 2
