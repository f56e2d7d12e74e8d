"""The segmenter: many prompts on one picture, with and without the kept embedding, and its decoder
against two others with the same weights: transformers' SamModel, and the ONNX file as it comes.

Prompts are the boxes of ten characters of a made scene. ``mean_iou`` is that of the masks with the
true characters, ``differing_pixels`` counts where two ways disagree.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from cpu_timing import Row, compared, in_turn
from gesso_core.annotate import fetch
from gesso_core.annotate.char_sam.synthetic import make_scene
from gesso_core.annotate.masks import Mask, mask_iou
from gesso_core.annotate.segmenter.cache import EmbeddingCache
from gesso_core.annotate.segmenter.contract import Prompt, Segmenter
from gesso_core.annotate.segmenter.load import load_segmenter
from gesso_core.annotate.segmenter.onnx import EDGE
from gesso_core.annotate.segmenter.preprocess import long_edge_frame
from gesso_core.annotate.segmenter.recovered import recover_decoder
from gesso_core.hub.store import DEFAULT_STORE
from gesso_core.models.keys.sam import SAM_TRANSFORMERS
from gesso_core.models.keys.translate import untranslate
from gesso_core.pipelines.pictures import Pixels
from PIL import Image

# P prompts   H, W picture   L side of the low-resolution logits

PROMPTS, SEED = 10, 1001
TARGET, CLICKS_TARGET = 1.3, 5.0
SIZES = ((480, 640), (1080, 1920), (3000, 4000))
Masks = Callable[[], np.ndarray]


@dataclass(frozen=True)
class Asked:
    """A picture, boxes in it, and the true mask of each."""

    picture_HW3: Pixels
    prompts: list[Prompt]
    truth_PHW: list[Mask]

    @property
    def size(self) -> tuple[int, int]:
        return self.picture_HW3.shape[0], self.picture_HW3.shape[1]

    def mean_iou(self, masks_PHW: np.ndarray) -> float:
        ious = [mask_iou(*pair) for pair in zip(masks_PHW, self.truth_PHW, strict=True)]
        return round(float(np.mean(ious)), 4)


def segmenter_rows(*, smoke: bool) -> Iterator[Row]:
    segmenter = load_segmenter(threads=1)
    count, repeats = (2, 1) if smoke else (PROMPTS, 5)
    sizes = SIZES[:1] if smoke else SIZES
    for size in sizes:
        yield _many_against_one(segmenter, _asked(size, count), repeats)
    asked = _asked(SIZES[0], count)
    yield _clicks(segmenter, asked, 1 if smoke else 2)
    yield from _decoders(segmenter, asked, repeats)


def _asked(size: tuple[int, int], count: int) -> Asked:
    """The scene at another size, stretched."""
    scene = make_scene(SEED)
    height, width = scene.values_HW.shape
    factors = np.array([size[1] / width, size[0] / height] * 2)
    characters = [character for word in scene.characters for character in word][:count]
    boxes = [tuple((np.array(character.box) * factors).tolist()) for character in characters]
    to = (size[1], size[0])
    values_HW = np.array(Image.fromarray(scene.values_HW).resize(to, Image.Resampling.NEAREST))
    return Asked(
        np.array(Image.fromarray(scene.picture_HW3).resize(to)),
        [Prompt(box=box) for box in boxes],
        [values_HW == character.value for character in characters],
    )


def _many_against_one(segmenter: Segmenter, asked: Asked, repeats: int) -> Row:
    """A picture that was never seen: looked at, and asked about."""

    def ask(prompts: list[Prompt]) -> np.ndarray:
        return segmenter.predict(segmenter.embed(asked.picture_HW3), prompts).masks_PHW

    runs = {"one": partial(ask, asked.prompts[:1]), "many": partial(ask, asked.prompts)}
    times = in_turn(runs, repeats)
    ratio = times["many"].cpu_ms / times["one"].cpu_ms
    return {
        "what": "many prompts on one picture against one, embedding included",
        "picture": f"{asked.size[1]}x{asked.size[0]}",
        "prompts": len(asked.prompts),
        **{name: taken.row() for name, taken in times.items()},
        "ratio": round(ratio, 3),
        "wall_ratio": round(times["many"].wall_ms / times["one"].wall_ms, 3),
        "target": TARGET,
        "met": ratio <= TARGET,
        "mean_iou": asked.mean_iou(runs["many"]()),
    }


def _clicks(segmenter: Segmenter, asked: Asked, repeats: int) -> Row:
    """One prompt after the other on the same picture, as a person clicks."""

    def kept() -> np.ndarray:
        cache = EmbeddingCache()
        return _one_by_one(segmenter, asked, partial(cache.embed, segmenter))

    def eager() -> np.ndarray:
        return _one_by_one(segmenter, asked, segmenter.embed)

    times = in_turn({"looked at again each time": eager, "embedding kept": kept}, repeats)
    return {
        "what": "clicks one after the other",
        "prompts": len(asked.prompts),
        **compared(times, "looked at again each time", "embedding kept", CLICKS_TARGET),
        "differing_pixels": _differing(eager(), kept()),
        "mean_iou": asked.mean_iou(kept()),
    }


def _one_by_one(segmenter: Segmenter, asked: Asked, embed: Callable[[Pixels], Any]) -> np.ndarray:
    masks = [
        segmenter.predict(embed(asked.picture_HW3), [prompt]).masks_PHW for prompt in asked.prompts
    ]
    return np.concatenate(masks)


def _decoders(segmenter: Segmenter, asked: Asked, repeats: int) -> Iterator[Row]:
    """From an embedding to masks at the picture's size: ours at once, one by one, and the peers."""
    embedding = segmenter.embed(asked.picture_HW3)

    def together() -> np.ndarray:
        return segmenter.predict(embedding, asked.prompts).masks_PHW

    runs: dict[str, Masks] = {
        "ten calls of ours": lambda: np.concatenate(
            [segmenter.predict(embedding, [prompt]).masks_PHW for prompt in asked.prompts]
        ),
        "transformers, one call": _transformers(embedding.features_1CGG, asked),
        "the ONNX file, a call per prompt": _onnx_file(embedding.features_1CGG, asked),
    }
    times = in_turn({**runs, "ours": together}, repeats)
    ours = together()
    for name, run in runs.items():
        masks = run()
        yield {
            "what": "decoding alone, embedding at hand",
            "prompts": len(asked.prompts),
            **compared(times, name, "ours", target=1.0),
            "differing_pixels": _differing(masks, ours),
            "pixels": int(ours.sum()),
            "mean_iou": {name: asked.mean_iou(masks), "ours": asked.mean_iou(ours)},
        }


