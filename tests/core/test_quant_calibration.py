"""Captured inputs: a fair sample of bounded size, the same every time, never of two runs mixed."""

import hashlib
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from gesso_core.errors import ConfigError, InvalidRequest, NumericalError, WeightsError
from gesso_core.pipelines.denoiser import Denoiser
from gesso_core.pipelines.load import load_denoiser
from gesso_core.ptq import calibration
from gesso_core.ptq.calibration import Plan, capture, make_plan, read_layer
from gesso_core.ptq.measuring import behind_parent, parent_inputs
from gesso_core.ptq.prompts import default_prompts, read_prompts
from gesso_core.ptq.samples import SampleWriter, read_sample
from gesso_core.quant.layer_map import LayerRule, find_layers, layer_map, matrix_of

PROMPTS = ("a red apple", "an owl on a blue background, 3D style", "a key")
RULES = tuple(
    replace(rule, measure="parent") if rule.pattern.endswith("cross.q") else rule
    for rule in layer_map("sana")
)


@pytest.fixture(scope="module")
def denoiser(tiny_pipeline: Path) -> Denoiser:
    return load_denoiser(tiny_pipeline)


@pytest.fixture(scope="module")
def rules(denoiser: Denoiser) -> dict[str, LayerRule]:
    return find_layers(denoiser.model, RULES)


@pytest.fixture(scope="module")
def plan(denoiser: Denoiser, rules: dict[str, LayerRule]) -> Plan:
    return make_plan(denoiser, rules, PROMPTS, steps=3, max_tokens=100)


@pytest.fixture(scope="module")
def captured(
    tmp_path_factory: pytest.TempPathFactory,
    denoiser: Denoiser,
    rules: dict[str, LayerRule],
    plan: Plan,
) -> Path:
    folder = tmp_path_factory.mktemp("captured") / "calibration"
    capture(denoiser, rules, PROMPTS, plan, folder)
    return folder


