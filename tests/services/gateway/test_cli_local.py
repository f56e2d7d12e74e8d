"""``gesso --local`` with models that draw tokens, and the pipeline behind it: random weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gesso_core.errors import Cancelled, GessoError, InvalidRequest
from gesso_core.pipelines.draw import DrawPicture, family_of
from gesso_core.pipelines.pictures import Pixels, decode_picture, encode_picture
from gesso_core.pipelines.recipe import GenerationRequest
from gesso_core.pipelines.text_to_image import PictureStep
from gesso_core.pipelines.videos import encode_video
from gesso_services.cli.main import app
from typer.testing import CliRunner, Result

STEPS = 4  # scales of the one, rows of the other


@pytest.fixture(scope="module")
def folders(tiny_hart: Path, tiny_vila_u: Path) -> dict[str, Path]:
    return {"hart": tiny_hart, "vila-u": tiny_vila_u}


@pytest.fixture(scope="module")
def pipelines(folders: dict[str, Path]) -> dict[str, DrawPicture]:
    return {family: DrawPicture.load(folder) for family, folder in folders.items()}


def wish(seed: int = 7, **changes: Any) -> GenerationRequest:
    plain: dict[str, Any] = {"prompt": "a red apple", "width": 64, "height": 64, "seed": seed}
    return GenerationRequest(**(plain | changes))


def gradient() -> Pixels:
    red, green = np.meshgrid(np.linspace(0, 255, 80), np.linspace(0, 255, 80))
    return np.stack([red, green, 128 + 0 * red], axis=-1).astype(np.uint8)


both = pytest.mark.parametrize("family", ["hart", "vila-u"])


@both
def test_a_folder_is_known_by_what_it_holds(folders: dict[str, Path], family: str) -> None:
    assert family_of(folders[family]) == family


@both
def test_pictures_of_one_call_are_those_of_single_calls(
    pipelines: dict[str, DrawPicture], family: str
) -> None:
    draw = pipelines[family]
    requests = [wish(1), wish(2, guidance_scale=1.0), wish(3, prompt="two pears, in a bowl")]
    together = draw(*requests)
    for request, picture in zip(requests, together, strict=True):
        (alone,) = draw(request)
        assert np.array_equal(alone.pixels_HWC, picture.pixels_HWC)
        assert picture.pixels_HWC.shape == (64, 64, 3)
        assert (picture.seed, picture.provenance.seed) == (request.seed, request.seed)
    assert not np.array_equal(together[0].pixels_HWC, together[2].pixels_HWC)


@both
def test_every_step_is_told_with_a_preview(pipelines: dict[str, DrawPicture], family: str) -> None:
    told: list[tuple[int, int, int]] = []
    previews: list[Pixels] = []

    def tell(at: PictureStep) -> None:
        told.append((at.request, at.index, at.total))
        previews.append(at.preview())

    (picture,) = pipelines[family](wish(), on_step=tell)
    assert told == [(0, step, STEPS) for step in range(1, STEPS + 1)]
    assert np.array_equal(previews[-1], picture.pixels_HWC)
    assert not np.array_equal(previews[0], picture.pixels_HWC)


@both
def test_what_on_step_raises_ends_the_call(pipelines: dict[str, DrawPicture], family: str) -> None:
    def stop(at: PictureStep) -> None:
        if at.index == 2:
            raise Cancelled("here", after=2)

    with pytest.raises(Cancelled):
        pipelines[family](wish(), on_step=stop)


@both
def test_a_picture_can_be_gone_on_from(pipelines: dict[str, DrawPicture], family: str) -> None:
    draw = pipelines[family]
    (kept,) = draw(wish(keep=2), image=gradient())
    (other,) = draw(wish(keep=2), image=255 - gradient())
    (fresh,) = draw(wish())
    assert not np.array_equal(kept.pixels_HWC, other.pixels_HWC)
    assert not np.array_equal(kept.pixels_HWC, fresh.pixels_HWC)


@both
@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"negative_prompt": "worms"}, "negative_prompt"),
        ({"steps": 3}, "steps"),
        ({"keep": 9}, "keep"),
        ({"prompt": " "}, "prompt"),
        ({"width": 4000, "height": 4000}, "height"),
    ],
    ids=str,
)
def test_what_a_model_cannot_do_is_refused_by_field(
    pipelines: dict[str, DrawPicture], family: str, changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        pipelines[family](wish(**changes))
    assert refused.value.field == field


def test_an_unknown_name_is_refused_with_what_there_is() -> None:
    with pytest.raises(GessoError, match="hart-tiny"):
        DrawPicture.load("hart-tinny")


# ---------------------------------------------------------------- the command line


def run(folder: Path, *words: str) -> Result:
    environment = {"COLUMNS": "300", "TERM": "dumb"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return CliRunner().invoke(app, [*words, "--local"], env=environment)


@both
def test_generate_draws_with_every_family(
    folders: dict[str, Path], tmp_path: Path, family: str
) -> None:
    words = ("--model", str(folders[family]), "--seed", "7", "-n", "2", "-o", "a.webp")
    result = run(tmp_path, "generate", "a red apple", *words)
    assert result.stdout == "a-1.webp  seed 7\na-2.webp  seed 8\n", result.output
    assert decode_picture((tmp_path / "a-1.webp").read_bytes()).shape == (64, 64, 3)


def test_generate_keeps_the_best_by_a_model_that_sees(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    words = ("--model", str(folders["hart"]), "--judge", str(folders["vila-u"]), "--best-of", "3")
    result = run(tmp_path, "generate", "a red apple", *words, "-n", "2", "--seed", "1")
    assert result.exit_code == 0, result.output
    scores = [float(line.rpartition(" ")[2]) for line in result.stdout.splitlines()]
    assert len(scores) == 2
    assert scores == sorted(scores, reverse=True)


def test_a_prompt_too_long_for_the_judge_is_refused_before_anything_is_drawn(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    words = ("--model", str(folders["hart"]), "--judge", str(folders["vila-u"]), "--best-of", "3")
    result = run(tmp_path, "generate", "red " * 900, *words)
    assert result.exit_code == 1
    assert "the model that judges takes 256" in result.stderr
    assert "step" not in result.stderr


@pytest.fixture
def picture(tmp_path: Path) -> str:
    (tmp_path / "in.png").write_bytes(encode_picture(gradient()))
    return "in.png"


VARIED = "variation.png  seed 7\n"


@both
def test_vary_goes_on_from_a_file(
    folders: dict[str, Path], tmp_path: Path, picture: str, family: str
) -> None:
    words = ("--model", str(folders[family]), "--seed", "7", "--keep")
    assert run(tmp_path, "vary", picture, "a pear", *words, "2").stdout == VARIED
    looked = run(tmp_path, "vary", picture, "a pear", *words, "0")
    if family == "vila-u":
        assert looked.stdout == VARIED
    else:
        assert "keep at least 1" in looked.stderr
    too_many = run(tmp_path, "vary", picture, "a pear", *words, "4")
    assert too_many.exit_code == 1
    assert "keep at most 3" in too_many.stderr


def test_a_model_that_starts_from_noise_cannot_vary(
    tmp_path: Path, picture: str, tiny_pipeline: Path
) -> None:
    result = run(tmp_path, "vary", picture, "a pear", "--model", str(tiny_pipeline))
    assert result.exit_code == 1
    assert "starts from noise" in result.stderr


def test_ask_answers_about_pictures_and_videos(
    folders: dict[str, Path], tmp_path: Path, picture: str
) -> None:
    (tmp_path / "in.gif").write_bytes(encode_video(np.stack([gradient()] * 3), "gif"))
    words = ("--model", str(folders["vila-u"]), "--max-tokens", "6")
    for shown in ((picture,), ("in.gif",), ()):
        result = run(tmp_path, "ask", *shown, "what is this?", *words)
        assert result.exit_code == 0, result.output
        assert result.stdout.endswith("\n")
    again = run(tmp_path, "ask", "what is this?", *words)
    assert again.stdout == result.stdout
    warm = (*words, "--temperature", "2")
    drawn = {run(tmp_path, "ask", "what is this?", *warm).stdout for _ in range(3)}
    assert len(drawn) > 1
    seeded = {run(tmp_path, "ask", "what is this?", *warm, "--seed", "3").stdout for _ in range(2)}
    assert len(seeded) == 1


def test_judge_scores_files(folders: dict[str, Path], tmp_path: Path, picture: str) -> None:
    result = run(tmp_path, "judge", picture, "an apple", "--model", str(folders["vila-u"]))
    name, score = result.stdout.split()
    assert name == "in.png"
    assert 0 <= float(score) <= 1


@pytest.mark.parametrize("words", [("ask", "what?"), ("judge", "in.png", "an apple")])
def test_a_model_that_only_draws_cannot_see(
    folders: dict[str, Path], tmp_path: Path, picture: str, words: tuple[str, ...]
) -> None:
    result = run(tmp_path, *words, "--model", str(folders["hart"]))
    assert result.exit_code == 1
    assert "Traceback" not in result.output
