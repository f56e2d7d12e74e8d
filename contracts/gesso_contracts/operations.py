"""Who can be asked what: every call and every kind of job, with the message in and the message out.

Services register their handlers against this table, and the AsyncAPI document is made from it.
"""

from dataclasses import dataclass

from gesso_contracts import annotations as a
from gesso_contracts import conversations as c
from gesso_contracts import messages as m
from gesso_contracts.base import Message


@dataclass(frozen=True, kw_only=True)
class Operation:
    """``request`` in, ``reply`` out; ``summary`` is one line for the documents."""

    request: type[Message]
    reply: type[Message]
    summary: str


READY = Operation(request=m.AskReady, reply=m.ServiceReady, summary="Has a warm-up gone through?")
METRICS = Operation(request=m.AskMetrics, reply=m.MetricsText, summary="Prometheus metrics.")

RPC: dict[str, dict[str, Operation]] = {
    "autoencoder": {
        "encode": Operation(
            request=m.EncodeImage, reply=m.ImageEncoded, summary="Picture to latent."
        ),
        "decode": Operation(
            request=m.DecodeLatent, reply=m.LatentDecoded, summary="Latent to picture."
        ),
        "reconstruct": Operation(
            request=m.Reconstruct, reply=m.Reconstructed, summary="Round trip with PSNR and SSIM."
        ),
        "ready": READY,
        "metrics": METRICS,
    },
    "diffusion": {
        "embed-text": Operation(
            request=m.EmbedText, reply=m.TextEmbedded, summary="States of the text encoder."
        ),
        "ready": READY,
        "metrics": METRICS,
    },
    "autoregressive": {
        "judge": Operation(
            request=c.JudgeImages, reply=c.ImagesJudged, summary="How well pictures show a prompt."
        ),
        "check-judgement": Operation(
            request=c.CheckJudgement,
            reply=c.JudgementChecked,
            summary="Whether pictures can be judged by a prompt.",
        ),
        "ready": READY,
        "metrics": METRICS,
    },
    "annotation": {
        "segment": Operation(
            request=a.SegmentPrompts, reply=a.Segmented, summary="Boxes and clicks to masks."
        ),
        "ready": READY,
        "metrics": METRICS,
    },
}

JOBS: dict[str, dict[str, Operation]] = {
    "autoencoder": {
        "reconstruct": Operation(
            request=m.Reconstruct, reply=m.Reconstructed, summary="A round trip as a job."
        ),
    },
    "diffusion": {
        "generate-image": Operation(
            request=m.GenerateImage, reply=m.ImageReady, summary="Text to picture."
        ),
    },
    "autoregressive": {
        "generate-image": Operation(
            request=m.GenerateImage, reply=m.ImageReady, summary="Text to picture, token by token."
        ),
        "vary-image": Operation(
            request=m.VaryImage, reply=m.ImageReady, summary="A picture from a picture and text."
        ),
        "generate-video": Operation(
            request=m.GenerateVideo, reply=m.VideoReady, summary="Text to a short video."
        ),
        "answer": Operation(
            request=c.AnswerTurn, reply=c.TurnAnswered, summary="The next turn of a conversation."
        ),
    },
    "annotation": {
        "annotate-text": Operation(
            request=a.AnnotateText, reply=a.TextAnnotated, summary="Words to masks of characters."
        ),
        "annotate-cars": Operation(
            request=a.AnnotateCars, reply=a.CarsAnnotated, summary="Cars to boxes in space."
        ),
        "draw-signs": Operation(
            request=a.DrawSigns, reply=a.SignsDrawn, summary="Signs drawn, written on and labelled."
        ),
    },
}

SERVICES: tuple[str, ...] = tuple(RPC)
