"""Whether a prompt is about something that a small model was trained on."""

from pathlib import Path

import pytest
from gesso_core.errors import WeightsError
from gesso_core.hub.store import SHIPPED
from gesso_core.text import Domain, SmolLM2Encoder, Verdict
from gesso_core.text.domain import build_domain
from safetensors.torch import load_file, save_file

# fmt: off
NAMES = [
    "red apple", "automobile", "bicycle", "birthday cake", "black cat", "cactus", "camera",
    "castle", "crocodile", "crown", "dolphin", "elephant", "fire engine", "four leaf clover",
    "frog", "ghost", "grapes", "guitar", "hamburger", "house", "key", "laptop", "lemon",
    "light bulb", "lion", "maple leaf", "mushroom", "octopus", "owl", "palm tree", "penguin",
    "pizza", "rabbit", "rainbow", "rocket", "rose", "sailboat", "snowman", "spider web",
    "strawberry", "sun", "tiger", "tomato", "umbrella", "whale",
]
# fmt: on
CAPTIONS = [
    caption
    for index, name in enumerate(NAMES)
    for caption in (
        f"a {name}, {('3D', 'flat', 'cartoon')[index % 3]} style, on a blue background",
        f"picture of {name}, green backdrop",
        name,
    )
]


@pytest.fixture(scope="module")
def encoder() -> SmolLM2Encoder:
    return SmolLM2Encoder.from_folder(SHIPPED / "smollm2-l6")


@pytest.fixture(scope="module")
def folder(encoder: SmolLM2Encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transformer")
    build_domain(encoder, NAMES, CAPTIONS, folder)
    return folder


@pytest.fixture(scope="module")
def domain(encoder: SmolLM2Encoder, folder: Path) -> Domain:
    loaded = Domain.from_folder(folder, encoder)
    assert loaded is not None
    return loaded


@pytest.mark.slow
def test_95_percent_of_the_captions_are_inside(domain: Domain) -> None:
    inside = [verdict.in_domain for verdict in domain.judge(CAPTIONS)]
    assert 0.94 <= sum(map(bool, inside)) / len(inside) < 1.0


@pytest.mark.parametrize(
    "prompt",
    [
        "a city at dusk, oil painting",
        "portrait of a renaissance woman",
        "quantum mechanics",
        "abstract expressionism with drips",
        "the battle of waterloo",
    ],
)
def test_a_prompt_about_something_else_is_outside_and_gets_suggestions(
    domain: Domain, prompt: str
) -> None:
    (verdict,) = domain.judge([prompt])
    assert verdict.in_domain is False
    assert len(verdict.suggestions) == 3
    assert set(verdict.suggestions) <= set(NAMES)


def test_a_known_name_in_new_surroundings_is_inside(domain: Domain) -> None:
    (verdict,) = domain.judge(["an octopus, 3D style, on a purple background"])
    assert verdict == Verdict(True)


def test_the_nearest_name_comes_first(domain: Domain) -> None:
    (verdict,) = domain.judge(["the crocodiles of the nile delta in an old engraving"])
    assert verdict.in_domain or verdict.suggestions[0] == "crocodile"


@pytest.mark.parametrize("prompt", ["", " ", "x" * 5000])
def test_a_strange_prompt_gets_a_verdict(domain: Domain, prompt: str) -> None:
    assert domain.judge([prompt])[0].in_domain in (True, False)


def test_a_model_without_concepts_says_nothing(encoder: SmolLM2Encoder, tmp_path: Path) -> None:
    assert Domain.from_folder(tmp_path, encoder) is None


def test_concepts_of_another_encoder_are_refused(
    folder: Path, encoder: SmolLM2Encoder, tmp_path: Path
) -> None:
    tensors = load_file(folder / "concepts.safetensors")
    (tmp_path / "concepts.json").write_text((folder / "concepts.json").read_text())
    tensors["mean"] = tensors["mean"] + 1.0
    save_file(tensors, tmp_path / "concepts.safetensors")
    with pytest.raises(WeightsError, match="another text encoder"):
        Domain.from_folder(tmp_path, encoder)
    save_file({"mean": tensors["mean"]}, tmp_path / "concepts.safetensors")
    with pytest.raises(WeightsError, match="45 names"):
        Domain.from_folder(tmp_path, encoder)