def digest(folder: Path) -> str:
    """Of all files of a folder and their names."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [
        f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}"
        for path in files
    ]
    return "\n".join(lines)


def test_a_long_stream_leaves_a_uniform_sample_of_the_size_asked_for(tmp_path: Path) -> None:
    writer = SampleWriter(tmp_path / "layer", 400, seed=1)
    for start in range(0, 40_000, 500):
        writer.add({"x": torch.arange(start, start + 500)[:, None].float()})
        writer.flush()
    writer.finish()
    kept = read_sample(tmp_path / "layer")["x"].flatten()
    assert len(kept) == len(set(kept.tolist())) == 400
    assert kept.equal(kept.sort().values)  # in the order of the stream
    # 400 of 40,000 evenly spread: a quarter of the stream holds 100 ± 5 standard deviations.
    quarters = torch.histc(kept, bins=4, min=0, max=40_000)
    assert ((quarters - 100).abs() < 45).all(), quarters


def test_neither_memory_nor_disk_grow_with_the_stream(tmp_path: Path) -> None:
    process = psutil.Process()
    writer = SampleWriter(tmp_path / "layer", 64, seed=1)
    batch = {"x": torch.ones(1024, 256)}  # 1 MiB
    before = process.memory_info().rss
    largest_disk = 0
    for _ in range(400):
        writer.add(batch)
        if writer.pending_bytes > 2**17:
            writer.flush()
        largest_disk = max(largest_disk, sum(p.stat().st_size for p in writer.folder.iterdir()))
    writer.finish()
    assert process.memory_info().rss - before < 50 * 2**20
    assert largest_disk < 6 * 64 * 1024
    assert len(read_sample(tmp_path / "layer")["x"]) == 64


def test_a_short_stream_is_kept_whole_and_shorter_texts_are_padded(tmp_path: Path) -> None:
    writer = SampleWriter(tmp_path / "layer", 10, seed=1, fill={"bias": -7.0})
    writer.add({"x": torch.ones(2, 3), "bias": torch.zeros(2, 1, 4)})
    writer.flush()
    writer.add({"x": torch.ones(1, 3), "bias": torch.zeros(1, 1, 6)})
    writer.finish()
    kept = read_sample(tmp_path / "layer")
    assert kept["x"].shape == (3, 3)
    assert kept["bias"][0, 0].tolist() == [0, 0, 0, 0, -7, -7]


def test_every_layer_is_captured_at_every_step_and_both_halves(
    captured: Path, denoiser: Denoiser, rules: dict[str, LayerRule]
) -> None:
    for name, rule in rules.items():
        sample = read_layer(captured, [name], rule, denoiser.model)
        weight, _ = matrix_of(denoiser.model.get_submodule(name), name)
        assert sample.x_MK.shape[1] == sample.maxima_K.shape[0] == weight.shape[1]
        if rule.measure == "parent":  # whole sequences of 16 tokens: 3 prompts, 3 steps, 2 halves
            assert sample.sequence == 16
            assert len(sample.x_MK) == 16 * 18
        elif name.endswith("cross.kv"):  # the text goes through once
            assert len(sample.x_MK) < 100
        else:
            assert len(sample.x_MK) == 100
        assert (sample.x_MK.abs().amax(0) <= sample.maxima_K).all()


def test_maxima_are_of_all_tokens_not_of_the_sample(
    captured: Path, denoiser: Denoiser, rules: dict[str, LayerRule]
) -> None:
    name = "blocks.1.ffn.project"
    sample = read_layer(captured, [name], rules[name], denoiser.model)
    assert (sample.x_MK.abs().amax(0) < sample.maxima_K).any()


@pytest.mark.parametrize("name", ["blocks.0.attention.qkv", "blocks.1.cross.q"])
def test_an_exact_output_leads_to_what_the_attention_gave(
    captured: Path, denoiser: Denoiser, rules: dict[str, LayerRule], name: str
) -> None:
    sample = read_layer(captured, [name], rules[name], denoiser.model)
    weight, bias = matrix_of(denoiser.model.get_submodule(name), name)
    assert sample.evaluate is not None
    y = torch.nn.functional.linear(sample.x_MK, weight, bias)
    rows = torch.arange(len(y))
    attended = sample.evaluate(y, rows)
    assert attended.shape == (len(sample.x_MK), 64)
    some = torch.cat([rows[32:48], rows[:16]])
    torch.testing.assert_close(sample.evaluate(y[some], some), attended[some])
    # A sequence's output in the place of another's gives something else.
    assert not torch.allclose(sample.evaluate(y.roll(16, 0), rows), attended, atol=1e-3)


def test_padded_texts_do_not_change_the_cross_attention(denoiser: Denoiser) -> None:
    cross = denoiser.model.get_submodule("blocks.0.cross")
    generator = torch.Generator().manual_seed(0)
    x, keys, values = (torch.randn(2, n, 64, generator=generator) for n in (16, 5, 5))
    inputs = parent_inputs(cross, (x, (keys, values), None))
    padded = {
        "x": x,
        "keys": torch.nn.functional.pad(keys, (0, 0, 0, 3)),
        "values": torch.nn.functional.pad(values, (0, 0, 0, 3), value=9.0),
        "bias": torch.nn.functional.pad(inputs["bias"], (0, 3), value=-10_000.0),
    }
    y, rows = torch.randn(32, 64, generator=generator), torch.arange(32)
    torch.testing.assert_close(
        behind_parent(cross, {"q": 64}, padded)(y, rows),
        behind_parent(cross, {"q": 64}, inputs)(y, rows),
    )


def test_a_parent_of_unknown_inputs_cannot_be_measured_behind() -> None:
    with pytest.raises(ConfigError, match="more than one tensor"):
        parent_inputs(torch.nn.Bilinear(2, 2, 2), (torch.ones(2), torch.ones(2)))


def test_the_same_plan_gives_the_same_bytes(
    captured: Path,
    denoiser: Denoiser,
    rules: dict[str, LayerRule],
    plan: Plan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calibration, "PENDING_BYTES", 0)  # to disk after every step
    capture(denoiser, rules, PROMPTS, plan, tmp_path / "again")
    names = list(rules)
    for name in names:
        first, second = read_sample(captured / name), read_sample(tmp_path / "again" / name)
        assert first.keys() == second.keys()
        for key, tensor in first.items():
            assert tensor.equal(second[key]), (name, key)


def test_a_complete_capture_is_used_again(
    captured: Path, denoiser: Denoiser, rules: dict[str, LayerRule], plan: Plan
) -> None:
    before = digest(captured)
    capture(denoiser, rules, (), plan, captured)  # no prompt is needed, nothing is drawn
    assert digest(captured) == before


def test_an_interrupted_capture_begins_again(
    denoiser: Denoiser, rules: dict[str, LayerRule], plan: Plan, tmp_path: Path
) -> None:
    def stop(done: int, total: int) -> None:
        assert total == 9
        raise KeyboardInterrupt

    folder = tmp_path / "calibration"
    with pytest.raises(KeyboardInterrupt):
        capture(denoiser, rules, PROMPTS, plan, folder, on_done=stop)
    name = "blocks.0.attention.qkv"
    with pytest.raises(WeightsError, match=r"no calibration for blocks.0.attention.qkv.*--fresh"):
        read_layer(folder, [name], rules[name], denoiser.model)
    capture(denoiser, rules, PROMPTS, plan, folder)
    assert len(read_layer(folder, [name], rules[name], denoiser.model).x_MK) > 0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"prompts_sha256": "0" * 64}, "prompts_sha256"),
        ({"weights_sha256": "0" * 64}, "weights_sha256"),
        ({"steps": 4}, "steps 3 instead of 4"),
        ({"seed": 1}, "seed 12345 instead of 1"),
    ],
)
def test_captures_of_another_run_are_refused(
    captured: Path,
    denoiser: Denoiser,
    rules: dict[str, LayerRule],
    plan: Plan,
    change: dict[str, object],
    told: str,
) -> None:
    other = replace(plan, **change)  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match="must not be mixed") as error:
        capture(denoiser, rules, PROMPTS, other, captured)
    assert told in error.value.message


def test_missing_calibration_says_what_to_run(
    denoiser: Denoiser, rules: dict[str, LayerRule], tmp_path: Path
) -> None:
    name = "blocks.0.ffn.expand"
    with pytest.raises(WeightsError, match=f"no calibration for {name}.*gesso quantize"):
        read_layer(tmp_path, [name], rules[name], denoiser.model)


def test_an_input_that_is_not_finite_is_named(
    tiny_pipeline: Path, rules: dict[str, LayerRule], plan: Plan, tmp_path: Path
) -> None:
    broken = load_denoiser(tiny_pipeline)
    weight = broken.model.get_submodule("blocks.0.ffn.depthwise").weight
    assert isinstance(weight, torch.Tensor)
    weight[0] = float("nan")
    with pytest.raises(NumericalError, match=r"blocks.0.ffn.project"):
        capture(broken, rules, PROMPTS, plan, tmp_path / "calibration")


def test_the_small_model_brings_prompts_and_others_ask_for_them(tiny_pipeline: Path) -> None:
    prompts = default_prompts("sana-tiny", 50)
    assert len(set(prompts)) == 50
    assert prompts == default_prompts("sana-tiny", 50)
    with pytest.raises(InvalidRequest, match="--prompts FILE"):
        default_prompts(tiny_pipeline)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "has no prompts"),
        (b"\n \n", "has no prompts"),
        (b"a cat\n\xff\xfe", "not UTF-8"),
        (b"x" * 4001, "4,001 letters in prompt 1"),
        (b"a\n" * 4097, "4,097 prompts"),
        (b"a" * (2**20 + 1), "1,048,576 bytes"),
        (None, "cannot be read"),
    ],
    ids=["empty", "blank", "binary", "long", "many", "large", "missing"],
)
def test_a_bad_prompt_file_is_refused(tmp_path: Path, content: bytes | None, told: str) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidRequest, match=told):
        read_prompts(path)


def test_prompts_are_the_lines_that_are_not_empty(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("a cat\r\n\r\n  ein Bär  \n".encode())
    assert read_prompts(path) == ["a cat", "ein Bär"]
