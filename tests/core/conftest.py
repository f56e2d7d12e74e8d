"""Fixtures of the core tests: a handful of made-up sprites, and a VILA-U of random weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gesso_core.models.vila_u.config import VilaUConfig
from gesso_core.models.vila_u.depth_transformer import DepthConfig, DepthTransformer
from gesso_core.models.vila_u.model import VilaU
from gesso_core.models.vila_u.projector import Projector
from gesso_core.models.vila_u.template import SHORT
from gesso_core.models.vila_u.vision_tower import VisionTower
from gesso_core.pipelines.denoiser import Identity
from gesso_core.pipelines.vila_u import VilaUPipeline
from gesso_core.registry import find
from gesso_core.train.concepts import Concept
from gesso_core.train.sprites import SpriteSet
from gesso_core.train.vila_u_tokenizer import build_tokenizer, load_tokenizer
from small_towers import small_tower
from transformers import LlamaConfig, LlamaForCausalLM

VILA_U_TOWER = small_tower(size=16, patch=8, codes=3, entries=20, hidden=40)

NAMES = ("disc", "square", "bar", "column", "frame", "corner")
INK = (
    (0.9, 0.1, 0.1),
    (0.1, 0.8, 0.2),
    (0.1, 0.2, 0.9),
    (0.9, 0.8, 0.1),
    (0.6, 0.1, 0.8),
    (0, 0.6, 0.6),
)


def shape(index: int, side: int) -> torch.Tensor:
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    y, x = (row / side - 0.5).abs(), (column / side - 0.5).abs()
    masks = (
        x**2 + y**2 < 0.12,
        (x < 0.3) & (y < 0.3),
        y < 0.12,
        x < 0.12,
        (torch.maximum(x, y) < 0.4) & (torch.maximum(x, y) > 0.25),
        (row < side / 2) & (column < side / 2),
    )
    return masks[index].float()


@pytest.fixture
def sprite_set() -> SpriteSet:
    """Six shapes in two styles (dark and light ink) at 128 px."""
    pixels, concept_of, style_of = [], [], []
    for index, ink in enumerate(INK):
        for style, strength in enumerate((1.0, 0.6)):
            alpha = shape(index, 128)[..., None]
            color = torch.tensor(ink) * strength
            pixels.append((torch.cat([color * alpha, alpha], dim=-1) * 255).to(torch.uint8))
            concept_of.append(index)
            style_of.append(style)
    concepts = tuple(
        Concept(
            emoji=chr(0x1F600 + i), name=name, keywords=(f"{name}-like", "shape"), reserved=None
        )
        for i, name in enumerate(NAMES)
    )
    return SpriteSet(
        pixels_NHW4=torch.stack(pixels),
        concept_of_N=torch.tensor(concept_of),
        style_of_N=torch.tensor(style_of),
        concepts=concepts,
    )


@pytest.fixture(scope="session")
def vila_u_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of a few hundred entries."""
    folder = tmp_path_factory.mktemp("vila-u") / "tokenizer"
    words = "what is it? USER: ASSISTANT: a red disc on blue, describe the picture yes no"
    build_tokenizer([words, "hello there, who are you", words], folder, entries=400)
    return folder


@pytest.fixture(scope="session")
def vila_u(vila_u_tokenizer: Path) -> VilaUPipeline:
    """A VILA-U of random weights: 16 px, 2x2 positions of 3 codes, videos of 2 frames."""
    tokenizer = load_tokenizer(vila_u_tokenizer)
    torch.manual_seed(5)
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    tower = VisionTower(VILA_U_TOWER)
    depth = DepthConfig(
        depth=3, codebook=20, code_width=32, state_width=32, width=32, heads=2, layers=2
    )
    config = VilaUConfig(
        tower=VILA_U_TOWER,
        depth=depth,
        vocabulary=len(tokenizer),
        state_width=32,
        context=128,
        video_frames=2,
        template=SHORT,
    )
    projector = Projector("mlp2x_gelu", 32, 32)
    model = VilaU(config, tower, projector, DepthTransformer(depth), LlamaForCausalLM(llama))
    entry = replace(find("vilau-tiny"), name="random", native_size=16, steps=2)
    return VilaUPipeline(
        entry=entry,
        model=model.eval().requires_grad_(False),
        tokenizer=tokenizer,
        identity=Identity(revision="random", weights_sha256="0" * 64),
    )