def _differing(first_PHW: np.ndarray, second_PHW: np.ndarray) -> int:
    return int(np.count_nonzero(first_PHW != second_PHW))


def _transformers(features_1CGG: np.ndarray, asked: Asked) -> Masks:
    """SamModel with these weights. Its picture encoder is not used, and small."""
    from transformers import SamConfig, SamModel

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "mlp_dim": 32}
    vision = {**small, "global_attn_indexes": [0], "output_channels": 256}
    peer = SamModel(SamConfig(vision_config=vision, mask_decoder_config={"layer_norm_eps": 1e-5}))
    decoder = recover_decoder(DEFAULT_STORE / fetch.MODEL / fetch.DECODER)
    state = untranslate(decoder.state_dict(), SAM_TRANSFORMERS)
    shared = "prompt_encoder.shared_embedding.positional_embedding"
    state["shared_image_embedding.positional_embedding"] = state[shared]
    absent, unknown = peer.eval().load_state_dict(state, strict=False)
    others = [*unknown, *(name for name in absent if not name.startswith("vision_encoder."))]
    assert not others, others
    seen = torch.from_numpy(features_1CGG)
    frame = long_edge_frame(asked.size, EDGE)
    boxes_1P4 = torch.from_numpy(frame.boxes(_boxes(asked)))[None].float()

    def run() -> np.ndarray:
        with torch.inference_mode():
            said = peer(image_embeddings=seen, input_boxes=boxes_1P4, multimask_output=True)
            best_P = said.iou_scores[0].argmax(dim=1)
            chosen_P1LL = said.pred_masks[0, torch.arange(len(best_P)), best_P, None]
            # As its processor does.
            framed = F.interpolate(chosen_P1LL, (EDGE, EDGE), mode="bilinear")
            framed = framed[..., : frame.resized[0], : frame.resized[1]]
            stretched = F.interpolate(framed, asked.size, mode="bilinear")
            masks_PHW: np.ndarray = (stretched[:, 0] > 0).numpy()
            return masks_PHW

    return run


def _onnx_file(features_1CGG: np.ndarray, asked: Asked) -> Masks:
    """The decoder file in ONNX Runtime, one thread; it takes one prompt and gives one mask."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    path = str(DEFAULT_STORE / fetch.MODEL / fetch.DECODER)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    corners_P22 = long_edge_frame(asked.size, EDGE).boxes(_boxes(asked)).reshape(-1, 2, 2)
    rest = {
        "image_embeddings": features_1CGG,
        "point_labels": np.array([[2, 3]], np.float32),
        "mask_input": np.zeros((1, 1, 256, 256), np.float32),
        "has_mask_input": np.zeros(1, np.float32),
        "orig_im_size": np.array(asked.size, np.float32),
    }

    def run() -> np.ndarray:
        given = [{**rest, "point_coords": c[None].astype(np.float32)} for c in corners_P22]
        return np.stack([session.run(["masks"], one)[0][0, 0] > 0 for one in given])

    return run


def _boxes(asked: Asked) -> np.ndarray:
    return np.array([prompt.box for prompt in asked.prompts])
