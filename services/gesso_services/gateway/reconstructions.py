"""``/v1/images/reconstructions``: a picture through the autoencoder and back, and what it lost.

A picture comes in the request and from nowhere else: no URL is ever fetched.
"""

import base64
import time
from typing import Annotated

from fastapi import APIRouter, Depends, File, Form, UploadFile
from gesso_contracts import ImageFormat, Reconstruct, Reconstructed
from gesso_contracts.base import ModelName

from gesso_services.gateway.admission import open_place
from gesso_services.gateway.auth import Caller
from gesso_services.gateway.catalog import Models
from gesso_services.gateway.fabric import Here
from gesso_services.gateway.problems import documented
from gesso_services.gateway.schemas import ReconstructionResponse
from gesso_services.gateway.uploads import INLINE_BYTES_PER_CALL, Intake
from gesso_services.runtime import rpc

PATH = "/v1/images/reconstructions"
router = APIRouter(tags=["images"])


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
    served = await models.find("reconstruct", model)
    intake = Intake(fabric, inline_bytes=INLINE_BYTES_PER_CALL)
    payload = await intake.picture(await image.read(), "image")
    made = await rpc.call(
        fabric.bus,
        served.service,
        "reconstruct",
        Reconstruct(model=served.name, image=payload, output_format=output_format),
        Reconstructed,
        timeout=fabric.settings.deadline_s,
    )
    return ReconstructionResponse(
        created=int(time.time()),
        b64_json=base64.b64encode(await fabric.blobs.read(made.image)).decode("ascii"),
        output_format=output_format,
        size=f"{made.width}x{made.height}",
        model=served.name,
        psnr_db=made.psnr_db,
        ssim=made.ssim,
    )
