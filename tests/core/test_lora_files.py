"""LoRA files and the folder they lie in: what is refused, and what happens when files change."""

import itertools
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from gesso_core.errors import InvalidRequest, UnsafeFile, WeightsError
from gesso_core.lora import adapter as adapter_file
from gesso_core.lora.adapter import read_adapter
from gesso_core.lora.library import LoraLibrary, LoraUse
from gesso_core.lora.stack import LoraStack
from gesso_core.lora.targets import LayerMap
from gesso_core.models.keys.sana import SANA_DIFFUSERS
from gesso_core.models.sana import Sana, SanaConfig
from safetensors.torch import save_file
from torch import Tensor

SMALL = SanaConfig(
    width=64,
    depth=1,
    cross_heads=2,
    cross_head_dim=32,
    caption_channels=48,
    sample_size=4,
    in_channels=6,
    out_channels=6,
)
INK = LoraUse(name="ink")
Q = "transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def layers() -> LayerMap:
    return LayerMap(Sana(SMALL), (SANA_DIFFUSERS,))


def written(folder: Path, tensors: Mapping[str, Tensor], name: str = "ink", **facts: Any) -> Path:
    path = folder / f"{name}.safetensors"
    metadata = {"lora_adapter_metadata": json.dumps(facts)} if facts else None
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path, metadata)
    return path


def stack_of(library: LoraLibrary, *uses: LoraUse, dtype: torch.dtype = torch.float32) -> LoraStack:
    return library.stack(uses or [INK], dtype=dtype, device=torch.device("cpu"))


A, B = torch.ones(4, 64), torch.ones(64, 4)
PAIR = {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B}
OTHER = "transformer_blocks.9.attn1.to_q"
REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "unknown ending": (PAIR | {f"{Q}.lora_C.weight": A}, "unknown key .*lora_C.*expected <l"),
    "text encoder": (PAIR | {"lora_te_q.lora_Q": A}, "text encoder is not supported"),
    "dora": (PAIR | {f"{Q}.dora_scale": A}, "DoRA is not supported"),
    "loha": (PAIR | {f"{Q}.hada_w1_a": A}, "LoHa and LoKr are not supported"),
    "bias": (PAIR | {f"{Q}.lora_B.bias": A}, "biases and whole weights"),
    "no layer": ({f"{OTHER}.lora_A.weight": A, f"{OTHER}.lora_B.weight": B}, "blocks.9.* no LoRA"),
    "convolution": (
        {"patch_embed.proj.lora_A.weight": A, "patch_embed.proj.lora_B.weight": B},
        "patch_embed.proj.* no LoRA",
    ),
    "no up": ({f"{Q}.lora_A.weight": A}, r"to_q.lora_A.weight' has no lora_B"),
    "no down": ({f"{Q}.lora_B.weight": B}, r"to_q.lora_B.weight' has no lora_A"),
    "alpha alone": ({f"{Q}.alpha": torch.tensor(1.0)}, r"to_q.alpha' has no lora_A"),
    "ranks": (PAIR | {f"{Q}.lora_B.weight": torch.ones(64, 5)}, "has rank 5, but .* has 4"),
    "rank 0": (
        {f"{Q}.lora_A.weight": torch.ones(0, 64), f"{Q}.lora_B.weight": torch.ones(64, 0)},
        "has rank 0, expected 1 to 1024",
    ),
    "too high": (
        {f"{Q}.lora_A.weight": torch.ones(1025, 64), f"{Q}.lora_B.weight": torch.ones(64, 1025)},
        "has rank 1025, expected 1 to 1024",
    ),
    "inputs": (PAIR | {f"{Q}.lora_A.weight": torch.ones(4, 63)}, "63 inputs and 64 outputs"),
    "outputs": (PAIR | {f"{Q}.lora_B.weight": torch.ones(192, 4)}, "64 inputs and 192 outputs"),
    "one dimension": (PAIR | {f"{Q}.lora_A.weight": torch.ones(4)}, r"shape \[4\]"),
    "3x3": (PAIR | {f"{Q}.lora_A.weight": torch.ones(4, 64, 3, 3)}, r"shape \[4, 64, 3, 3\]"),
    "integers": (PAIR | {f"{Q}.lora_A.weight": A.to(torch.int8)}, "is torch.int8"),
    "nan": (PAIR | {f"{Q}.lora_B.weight": B * float("nan")}, "holds NaN or infinity"),
    "alpha of two": (PAIR | {f"{Q}.alpha": torch.ones(2)}, "must be one finite number"),
    "alpha of infinity": (PAIR | {f"{Q}.alpha": torch.tensor(float("inf"))}, "one finite number"),
    "twice": (PAIR | {f"transformer.{Q}.lora_A.weight": A}, "is the same as"),
    "nothing": ({}, "holds no tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_is_wrong_is_refused_by_the_key(
    tmp_path: Path, layers: LayerMap, case: str
) -> None:
    tensors, message = REFUSED[case]
    written(tmp_path, tensors)
    with pytest.raises(WeightsError, match=message) as caught:
        stack_of(LoraLibrary(tmp_path, layers))
    assert "ink" in caught.value.message
    assert caught.value.field == "loras"


