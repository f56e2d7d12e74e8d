"""``/v1/images/reconstructions``: a picture through the autoencoder and back, and what it lost.

A picture comes in the request and from nowhere else: no URL is ever fetched.
"""

import asyncio
import base64
import time
from typing import Annotated

from fastapi import APIRouter, Depends, File, Form, UploadFile
from gesso_contracts import ImageFormat, Reconstruct, Reconstructed
from gesso_contracts.base import ModelName
from gesso_contracts.limits import INLINE_RPC_BYTES
from gesso_core.errors import UnreadableImage
from gesso_core.pipelines.pictures import decode_picture

from gesso_services.gateway.admission import open_place
from gesso_services.gateway.auth import Caller
from gesso_services.gateway.catalog import Models
from gesso_services.gateway.fabric import Here
from gesso_services.gateway.problems import documented
from gesso_services.gateway.schemas import ReconstructionResponse
from gesso_services.runtime import rpc

PATH = "/v1/images/reconstructions"
router = APIRouter(tags=["images"])

_SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", b"", "image/png"),
    (b"\xff\xd8\xff", b"", "image/jpeg"),
    (b"RIFF", b"WEBP", "image/webp"),
)


@router.post(
    PATH,
    responses=documented(400, 401, 404, 413, 422, 429, 500, 503, 507),
    dependencies=[Depends(open_place)],
)
async def reconstruct(
    _: Caller,
    fabric: Here,
    models: Models,
    image: Annotated[UploadFile, File(description="PNG, JPEG or WebP")],
    model: Annotated[ModelName | None, Form()] = None,
    output_format: Annotated[ImageFormat, Form()] = "png",
) -> ReconstructionResponse:
    """Encode the picture, decode it again, and measure the difference."""
    entry = await models.find("autoencoder", model)
    data = await image.read()
    media_type = sniff(data)
    await asyncio.to_thread(decode_picture, data, max_pixels=fabric.settings.max_upload_pixels)
    made = await rpc.call(
        fabric.bus,
        "autoencoder",
        "reconstruct",
        Reconstruct(
            model=entry.name,
            image=await fabric.blobs.pack(data, media_type, inline_limit=INLINE_RPC_BYTES),
            output_format=output_format,
        ),
        Reconstructed,
        timeout=fabric.settings.deadline_s,
    )
    return ReconstructionResponse(
        created=int(time.time()),
        b64_json=base64.b64encode(await fabric.blobs.read(made.image)).decode("ascii"),
        output_format=output_format,
        size=f"{made.width}x{made.height}",
        model=entry.name,
        psnr_db=made.psnr_db,
        ssim=made.ssim,
    )


def sniff(data: bytes) -> str:
    """The media type that the first bytes claim; UnreadableImage unless it may come in."""
    for start, inner, media_type in _SIGNATURES:
        if data.startswith(start) and (not inner or data[8:12] == inner):
            return media_type
    raise UnreadableImage(
        f"these {len(data):,} bytes do not begin like a picture; send a PNG, JPEG or WebP file",
        field="image",
    )
