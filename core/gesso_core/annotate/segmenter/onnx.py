"""A segmenter from two ONNX files of the MobileSAM type: the picture's encoder and the decoder.

The encoder runs in ONNX Runtime, one picture at a time (its batch axis is fixed). The decoder file
answers one prompt per call with one mask, so its weights are recovered into `PromptDecoder`, which
answers many prompts, with three proposals if wanted, and to the same numbers.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from gesso_core.annotate.segmenter.answers import answer, best, require_own
from gesso_core.annotate.segmenter.contract import (
    Embedding,
    Masks,
    Prompt,
    check_picture,
    embedding_key,
)
from gesso_core.annotate.segmenter.preprocess import long_edge_frame, pixel_values
from gesso_core.annotate.segmenter.prompts import PromptGroup
from gesso_core.annotate.segmenter.recovered import recover_decoder
from gesso_core.errors import NumericalError, WeightsError
from gesso_core.pipelines.pictures import Pixels

EDGE: Final = 1024
SIDE: Final = 256
FEATURES: Final = (1, 256, 64, 64)


class OnnxSegmenter:
    """MobileSAM as two files; see `Segmenter` for what it promises."""

    def __init__(
        self, encoder: Path, decoder: Path, *, name: str = "sam-mobile", threads: int | None = None
    ) -> None:
        """Open both files.

        Args:
            encoder: picture (1, 3, 1024, 1024) to features (1, 256, 64, 64).
            decoder: SAM's prompt encoder and mask decoder.
            name: how it is called in answers.
            threads: of ONNX Runtime; by default as many as torch uses.

        Raises:
            WeightsError: a file is missing, damaged, or another model.
        """
        self.name = name
        self.sha256 = _identity(encoder, decoder)
        self._decoder = recover_decoder(decoder)
        self._encoder = _open_encoder(encoder, threads or torch.get_num_threads())

    def embed(self, picture_HW3: Pixels) -> Embedding:
        """Run the encoder; seconds on a CPU."""
        check_picture(picture_HW3)
        size = picture_HW3.shape[:2]
        pixels_13EE = pixel_values(picture_HW3, long_edge_frame(size, EDGE))[None]
        (features_1CGG,) = self._encoder.run(None, {"input": pixels_13EE}, _give_back())
        if not np.isfinite(features_1CGG).all():
            raise NumericalError(f"{self.name} produced features that are not finite")
        return Embedding(
            key=embedding_key(picture_HW3, self.sha256),
            features_1CGG=features_1CGG,
            size=size,
            model=self.name,
            model_sha256=self.sha256,
        )

    @torch.inference_mode()
    def predict(
        self, embedding: Embedding, prompts: Sequence[Prompt], *, multimask: bool = False
    ) -> Masks:
        """One mask per prompt, decoded together."""
        require_own(embedding, self.name, self.sha256)
        features_1CGG = torch.from_numpy(embedding.features_1CGG)
        unmasked = self._decoder.look(features_1CGG)

        def decode(group: PromptGroup, several: bool) -> tuple[torch.Tensor, torch.Tensor]:
            masks = group.masks_P1LL
            seen = unmasked if masks is None else self._decoder.look(features_1CGG, masks)
            picture, brushes, iou_PM = self._decoder.think(seen, *group.tokens(), several=several)
            if several and not multimask:
                brushes, iou_PM = best(brushes, iou_PM)
            return self._decoder.paint(picture, brushes), iou_PM

        frame = long_edge_frame(embedding.size, EDGE)
        # One at a time: what prompts share is computed once above, and one picture's worth of
        # numbers stays in the cache of a core; eight at a time take longer.
        return answer(decode, frame, SIDE, prompts, multimask=multimask, at_once=1)


def _open_encoder(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.use_deterministic_compute = True
    # Threads that wait in a loop would take the cores from everything else on the machine.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    failures = onnxruntime.capi.onnxruntime_pybind11_state
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except (failures.Fail, failures.InvalidProtobuf, failures.InvalidGraph) as error:
        raise WeightsError(f"ONNX Runtime cannot open {path}: {error}") from error
    given = [(i.name, i.shape[1:]) for i in session.get_inputs()]
    answered = [o.shape[1:] for o in session.get_outputs()]
    if given != [("input", [3, EDGE, EDGE])] or len(answered) != 1:
        raise WeightsError(
            f"{path} reads {given} and answers {answered}; expected one picture "
            f"'input' (1, 3, {EDGE}, {EDGE}) and features {FEATURES}"
        )
    return session


def _give_back() -> Any:
    """Options of a run that returns its 250 MB of workspace when it is over."""
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def _identity(*files: Path) -> str:
    """One hash over the files' hashes."""
    whole = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise WeightsError(f"cannot read {path}: {error}; run: make models") from error
    return whole.hexdigest()
