"""Jobs of the kind ``annotate-text``: word by word, so that each can be the last one."""

from collections.abc import Callable, Sequence

from gesso_contracts import annotations as a
from gesso_core.annotate.char_sam.overlay import overlay
from gesso_core.annotate.char_sam.pipeline import CharSam, CharSamOptions
from gesso_core.annotate.char_sam.words import PictureResult, WordAnnotation, check_word, is_usable
from gesso_core.errors import InvalidRequest
from gesso_core.pipelines.pictures import MEDIA_TYPES, Pixels, encode_picture

from gesso_services.annotation_labels import text_labels, text_summary, word_annotation
from gesso_services.annotation_workshop import TEXT, Workshop
from gesso_services.runtime.job_context import JobContext

JSON = "application/json"


class TextAnnotation:
    """The handler; everything heavy runs in a thread of the jobs."""

    def __init__(self, workshop: Workshop) -> None:
        self.workshop = workshop

    async def annotate(self, request: a.AnnotateText, job: JobContext) -> a.TextAnnotated:
        """Masks of all characters, with a picture to look at."""
        shop = self.workshop
        shop.check_model(request.model, TEXT)
        picture = await shop.opened(request.image)
        result = await shop.for_job(self._annotate, picture, request, job)
        labels, drawn = await shop.for_job(_written, picture, result)
        height, width = result.size
        return a.TextAnnotated(
            width=width,
            height=height,
            name=request.name,
            image=await shop.blobs.laid_down(request.image),
            labels=await shop.blobs.put(labels, JSON),
            overlay=await shop.blobs.put(drawn, MEDIA_TYPES["png"]),
            transcription="ocr" if request.words is None else "given",
            summary=text_summary(result),
            provenance=shop.provenance(TEXT),
        )

    def _annotate(self, picture: Pixels, request: a.AnnotateText, job: JobContext) -> PictureResult:
        annotator = self.workshop.annotator()
        options = CharSamOptions(refine=request.refine, min_score=request.min_score)
        words = words_of(request.words, picture, annotator)
        return annotate_words(annotator, picture, words, options, job.report)


def words_of(
    given: Sequence[a.WordSpec] | None, picture: Pixels, annotator: CharSam
) -> list[WordAnnotation]:
    """The given words, checked, or those that the reader finds.

    Raises InvalidRequest for a word that cannot be used, naming its field, and where no words were
    given and nobody is there to find them.
    """
    size = picture.shape[0], picture.shape[1]
    if given is not None:
        words = [word_annotation(word) for word in given]
        for number, word in enumerate(words):
            check_word(word, size, name=f"words.{number}")
        return words
    if annotator.reader is None:
        raise InvalidRequest(
            "no words were given, and there is no reader to find them; send words with polygon and "
            "text, or install gesso[ocr] where the annotation runs",
            field="words",
        )
    return [word for word in annotator.reader.find(picture) if is_usable(word, size)]


def annotate_words(
    annotator: CharSam,
    picture: Pixels,
    words: Sequence[WordAnnotation],
    options: CharSamOptions,
    report: Callable[[int, int], None],
) -> PictureResult:
    """Word by word; ``report`` is told how many of how many are done, and may raise to end it."""
    results = []
    for number, word in enumerate(words):
        report(number, len(words))
        results.append(annotator.annotate(picture, [word], options))
    report(len(words), len(words))
    return PictureResult(
        size=(picture.shape[0], picture.shape[1]),
        words=tuple(word for result in results for word in result.words),
        segmenter=annotator.segmenter.name,
        decoder_calls=sum(result.decoder_calls for result in results),
    )


def _written(picture: Pixels, result: PictureResult) -> tuple[bytes, bytes]:
    """Labels as JSON, and the overlay as a PNG."""
    labels = text_labels(result).model_dump_json().encode()
    return labels, encode_picture(overlay(picture, result))
