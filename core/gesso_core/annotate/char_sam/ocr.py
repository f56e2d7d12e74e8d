"""Find and read words where none are given: PP-OCRv4 from the ``rapidocr-onnxruntime`` wheel.

The wheel (Apache-2.0) carries its networks; nothing is downloaded. `WheelReader` also gives the
recogniser's log-probabilities, whose alignment with a known text votes on the cuts.
"""

from collections.abc import Sequence
from functools import cached_property
from importlib.resources import files
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gesso_core.annotate.char_sam.words import WordAnnotation, hull_of
from gesso_core.errors import Unavailable
from gesso_core.pipelines.pictures import Pixels

# T frames   C classes, 0 is blank

HEIGHT = 48  # of the strips that the recogniser reads
LEAST_WIDTH = 320
MOST_WIDTH = 4096
RECOGNISER = "ch_PP-OCRv4_rec_infer.onnx"


class TextReader(Protocol):
    """Reads text in pictures."""

    @property
    def alphabet(self) -> Sequence[str]:
        """The character of each class; class 0 is the blank."""

    def find(self, picture_HW3: Pixels) -> list[WordAnnotation]:
        """Every line of text with its polygon, marked as read by a machine."""

    def log_probs(self, strip_hw3: Pixels) -> NDArray[np.float64]:
        """Log-probabilities (T, C) along a flat word, frames evenly spaced."""


class WheelReader:
    """`TextReader` on the networks of the wheel.

    Raises Unavailable when the package is not installed.
    """

    def __init__(self, *, least_confidence: float = 0.5, threads: int = 1) -> None:
        self.least_confidence = least_confidence
        self.threads = threads
        try:
            import rapidocr_onnxruntime
        except ImportError as error:
            raise Unavailable(
                "no words were given and the reader is not installed; "
                "install gesso[ocr], or send words with their polygons and text"
            ) from error
        self._package = rapidocr_onnxruntime

    @cached_property
    def alphabet(self) -> tuple[str, ...]:
        """The recogniser's characters, as its file lists them, the blank before them."""
        listed = self._recogniser.get_modelmeta().custom_metadata_map["character"]
        return ("", *listed.splitlines(), " ")

    def find(self, picture_HW3: Pixels) -> list[WordAnnotation]:
        """Lines of text, in the wheel's order (top to bottom)."""
        picture_bgr = np.ascontiguousarray(picture_HW3[..., ::-1])
        found, _ = self._engine(picture_bgr)
        words = []
        for corners, text, confidence in found or []:
            polygon = tuple((float(x), float(y)) for x, y in corners)
            x0, y0, x1, y1 = hull_of(polygon)
            readable = str(text).strip() and float(confidence) >= self.least_confidence
            if readable and x1 - x0 >= 2 and y1 - y0 >= 2:
                words.append(
                    WordAnnotation(
                        text=str(text).strip(),
                        polygon=polygon,
                        source="ocr",
                        confidence=float(confidence),
                    )
                )
        return words

    def log_probs(self, strip_hw3: Pixels) -> NDArray[np.float64]:
        """One frame per 8 pixels of the strip at a height of 48, margins of the input cut off."""
        width = min(max(round(strip_hw3.shape[1] * HEIGHT / strip_hw3.shape[0]), 8), MOST_WIDTH)
        resized = Image.fromarray(strip_hw3).resize((width, HEIGHT), Image.Resampling.BILINEAR)
        pixels = np.asarray(resized, dtype=np.float32)[..., ::-1] / 127.5 - 1.0
        padded = np.zeros((1, 3, HEIGHT, max(width, LEAST_WIDTH)), dtype=np.float32)
        padded[0, :, :, :width] = pixels.transpose(2, 0, 1)
        name = self._recogniser.get_inputs()[0].name
        chances_TC = self._recogniser.run(None, {name: padded})[0][0]
        frames = max(round(len(chances_TC) * width / padded.shape[3]), 1)
        chances: NDArray[np.float64] = np.maximum(chances_TC[:frames].astype(np.float64), 1e-12)
        logs: NDArray[np.float64] = np.log(chances)
        return logs

    @cached_property
    def _engine(self) -> Any:
        return self._package.RapidOCR(
            intra_op_num_threads=self.threads, inter_op_num_threads=self.threads
        )

    @cached_property
    def _recogniser(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        path = files("rapidocr_onnxruntime") / "models" / RECOGNISER
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