def test_a_file_of_another_model_is_refused_at_strength_0_too(
    tmp_path: Path, layers: LayerMap
) -> None:
    tensors, message = REFUSED["inputs"]
    written(tmp_path, tensors)
    with pytest.raises(WeightsError, match=message):
        stack_of(LoraLibrary(tmp_path, layers), replace(INK, strength=0.0))


def test_ranks_of_several_adapters_add_up_to_the_limit(tmp_path: Path, layers: LayerMap) -> None:
    halves = {name: (torch.randn(512, 64), torch.randn(64, 512)) for name in (Q, Q[:-1] + "k")}
    for name in ("ink", "oil"):
        factors = {
            f"{layer}.lora_{half}.weight": tensor
            for layer, pair in halves.items()
            for half, tensor in zip("AB", pair, strict=True)
        }
        written(tmp_path, factors, name)
    library = LoraLibrary(tmp_path, layers)
    stack_of(library, INK)
    with pytest.raises(WeightsError, match=r"rank 2048 in the layer blocks.0.attention.qkv"):
        stack_of(library, INK, LoraUse(name="oil"))


def test_numbers_that_the_dtype_cannot_hold_are_refused(tmp_path: Path, layers: LayerMap) -> None:
    written(tmp_path, PAIR | {f"{Q}.lora_B.weight": B * 5e4})
    library, strong = LoraLibrary(tmp_path, layers), replace(INK, strength=2.0)
    stack_of(library, strong)
    with pytest.raises(WeightsError, match=r"too large for torch.float16"):
        stack_of(library, strong, dtype=torch.float16)


@pytest.mark.parametrize(
    "facts",
    [{"transformer.lora_alpha": "much"}, {"transformer.alpha_pattern": 3}],
    ids=["alpha", "pattern"],
)
def test_damaged_metadata_is_refused(tmp_path: Path, facts: dict[str, Any]) -> None:
    with pytest.raises(WeightsError, match="metadata 'lora_adapter_metadata' is damaged"):
        read_adapter(written(tmp_path, PAIR, **facts))
    with pytest.raises(WeightsError, match="is a DoRA"):
        read_adapter(written(tmp_path, PAIR, **{"transformer.use_dora": True}))


def test_pickles_cut_files_and_huge_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pickle = tmp_path / "pickle.safetensors"
    pickle.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(UnsafeFile, match="is a pickle"):
        read_adapter(pickle)
    path = written(tmp_path, PAIR)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(WeightsError, match="not a complete safetensors file"):
        read_adapter(cut)
    monkeypatch.setattr(adapter_file, "MAX_FILE_BYTES", 100)
    with pytest.raises(WeightsError, match=r"a LoRA may have 100"):
        read_adapter(path)


def test_a_library_reads_what_changed_and_nothing_else(tmp_path: Path, layers: LayerMap) -> None:
    library = LoraLibrary(tmp_path, layers)
    written(tmp_path, PAIR)
    first = stack_of(library, INK)
    assert stack_of(library, INK) is first
    stronger = stack_of(library, replace(INK, strength=2.0))
    assert stronger.key != first.key
    written(tmp_path, {key: tensor * 2 for key, tensor in PAIR.items()})
    second = stack_of(library, INK)
    assert second.key != first.key
    assert second.uses[0].sha256 != first.uses[0].sha256


