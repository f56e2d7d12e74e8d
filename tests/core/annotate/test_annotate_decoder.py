"""The batched decoder computes what transformers and the exported graph compute."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gesso_core.annotate import fetch
from gesso_core.annotate.masks import mask_iou
from gesso_core.annotate.segmenter.contract import Embedding, Prompt
from gesso_core.annotate.segmenter.decoder import PromptDecoder
from gesso_core.annotate.segmenter.onnx import OnnxSegmenter
from gesso_core.annotate.segmenter.onnx_graph import Graph, Node, read_graph
from gesso_core.annotate.segmenter.preprocess import long_edge_frame
from gesso_core.annotate.segmenter.prompts import group_prompts
from gesso_core.annotate.segmenter.recovered import recover_decoder, recover_state
from gesso_core.errors import WeightsError
from gesso_core.models.keys.sam import SAM_ORIGINAL, SAM_TRANSFORMERS
from gesso_core.models.keys.translate import translate, untranslate

BOX = Prompt(box=(100, 90, 300, 260))
QUESTIONS = {
    "a box": BOX,
    "a point": Prompt(points=((220, 200),), labels=(1,)),
    "a box and a point": Prompt(box=BOX.box, points=((210, 130),), labels=(0,)),
    "three points": Prompt(points=((220, 200), (20, 30), (150, 150)), labels=(1, 0, 1)),
}


def formers(side: int) -> np.ndarray:
    return np.random.default_rng(1).normal(0, 3, (side, side)).astype(np.float32)


@pytest.fixture(scope="module")
def sam(sam_folder: Path) -> Any:
    from transformers import SamModel

    return SamModel.from_pretrained(sam_folder).eval()


def ours(sam: Any) -> PromptDecoder:
    parts = ("prompt_encoder.", "mask_decoder.")
    state = {name: t for name, t in sam.state_dict().items() if name.startswith(parts)}
    decoder = PromptDecoder(channels=32, hidden=64, edge=64, grid=8, norm_eps=1e-6)
    return decoder.filled(translate(state, SAM_TRANSFORMERS, expected=decoder.state_dict()))


@torch.no_grad()
@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("question", QUESTIONS)
def test_the_decoder_equals_that_of_transformers(
    sam: Any, question: str, with_mask: bool, several: bool
) -> None:
    features = torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(2))
    prompt = QUESTIONS[question]
    (group,) = group_prompts([prompt, prompt], long_edge_frame((300, 400), 64), 32)
    masks = torch.from_numpy(formers(32)).expand(2, 1, 32, 32) if with_mask else None
    decoder = ours(sam)
    logits, iou = decoder(decoder.look(features, masks), *group.tokens(), several=several)
    boxes, points = group.boxes_P4, group.points_PN2
    want = sam(
        image_embeddings=features.expand(2, -1, -1, -1),
        input_points=points[:, None] if points.shape[1] else None,
        input_labels=group.labels_PN[:, None] if points.shape[1] else None,
        input_boxes=None if boxes is None else boxes[:, None],
        input_masks=masks,
        multimask_output=several,
    )
    torch.testing.assert_close(logits, want.pred_masks[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(iou, want.iou_scores[:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("keys", [SAM_ORIGINAL, SAM_TRANSFORMERS], ids=["authors", "transformers"])
def test_both_tables_of_names_read_backwards(keys: Any) -> None:
    state = PromptDecoder(channels=32, hidden=64, edge=64, grid=8).state_dict()
    foreign = untranslate(state, keys)
    assert translate(foreign, keys, expected=state).keys() == state.keys()


@pytest.fixture(scope="module")
def graph_session(sam_mobile_folder: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(
        str(sam_mobile_folder / fetch.DECODER), providers=["CPUExecutionProvider"]
    )


@pytest.fixture(scope="module")
def embedding(sam_mobile: OnnxSegmenter) -> Embedding:
    picture = np.random.default_rng(3).integers(0, 255, (300, 400, 3)).astype(np.uint8)
    picture[100:250, 110:290] //= 4
    return sam_mobile.embed(picture)


@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("question", QUESTIONS)
def test_recovered_weights_answer_as_the_exported_graph_does(
    sam_mobile: OnnxSegmenter,
    graph_session: Any,
    embedding: Embedding,
    question: str,
    with_mask: bool,
) -> None:
    """Logits, predicted IoU, and above all the choice among the four masks."""
    former = formers(256) if with_mask else None
    prompt = QUESTIONS[question]
    prompt = Prompt(box=prompt.box, points=prompt.points, labels=prompt.labels, mask_LL=former)
    (group,) = group_prompts([prompt], long_edge_frame(embedding.size, 1024), 256)
    places_PT2, labels_PT = group.tokens()
    mask, iou, low_res = graph_session.run(
        ["masks", "iou_predictions", "low_res_masks"],
        {
            "image_embeddings": embedding.features_1CGG,
            "point_coords": places_PT2.numpy(),
            "point_labels": labels_PT.float().numpy(),
            "mask_input": np.zeros((1, 1, 256, 256), np.float32)
            if former is None
            else former[None, None],
            "has_mask_input": np.array([with_mask], np.float32),
            "orig_im_size": np.array(embedding.size, np.float32),
        },
    )
    got = sam_mobile.predict(embedding, [prompt])
    np.testing.assert_allclose(got.low_res_PLL[0], low_res[0, 0], atol=1e-3)
    np.testing.assert_allclose(got.predicted_iou_P[0], iou[0, 0], atol=1e-4)
    assert mask_iou(got.masks_PHW[0], mask[0, 0] > 0) > 0.999


@pytest.mark.parametrize("question", ["a box", "a point"])
def test_the_best_proposal_is_the_same_when_the_others_are_not_painted(
    sam_mobile: OnnxSegmenter, embedding: Embedding, question: str
) -> None:
    alone = sam_mobile.predict(embedding, [QUESTIONS[question]])
    chosen = sam_mobile.predict(embedding, [QUESTIONS[question]], multimask=True)
    assert alone.masks_PHW.any()
    assert np.array_equal(alone.masks_PHW, chosen.masks_PHW)
    np.testing.assert_allclose(alone.low_res_PLL, chosen.low_res_PLL, atol=1e-4)
    assert alone.predicted_iou_P == chosen.predicted_iou_P


@pytest.mark.parametrize("size", [(100, 333), (1500, 70), (64, 128)])
def test_logits_made_in_parts_are_those_of_two_resizings(size: tuple[int, int]) -> None:
    low_res = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(4))
    frame = long_edge_frame(size, 1024)
    framed = F.interpolate(low_res[None], (1024, 1024), mode="bilinear")
    cut = framed[..., : frame.resized[0], : frame.resized[1]]
    want = F.interpolate(cut, size, mode="bilinear")[0]
    torch.testing.assert_close(frame.picture_logits(low_res), want, atol=1e-4, rtol=0)


def test_margins_in_which_nothing_can_be_foreground_are_left_out() -> None:
    low_res = torch.full((256, 256), -5.0)
    low_res[60:70, 100:103] = 5.0
    low_res[250, 250] = 5.0  # in the padding, which is cut off
    frame = long_edge_frame((900, 1200), 1024)
    made = np.full((900, 1200), -5.0, dtype=np.float32)
    for rows, columns, logits in frame.bands(low_res, above=-1.0):
        assert logits.shape[1] < 700
        made[rows, columns] = logits.numpy()
    want = frame.picture_logits(low_res[None])[0].numpy()
    assert (want > 0).sum() > 300
    np.testing.assert_allclose(made.clip(-1), want.clip(-1), atol=1e-5)


def test_every_weight_of_the_real_decoder_is_recovered(sam_mobile_folder: Path) -> None:
    decoder = recover_decoder(sam_mobile_folder / fetch.DECODER)
    assert sum(weight.numel() for weight in decoder.parameters()) == 4_064_816


def test_a_constant_that_belongs_nowhere_is_named() -> None:
    node = Node("MatMul", ("x", "onnx::MatMul_1"), ("y",))
    graph = Graph((node,), {"onnx::MatMul_1": np.zeros((3, 2), np.float32)})
    with pytest.raises(WeightsError, match=r"onnx::MatMul_1 \[3, 2\], read by MatMul"):
        recover_state(graph)


@pytest.mark.parametrize(
    "content", [b"", b"\x3a\xff\x01", b"hello, this is no model", b"\x80" * 12]
)
def test_what_is_not_onnx_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "sam.onnx"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="ONNX"):
        read_graph(path)


def test_a_graph_cut_short_is_refused(sam_mobile_folder: Path, tmp_path: Path) -> None:
    whole = (sam_mobile_folder / fetch.DECODER).read_bytes()
    (tmp_path / "sam.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="not a whole ONNX file"):
        read_graph(tmp_path / "sam.onnx")
