"""Embeddings are kept and shared; small things are looked at through windows."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from gesso_core.annotate.segmenter.cache import EmbeddingCache
from gesso_core.annotate.segmenter.contract import Embedding, Prompt, Segmenter, embedding_key
from gesso_core.annotate.segmenter.crops import crop_window, segment
from gesso_core.annotate.segmenter.load import load_segmenter
from gesso_core.errors import InvalidRequest, NumericalError
from hypothesis import given
from hypothesis import strategies as st

NBYTES = 32 * 8 * 8 * 4


@dataclass
class Counting:
    """A segmenter that counts the pictures it looks at, and stops at a gate if there is one."""

    inner: Segmenter
    gate: Event | None = None
    fails: bool = False
    seen: list[tuple[int, int]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def sha256(self) -> str:
        return self.inner.sha256

    def embed(self, picture: np.ndarray) -> Embedding:
        self.seen.append(picture.shape[:2])
        if self.gate:
            assert self.gate.wait(timeout=20)
        if self.fails:
            raise NumericalError("not finite")
        return self.inner.embed(picture)

    def predict(self, embedding, prompts, *, multimask=False):
        return self.inner.predict(embedding, prompts, multimask=multimask)


@pytest.fixture
def segmenter(sam_folder: Path) -> Counting:
    return Counting(load_segmenter(sam_folder))


def picture(seed: int, height: int = 90, width: int = 120) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3)).astype(np.uint8)


def test_a_picture_is_looked_at_once(segmenter: Counting) -> None:
    cache = EmbeddingCache()
    first = cache.embed(segmenter, picture(0))
    assert cache.embed(segmenter, picture(0).copy()) is first
    assert cache.get(first.key) is first
    assert segmenter.seen == [(90, 120)]
    assert cache.nbytes == first.nbytes == NBYTES


def test_the_key_tells_pictures_shapes_and_models_apart() -> None:
    flat = np.zeros((2, 6, 3), np.uint8)
    keys = {
        embedding_key(flat, "a"),
        embedding_key(flat, "b"),
        embedding_key(flat.reshape(3, 4, 3), "a"),
        embedding_key(flat + 1, "a"),
    }
    assert len(keys) == 4
    assert embedding_key(np.asfortranarray(flat), "a") == embedding_key(flat, "a")


def test_the_least_recently_used_embedding_goes_first(segmenter: Counting) -> None:
    cache = EmbeddingCache(max_bytes=2 * NBYTES)
    first, second = (cache.embed(segmenter, picture(seed)) for seed in (0, 1))
    cache.get(first.key)
    third = cache.embed(segmenter, picture(2))
    assert [cache.get(e.key) is e for e in (first, second, third)] == [True, False, True]
    assert (len(cache), cache.nbytes) == (2, 2 * NBYTES)


def test_what_is_larger_than_the_cache_is_answered_all_the_same(segmenter: Counting) -> None:
    cache = EmbeddingCache(max_bytes=NBYTES - 1)
    embedding = cache.embed(segmenter, picture(0))
    assert cache.get(embedding.key) is None
    assert (len(cache), cache.nbytes) == (0, 0)


def test_askers_at_the_same_time_share_one_look(segmenter: Counting) -> None:
    segmenter.gate = Event()
    cache = EmbeddingCache()
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(cache.embed, segmenter, picture(0)) for _ in range(4)]
        segmenter.gate.set()
        found = {id(future.result(timeout=20)) for future in asked}
    assert len(found) == 1
    assert len(segmenter.seen) == 1


def test_a_failure_is_told_and_not_kept(segmenter: Counting) -> None:
    cache = EmbeddingCache()
    segmenter.fails = True
    with pytest.raises(NumericalError):
        cache.embed(segmenter, picture(0))
    segmenter.fails = False
    assert cache.embed(segmenter, picture(0)).size == (90, 120)


def test_a_large_box_needs_no_window() -> None:
    assert crop_window((10, 10, 60, 40), (90, 120)) is None
    assert crop_window((10, 10, 110, 29), (90, 120)) is not None


def test_a_window_has_half_the_shorter_side_around_the_box() -> None:
    assert crop_window((500, 400, 700, 440), (1000, 1200)) == (480, 380, 720, 460)


@given(
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.tuples(*[st.floats(0, 1)] * 4),
)
def test_a_window_lies_in_the_picture_and_holds_the_box(
    size: tuple[int, int], place: tuple[float, float, float, float]
) -> None:
    height, width = size
    x0, x1 = sorted((place[0] * width, place[1] * width))
    y0, y1 = sorted((place[2] * height, place[3] * height))
    window = crop_window((x0, y0, x1, y1), size)
    if window is not None:
        left, top, right, bottom = window
        assert 0 <= left <= x0 <= x1 <= right <= width
        assert 0 <= top <= y0 <= y1 <= bottom <= height
        assert right - left >= min(64, width)
        assert bottom - top >= min(64, height)


def answered(segmenter: Segmenter, image: np.ndarray, prompts: list[Prompt]) -> np.ndarray:
    """The masks in the order of the prompts."""
    found = {
        place: mask
        for places, masks in segment(segmenter, image, prompts)
        for place, mask in zip(places, masks.masks_PHW, strict=True)
    }
    return np.array([found[place] for place in range(len(prompts))])


def test_masks_of_a_window_lie_where_the_window_lies(segmenter: Counting) -> None:
    image = picture(0, 200, 300)
    prompt = Prompt(box=(120.0, 70.0, 152.0, 102.0))  # looked at from (104, 54) to (168, 118)
    ((places, masks),) = segment(segmenter, image, [prompt], multimask=True)
    cut = segmenter.inner.embed(np.ascontiguousarray(image[54:118, 104:168]))
    alone = segmenter.predict(cut, [Prompt(box=(16, 16, 48, 48))], multimask=True)
    assert places == [0]
    assert masks.masks_PHW.shape == (1, 200, 300)
    assert np.array_equal(masks.masks_PHW[:, 54:118, 104:168], alone.masks_PHW)
    assert masks.masks_PHW.sum() == alone.masks_PHW.sum() > 0
    assert masks.candidates is not None
    assert alone.candidates is not None
    assert masks.candidates.masks_PMHW.sum() == alone.candidates.masks_PMHW.sum()


def test_small_boxes_get_windows_and_large_ones_the_picture(segmenter: Counting) -> None:
    image = picture(0, 200, 300)
    small, large = Prompt(box=(120, 70, 150, 100)), Prompt(box=(20, 20, 250, 180))
    point = Prompt(points=((30, 40),), labels=(1,))
    prompts = [small, large, small, point]
    masks = answered(segmenter, image, prompts)
    assert sorted(segmenter.seen) == [(64, 64), (200, 300)]
    for mask, prompt in zip(masks, prompts, strict=True):
        assert np.array_equal(answered(segmenter, image, [prompt])[0], mask)
    assert list(segment(segmenter, image, [])) == []


def test_many_small_boxes_cost_one_look_and_few_masks_at_once(segmenter: Counting) -> None:
    boxes = [Prompt(box=(x, 70, x + 20, 90)) for x in range(10, 210, 20)]
    parts = list(segment(segmenter, picture(0, 200, 300), boxes))
    assert segmenter.seen == [(200, 300)]
    assert [places for places, _ in parts] == [list(range(8)), [8, 9]]
    assert all(len(masks) == len(places) for places, masks in parts)


def test_a_point_beyond_the_window_is_seen_in_the_whole_picture(segmenter: Counting) -> None:
    far = Prompt(box=(120, 70, 150, 100), points=((20, 20),), labels=(0,))
    near = Prompt(box=(120, 70, 150, 100), points=((110, 60),), labels=(0,))
    answered(segmenter, picture(0, 200, 300), [far, near])
    assert segmenter.seen == [(200, 300), (64, 64)]


def test_a_box_beside_the_picture_is_refused_before_any_work(segmenter: Counting) -> None:
    with pytest.raises(InvalidRequest, match="outside the 120x90 picture"):
        answered(segmenter, picture(0), [Prompt(box=(130, 0, 140, 10))])
    assert segmenter.seen == []
