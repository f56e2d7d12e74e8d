"""SAM and SAM 2 as their authors publish them, through transformers, from a local folder.

Weights are safetensors and must fill the model exactly; nothing is downloaded. Of a SAM 2 folder
the parts that follow objects through videos are left aside.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from gesso_core.annotate.segmenter.answers import answer, require_own
from gesso_core.annotate.segmenter.contract import (
    Embedding,
    Masks,
    Prompt,
    check_picture,
    embedding_key,
)
from gesso_core.annotate.segmenter.preprocess import (
    Frame,
    long_edge_frame,
    pixel_values,
    square_frame,
)
from gesso_core.annotate.segmenter.prompts import PromptGroup
from gesso_core.errors import NumericalError, WeightsError
from gesso_core.pipelines.pictures import Pixels
from gesso_core.safe_files import read_json
from gesso_core.text.from_folder import load_model

EXPECTED: Final = (
    "a folder with the config.json and model.safetensors of facebook/sam-vit-* or sam2*"
)
SAM_TYPES: Final = ("sam",)
SAM2_TYPES: Final = ("sam2", "sam2_video")

Framing = Callable[[tuple[int, int], int], Frame]


class PublishedSegmenter:
    """A SamModel or Sam2Model of transformers; see `Segmenter` for what it promises."""

    def __init__(self, model: Any, framing: Framing, *, name: str, sha256: str) -> None:
        """Wrap a loaded model; use `load_published`.

        Args:
            model: in eval mode.
            framing: how it wants pictures: `long_edge_frame` or `square_frame`.
            name: how it is called in answers.
            sha256: identity of its weights.
        """
        self.name, self.sha256 = name, sha256
        self._model, self._framing = model, framing
        self._edge = int(model.prompt_encoder.input_image_size)
        self._side = 4 * int(model.prompt_encoder.image_embedding_size[0])

    @torch.inference_mode()
    def embed(self, picture_HW3: Pixels) -> Embedding:
        """Run the image encoder; the features that the decoder reads are kept in float32."""
        check_picture(picture_HW3)
        size = picture_HW3.shape[:2]
        pixels_3EE = torch.from_numpy(pixel_values(picture_HW3, self._framing(size, self._edge)))
        found = self._model.get_image_embeddings(pixels_3EE[None].to(self._model.device))
        maps = [found] if isinstance(found, Tensor) else list(found)
        if not all(torch.isfinite(features).all() for features in maps):
            raise NumericalError(f"{self.name} produced features that are not finite")
        *finer, coarse = (features.float().cpu().numpy() for features in maps)
        return Embedding(
            key=embedding_key(picture_HW3, self.sha256),
            features_1CGG=coarse,
            finer=tuple(finer),
            size=size,
            model=self.name,
            model_sha256=self.sha256,
        )

    @torch.inference_mode()
    def predict(
        self, embedding: Embedding, prompts: Sequence[Prompt], *, multimask: bool = False
    ) -> Masks:
        """One mask per prompt, decoded in batches."""
        require_own(embedding, self.name, self.sha256)
        device = self._model.device
        arrays = (*embedding.finer, embedding.features_1CGG)
        maps = [torch.from_numpy(array).to(device) for array in arrays]

        def decode(group: PromptGroup, several: bool) -> tuple[Tensor, Tensor]:
            # Each prompt is a picture of its own to the model: former masks need that.
            seen = [features.expand(len(group.places), -1, -1, -1) for features in maps]
            answered = self._model(
                image_embeddings=seen if len(seen) > 1 else seen[0],
                multimask_output=several,
                **_inputs(group, device),
            )
            logits_PMLL, iou_PM = answered.pred_masks[:, 0], answered.iou_scores[:, 0]
            return logits_PMLL.float().cpu(), iou_PM.float().cpu()

        frame = self._framing(embedding.size, self._edge)
        return answer(decode, frame, self._side, prompts, multimask=multimask)


def load_published(
    folder: Path, *, name: str | None = None, device: str | torch.device = "cpu"
) -> PublishedSegmenter:
    """A published SAM or SAM 2 from its folder.

    Raises:
        WeightsError: another kind of model, a missing file, or weights that do not fill it.
    """
    kind = read_json(folder / "config.json").get("model_type")
    if kind in SAM_TYPES:
        from transformers import SamModel as Model

        framing: Framing = long_edge_frame
    elif kind in SAM2_TYPES:
        from transformers import Sam2Model as Model

        framing = square_frame
    else:
        known = ", ".join((*SAM_TYPES, *SAM2_TYPES))
        raise WeightsError(f"{folder} holds a {kind!r} model, expected one of: {known}")
    model = load_model(Model, folder, torch.float32, expected=EXPECTED, attention="sdpa")
    model = model.to(device).eval().requires_grad_(False)
    return PublishedSegmenter(model, framing, name=name or folder.name, sha256=_identity(folder))


def _inputs(group: PromptGroup, device: torch.device) -> dict[str, Tensor]:
    """The prompts by the names of transformers; what a group lacks is left out."""
    inputs: dict[str, Tensor] = {}
    if group.points_PN2.shape[1]:
        inputs["input_points"] = group.points_PN2[:, None]
        inputs["input_labels"] = group.labels_PN[:, None]
    if group.boxes_P4 is not None:
        inputs["input_boxes"] = group.boxes_P4[:, None]
    if group.masks_P1LL is not None:
        inputs["input_masks"] = group.masks_P1LL
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _identity(folder: Path) -> str:
    """One hash over the configuration and the weights."""
    whole = hashlib.sha256()
    for path in (folder / "config.json", *sorted(folder.glob("*.safetensors"))):
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()
