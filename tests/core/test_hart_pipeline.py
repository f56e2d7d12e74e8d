"""The HART pipeline: requests, batches, cancelled and repeated steps, going on from a picture."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gesso_core.errors import ConfigError, InvalidRequest, WeightsError
from gesso_core.hub import resolve
from gesso_core.lora.library import LoraUse
from gesso_core.models.hart.config import HART_CONFIGS, HARTConfig
from gesso_core.models.hart.initialization import initialize_weights
from gesso_core.models.hart.quantizer import MultiScaleQuantizer
from gesso_core.models.hart.tokenizer_config import HARTTokenizerConfig
from gesso_core.models.hart.transformer import HART
from gesso_core.models.keys.hart import HART_ORIGINAL
from gesso_core.models.keys.hart_tokenizer import tokenizer_keys
from gesso_core.models.keys.translate import untranslate
from gesso_core.pipelines.hart import HartPipeline
from gesso_core.pipelines.hart_draft import HartDraft
from gesso_core.pipelines.hart_load import load_hart
from gesso_core.pipelines.recipe import GenerationRequest
from gesso_core.pipelines.step_batcher import StepBatcher
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG: HARTConfig = replace(HART_CONFIGS["hart-tiny"], depth=2, vocabulary=128)
PROMPTS = ("a red apple", "a dog on a blue background", "x", "two cats, 3D style", "a house")


def write_release(folder: Path, config: HARTConfig = CONFIG) -> Path:
    """A folder in the published layout with random weights, for latents of dcae-tiny."""
    generator = torch.Generator().manual_seed(0)
    model = HART(config).requires_grad_(False)
    initialize_weights(model, generator)
    for parameter in model.parameters():
        if parameter.ndim > 1 and float(parameter.abs().max()) < 1e-3:
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    torch.nn.init.normal_(model.head.weight, std=0.3, generator=generator)
    tokenizer = HARTTokenizerConfig(
        vocabulary=config.vocabulary, channels=32, scales=config.scales, autoencoder="dcae-tiny"
    )
    torch.manual_seed(0)
    quantizer = tokenizer.build_quantizer().requires_grad_(False)
    for name in ("llm", "tokenizer"):
        (folder / name).mkdir(parents=True)
    weights = untranslate(model.state_dict(), HART_ORIGINAL)
    buffers = {
        "attn_bias_for_masking": torch.zeros(1, 1, 49, 49),
        "lvl_1L": torch.zeros(1, 49).long(),
    }
    save_file(weights | buffers, folder / "llm" / "model.safetensors")
    (folder / "llm" / "config.json").write_text(json.dumps(config.to_original()))
    codes = {f"quantizer.{name}": t for name, t in quantizer.state_dict().items()}
    save_file(untranslate(codes, tokenizer_keys(4)), folder / "tokenizer" / "model.safetensors")
    (folder / "tokenizer" / "config.json").write_text(json.dumps(tokenizer.to_original()))
    about = {"base": "sana-tiny", "text_encoder": "smollm2-l6", "guidance_scale": 2.0}
    (folder / "config.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("hart") / "hart-random")


@pytest.fixture(scope="module")
def pipeline(release: Path) -> HartPipeline:
    return load_hart(release)


def request(prompt: str = "a red apple", **changes: object) -> GenerationRequest:
    return replace(GenerationRequest(prompt=prompt, width=64, height=64), **changes)  # type: ignore[arg-type]


def finished(pipeline: HartPipeline, drafts: Sequence[HartDraft]) -> list[HartDraft]:
    drafts = list(drafts)
    while not drafts[0].done:
        drafts = pipeline.advance(drafts)
    return drafts


def begun(pipeline: HartPipeline, *requests: GenerationRequest) -> list[HartDraft]:
    return [pipeline.begin(pipeline.recipe(r)) for r in requests]


def assert_same(one: HartDraft, other: HartDraft) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one.indices, other.indices, strict=True))
    torch.testing.assert_close(one.latent_CHW, other.latent_CHW, atol=1e-5, rtol=1e-5)


def test_pictures_of_a_batch_are_those_drawn_alone(pipeline: HartPipeline) -> None:
    requests = [
        request(prompt, seed=i, guidance_scale=0.5 + 1.1 * i) for i, prompt in enumerate(PROMPTS)
    ]
    for together in finished(pipeline, begun(pipeline, *requests)):
        number = together.recipe.seed
        (alone,) = finished(pipeline, begun(pipeline, requests[number]))
        assert_same(alone, together)


def test_drafts_may_join_and_leave_between_scales(pipeline: HartPipeline) -> None:
    first, second, third = begun(pipeline, *(request(p, seed=9) for p in PROMPTS[:3]))
    expected = [finished(pipeline, [draft])[0] for draft in (first, second, third)]
    first, second = pipeline.advance([first, second])
    (third,) = pipeline.advance([third])
    third, first = pipeline.advance([third, first])  # the second is withdrawn, the third joins
    done = finished(pipeline, [first, third])
    assert_same(done[0], expected[0])
    assert_same(done[1], expected[2])


def test_a_step_that_is_repeated_repeats_its_numbers(pipeline: HartPipeline) -> None:
    drafts = pipeline.advance(begun(pipeline, request(seed=1), request(seed=2)))
    once, again = pipeline.advance(drafts), pipeline.advance(drafts)
    assert_same(once[0], again[0])
    assert_same(finished(pipeline, once)[1], finished(pipeline, again)[1])


def test_the_step_batcher_serves_hart_like_any_other_model(pipeline: HartPipeline) -> None:
    batcher, previews = StepBatcher(), []
    tickets = [
        batcher.add(pipeline, draft, on_step=lambda d: previews.append(pipeline.latent(d)))
        for draft in begun(pipeline, request(seed=1), request("a dog", seed=2))
    ]
    sizes = []
    while size := batcher.step():
        sizes.append(size)
    assert sizes == [2, 2, 2, 2]  # one step per scale, both in each
    assert len(previews) == 8
    for ticket in tickets:
        done = ticket.outcome.result(timeout=1)
        (alone,) = finished(pipeline, [pipeline.begin(done.recipe)])
        assert_same(done, alone)


def test_guided_and_unguided_pictures_are_of_two_groups(pipeline: HartPipeline) -> None:
    guided, unguided = begun(pipeline, request(), request(guidance_scale=0.0))
    assert guided.group != unguided.group
    assert guided.group == begun(pipeline, request(seed=5, guidance_scale=7.0))[0].group
    (done,) = finished(pipeline, [unguided])
    assert len(done.rows) == 1
    assert pipeline.kv_bytes(guided.recipe) == 2 * pipeline.kv_bytes(unguided.recipe)


def test_the_latent_is_in_the_scale_of_the_autoencoder(pipeline: HartPipeline) -> None:
    (done,) = finished(pipeline, begun(pipeline, request()))
    assert pipeline.autoencoder == "dcae-tiny"
    torch.testing.assert_close(pipeline.latent(done) * pipeline.scaling_factor, done.latent_CHW)
    assert done.latent_CHW.shape == done.recipe.latent_shape == (32, 4, 4)


def a_latent(seed: int = 3) -> Tensor:
    return torch.randn((32, 4, 4), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_the_first_scales_of_a_picture_are_kept(pipeline: HartPipeline, keep: int) -> None:
    start = a_latent()
    codes = pipeline.quantizer.encode_hybrid(start[None] * pipeline.scaling_factor).indices
    recipe = pipeline.recipe(request(keep=keep))
    (done,) = finished(pipeline, [pipeline.begin(recipe, start)])
    same = [torch.equal(a, b[0]) for a, b in zip(done.indices, codes, strict=True)]
    assert same[:keep] == [True] * keep
    assert not all(same)


def test_a_kept_picture_shares_a_batch_with_a_new_one(pipeline: HartPipeline) -> None:
    kept = pipeline.begin(pipeline.recipe(request(keep=2)), a_latent())
    (new,) = begun(pipeline, request("a dog", seed=4))
    expected = [finished(pipeline, [draft])[0] for draft in (kept, new)]
    for one, other in zip(finished(pipeline, [kept, new]), expected, strict=True):
        assert_same(one, other)


def test_half_of_the_scales_are_kept_when_nothing_is_said(pipeline: HartPipeline) -> None:
    assert len(pipeline.begin(pipeline.recipe(request()), a_latent()).kept) == 2


def test_another_seed_continues_a_picture_in_another_way(pipeline: HartPipeline) -> None:
    one, other = (
        finished(pipeline, [pipeline.begin(pipeline.recipe(request(keep=2, seed=s)), a_latent())])
        for s in (1, 2)
    )
    assert torch.equal(one[0].indices[1], other[0].indices[1])
    assert not torch.equal(one[0].indices[3], other[0].indices[3])


def test_a_picture_of_another_size_is_refused(pipeline: HartPipeline) -> None:
    with pytest.raises(InvalidRequest, match="give a picture of 64x64 pixels") as caught:
        pipeline.begin(pipeline.recipe(request(keep=1)), torch.zeros(32, 8, 8))
    assert caught.value.field == "image"


def test_keeping_scales_of_no_picture_is_refused(pipeline: HartPipeline) -> None:
    with pytest.raises(InvalidRequest, match="of which picture") as caught:
        pipeline.begin(pipeline.recipe(request(keep=1)))
    assert caught.value.field == "keep"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prompt": "  "}, "prompt"),
        ({"prompt": "a very long story " * 20}, "prompt"),
        ({"negative_prompt": "blurry"}, "negative_prompt"),
        ({"steps": 20}, "steps"),
        ({"sampler": "flow-euler"}, "sampler"),
        ({"loras": (LoraUse(name="ink", strength=1.0),)}, "loras"),
        ({"width": 128}, "width"),
        ({"width": 1024, "height": 1024}, "height"),
        ({"seed": -1}, "seed"),
        ({"guidance_scale": -0.1}, "guidance_scale"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 1.5}, "top_p"),
        ({"keep": 4}, "keep"),
    ],
)
def test_what_hart_cannot_do_is_refused_by_name(
    pipeline: HartPipeline, changes: dict[str, object], field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        pipeline.recipe(request(**changes))
    assert caught.value.field == field


def test_a_prompt_over_the_context_is_told_its_length(pipeline: HartPipeline) -> None:
    with pytest.raises(InvalidRequest, match=r"has \d+ tokens; hart-random reads 20"):
        pipeline.recipe(request("a very long story " * 20))


def test_the_mask_of_a_published_file_is_not_even_read(
    pipeline: HartPipeline, release: Path
) -> None:
    assert "attn_bias_for_masking" in load_file(release / "llm" / "model.safetensors")
    assert pipeline.model.config == CONFIG


def test_the_folder_of_the_transformer_leads_to_the_whole_release(release: Path) -> None:
    assert load_hart(release / "llm").identity == load_hart(release).identity


def copied(release: Path, folder: Path) -> Path:
    return Path(shutil.copytree(release, folder / "copy"))


def changed_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_tokenizer_with_another_codebook_is_refused(release: Path, tmp_path: Path) -> None:
    folder, other = copied(release, tmp_path), tmp_path / "other"
    write_release(other, replace(CONFIG, vocabulary=64))
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(other / "tokenizer", folder / "tokenizer")
    with pytest.raises(WeightsError, match=r"predicts 128 codes .* has 64"):
        load_hart(folder)


def test_a_tokenizer_with_other_scales_is_refused(release: Path, tmp_path: Path) -> None:
    folder = copied(release, tmp_path)
    changed_json(folder / "tokenizer" / "config.json", v_patch_nums=[1, 2, 4])
    with pytest.raises(WeightsError, match=r"\[1, 2, 3, 4\], but the tokenizer has \[1, 2, 4\]"):
        load_hart(folder)


def test_a_flag_that_the_weights_contradict_is_noticed(release: Path, tmp_path: Path) -> None:
    folder = copied(release, tmp_path)
    changed_json(folder / "llm" / "config.json", attn_l2_norm=False)
    with pytest.raises(WeightsError, match=r"attention\.log_scale"):
        load_hart(folder)


def test_an_unknown_flag_is_refused(release: Path, tmp_path: Path) -> None:
    folder = copied(release, tmp_path)
    changed_json(folder / "llm" / "config.json", rope_kind="new")
    with pytest.raises(ConfigError, match="rope_kind"):
        load_hart(folder)


def test_a_release_without_its_tokenizer_is_named(release: Path, tmp_path: Path) -> None:
    folder = copied(release, tmp_path)
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(WeightsError, match="no folder tokenizer"):
        load_hart(folder)


def test_a_release_without_text_encoder_says_where_to_put_one(
    release: Path, tmp_path: Path
) -> None:
    folder = copied(release, tmp_path)
    (folder / "config.json").unlink()
    with pytest.raises(WeightsError, match="names no text encoder; put that of the release into"):
        load_hart(folder)


def test_a_text_encoder_of_another_length_is_refused(release: Path, tmp_path: Path) -> None:
    folder = tmp_path / "longer"
    write_release(folder, replace(CONFIG, context_tokens=24))
    with pytest.raises(WeightsError, match="reads 24 text states of 576"):
        load_hart(folder)


def test_the_quantizer_of_a_release_keeps_its_codes(release: Path, pipeline: HartPipeline) -> None:
    assert isinstance(pipeline.quantizer, MultiScaleQuantizer)
    stored = load_file(release / "tokenizer" / "model.safetensors")
    assert torch.equal(pipeline.quantizer.codebook_VC, stored["vae.quantize.embedding.weight"])
    assert resolve("dcae-tiny").is_dir()
