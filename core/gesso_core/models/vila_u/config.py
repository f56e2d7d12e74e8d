"""Configuration of a whole VILA-U: language model, vision tower, depth transformer, projector.

A published model is a folder with ``config.json`` and three folders of their own, each with its
``config.json``: ``llm``, ``vision_tower`` (tower and depth transformer) and ``mm_projector``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from gesso_core.errors import ConfigError
from gesso_core.models.vila_u.depth_transformer import DepthConfig
from gesso_core.models.vila_u.template import VICUNA_V1, Template, template_from
from gesso_core.models.vila_u.tower_config import TowerConfig

SPECIAL_TOKENS = ("<im_start>", "<im_end>", "<vi_start>", "<vi_end>")
PUBLISHED_FRAMES = 8
Judging = Literal["answer", "caption"]


@dataclass(frozen=True, kw_only=True)
class VilaUConfig:
    """What is fixed by the weights; the language model's own sizes are in its transformers config.

    ``vocabulary`` counts the four special tokens, which are its last rows. ``context`` is the
    longest stream in tokens. ``video_frames`` is 0 for a model without video. ``judges_by`` says
    how it scores pictures: by saying yes, or by describing them.
    """

    tower: TowerConfig
    depth: DepthConfig
    vocabulary: int
    state_width: int
    context: int
    projector: str = "mlp2x_gelu"
    video_frames: int = PUBLISHED_FRAMES
    template: Template = field(default=VICUNA_V1)
    judges_by: Judging = "answer"

    def __post_init__(self) -> None:
        sizes = {
            "codes per position": (self.depth.depth, self.tower.depth),
            "code width": (self.depth.code_width, self.tower.width),
            "state width": (self.depth.state_width, self.state_width),
        }
        for what, (here, there) in sizes.items():
            if here != there:
                raise ConfigError(
                    f"the depth transformer's {what} is {here}, that of its neighbour {there}; "
                    "the folders are not of one model"
                )
        if self.depth.codebook != self.tower.codebook_size:
            raise ConfigError(
                f"the depth transformer draws from {self.depth.codebook} codes, the vision tower "
                f"has {self.tower.codebook_size}; the folders are not of one model"
            )
        if self.judges_by not in get_args(Judging):
            raise ConfigError(f"judge_gesso {self.judges_by!r}; known: {get_args(Judging)}")
        if self.vocabulary <= len(SPECIAL_TOKENS):
            raise ConfigError(f"a vocabulary of {self.vocabulary} has no place for special tokens")

    @property
    def im_start(self) -> int:
        """Token before a picture."""
        return self.vocabulary - 4

    @property
    def im_end(self) -> int:
        """Token after a picture."""
        return self.vocabulary - 3

    @property
    def vi_start(self) -> int:
        """Token before the frames of a video."""
        return self.vocabulary - 2

    @property
    def vi_end(self) -> int:
        """Token after the frames of a video."""
        return self.vocabulary - 1

    @property
    def tokens(self) -> int:
        """Visual tokens of a picture."""
        return self.tower.positions

    @classmethod
    def from_original(
        cls,
        top: Mapping[str, Any],
        llm: Mapping[str, Any],
        vision_tower: Mapping[str, Any],
        mm_projector: Mapping[str, Any],
    ) -> "VilaUConfig":
        """From the four ``config.json`` of a published folder.

        ``chat_template_gesso`` of the first, where there is one, replaces the Vicuna template, and
        ``judge_gesso`` is ``judges_by``.
        """
        try:
            frames = top.get("num_video_frames", PUBLISHED_FRAMES)
            return cls(
                tower=TowerConfig.from_original(vision_tower["rqvaesiglip"]),
                depth=DepthConfig.from_original(vision_tower["rqtransformer"]),
                vocabulary=int(llm["vocab_size"]),
                state_width=int(llm["hidden_size"]),
                context=int(llm["max_position_embeddings"]),
                projector=str(mm_projector.get("mm_projector_type", cls.projector)),
                video_frames=int(frames) if top.get("mm_use_vi_start_end", True) else 0,
                template=template_from(top.get("chat_template_gesso")),
                judges_by=top.get("judge_gesso", cls.judges_by),
            )
        except KeyError as missing:
            raise ConfigError(
                f"the configuration lacks {missing}; expected a VILA-U folder with llm, "
                "vision_tower and mm_projector, each with its config.json"
            ) from missing
