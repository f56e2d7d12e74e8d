"""A request for a picture or a video becomes a recipe; what VILA-U cannot do is refused."""

from gesso_core.errors import InvalidRequest
from gesso_core.models.vila_u.config import VilaUConfig
from gesso_core.pipelines.recipe import (
    GenerationRequest,
    check_prompt,
    check_seed,
    check_size,
    chosen_guidance,
    refuse_denoising_options,
)
from gesso_core.pipelines.vila_u_draft import DrawRecipe
from gesso_core.registry import ModelEntry

TOP_K, TOP_P = 900, 0.96


def draw_recipe(
    request: GenerationRequest, entry: ModelEntry, config: VilaUConfig, *, video: bool = False
) -> DrawRecipe:
    """Every choice made.

    Raises:
        InvalidRequest: naming the first field that this model refuses.
    """
    refuse_denoising_options(request, entry, "token by token")
    if video and not config.video_frames:
        raise InvalidRequest(
            f"{entry.name} draws pictures, no videos; ask for a picture, or use another model",
            field="model",
        )
    check_prompt(request)
    check_size(entry, request.height, request.width)
    check_seed(request)
    frames, (height, width) = config.video_frames if video else 1, config.tower.decoded_size
    return DrawRecipe(
        model=entry.name,
        prompt=request.prompt,
        width=request.width,
        height=request.height,
        model_size=(height, width),
        latent_shape=(config.tower.width, *config.tower.grid),
        seed=request.seed,
        steps=config.tower.grid[0] * frames,
        guidance_scale=chosen_guidance(request, entry),
        top_k=_top_k(request, config.depth.codebook),
        top_p=_top_p(request),
        keep=_keep(request, config, video),
        frames=frames,
        video=video,
    )


def _top_k(request: GenerationRequest, codebook: int) -> int:
    if request.top_k is None:
        return min(TOP_K, codebook)
    if request.top_k < 1:
        raise InvalidRequest(
            f"top_k {request.top_k}; draw from at least 1 code, {codebook} are all", field="top_k"
        )
    return min(request.top_k, codebook)


def _top_p(request: GenerationRequest) -> float:
    top_p = TOP_P if request.top_p is None else request.top_p
    if not 0 < top_p <= 1:
        raise InvalidRequest(f"top_p {top_p}; allowed are numbers over 0 up to 1", field="top_p")
    return float(top_p)


def _keep(request: GenerationRequest, config: VilaUConfig, video: bool) -> int | None:
    if request.keep is None:
        return None
    rows = config.tower.grid[0]
    if video or not 0 <= request.keep < rows:
        raise InvalidRequest(
            f"keep {request.keep}; of a picture 0 to {rows - 1} of its {rows} rows can be kept, "
            "of a video none",
            field="keep",
        )
    return request.keep