def test_threads_get_whole_adapters_while_their_file_is_replaced(
    tmp_path: Path, layers: LayerMap
) -> None:
    library = LoraLibrary(tmp_path, layers, cache_bytes=1)  # reads again and again
    spare = tmp_path / "spare"
    spare.mkdir()
    contents: dict[str, float] = {}
    for number in (1.0, 2.0):  # in the factors, and in the scale that the metadata gives
        factors = {key: tensor * number for key, tensor in PAIR.items()}
        path = written(spare, factors, str(number), lora_alpha=4 * number)
        contents[read_adapter(path).sha256] = number
    (tmp_path / "ink.safetensors").write_bytes(path.read_bytes())
    stop = Event()

    def replace_it() -> None:
        for number in itertools.cycle((1.0, 2.0)):
            (spare / "next").write_bytes((spare / f"{number}.safetensors").read_bytes())
            (spare / "next").replace(tmp_path / "ink.safetensors")
            if stop.is_set():
                return

    def use(strength: float) -> None:
        for _ in range(40):
            made = stack_of(library, replace(INK, strength=strength))
            (used,) = made.uses
            assert used.strength == strength
            ((down, up),) = made._factors.values()
            assert down[:4].eq(contents[used.sha256]).all()
            assert up[:64, :4].eq(contents[used.sha256] ** 2 * strength).all()

    with ThreadPoolExecutor(4) as pool:
        writer = pool.submit(replace_it)
        try:
            for user in [pool.submit(use, strength) for strength in (0.5, 1.0, -1.0)]:
                user.result()
        finally:
            stop.set()
        writer.result()


def test_a_library_keeps_no_more_than_its_bytes(
    tmp_path: Path, layers: LayerMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        written(tmp_path, PAIR, name)
    reads: list[str] = []
    real = adapter_file.read_adapter

    def counted(path: Path) -> Any:
        reads.append(path.stem)
        return real(path)

    monkeypatch.setattr("gesso_core.lora.library.read_adapter", counted)
    for room, expected in ((1 << 20, ["one", "two"]), (1, ["one", "two", "one"])):
        library = LoraLibrary(tmp_path, layers, cache_bytes=room)
        reads.clear()
        for name in ("one", "two", "one"):
            stack_of(library, LoraUse(name=name))
        assert reads == expected


@pytest.mark.parametrize(
    "name", ["oil", "../ink", "/etc/passwd", "INK", "", "ink.safetensors", "a\0b", "x" * 65]
)
def test_a_name_that_is_not_in_the_folder_is_refused_with_those_that_are(
    tmp_path: Path, layers: LayerMap, name: str
) -> None:
    written(tmp_path, PAIR)
    written(tmp_path, PAIR, "Not_A_Token")
    library = LoraLibrary(tmp_path, layers)
    assert library.names() == ["ink"]
    for ask in (library.require, lambda uses: stack_of(library, *uses)):
        with pytest.raises(InvalidRequest, match="available: ink") as caught:
            ask([LoraUse(name=name)])
        assert caught.value.field == "loras"


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path, layers: LayerMap) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    (folder / "ink.safetensors").symlink_to(written(tmp_path, PAIR, "secret"))
    library = LoraLibrary(folder, layers)
    for ask in (library.require, lambda uses: stack_of(library, *uses)):
        with pytest.raises(UnsafeFile, match=r"ink.* outside its folder") as caught:
            ask([INK])
        assert caught.value.field == "loras"
        assert str(tmp_path) not in caught.value.message


def test_what_is_wrong_with_a_file_is_told_without_where_it_is(
    tmp_path: Path, layers: LayerMap
) -> None:
    path = written(tmp_path, PAIR)
    for wrong in (path.read_bytes()[:-9], b"\x80\x02}q\x00.", b""):
        path.write_bytes(wrong)
        with pytest.raises(WeightsError, match=r"ink\.safetensors") as caught:
            stack_of(LoraLibrary(tmp_path, layers))
        assert str(tmp_path) not in caught.value.message


def test_an_empty_or_missing_folder_says_what_belongs_there(
    tmp_path: Path, layers: LayerMap
) -> None:
    with pytest.raises(InvalidRequest, match=r"named like ink\.safetensors"):
        LoraLibrary(tmp_path / "missing", layers).require([INK])
