"""The stages of training the small models, each of which continues where it was stopped.

data         packages → sprites
autoencoder  sprites → DC-AE; its frozen encoder is written before its decoder is finished
denoiser     frozen encoder → cached latents; captions → cached text states; both → Sana
publish      both models → weight folders with their papers

HART and VILA-U have stages of their own, in the files of that name: ``hart-tokenizer``, ``hart``
and ``publish-hart`` stand on the autoencoder; ``vila-u-tower``, ``vila-u`` and ``publish-vila-u``
only on the data and the captions.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from gesso_core.errors import WeightsError
from gesso_core.evaluate.everyday import everyday_answers
from gesso_core.hub import resolve
from gesso_core.models.dc_ae import DC_AE_CONFIGS, DCAE
from gesso_core.models.sana import SANA_CONFIGS, Sana
from gesso_core.text.smollm2 import SmolLM2Encoder
from gesso_core.train.autoencoder import SEED as AUTOENCODER_SEED
from gesso_core.train.autoencoder import held_out_quality, train_autoencoder
from gesso_core.train.captions import CaptionRecord, draw_records
from gesso_core.train.concepts import everyday_names
from gesso_core.train.denoiser import SEED as DENOISER_SEED
from gesso_core.train.denoiser import CaptionedLatents, train_denoiser
from gesso_core.train.latents import LatentViews, encode_views
from gesso_core.train.profiles import Profile
from gesso_core.train.publish import publish_autoencoder, publish_denoiser
from gesso_core.train.run_state import load_averaged, read_counters
from gesso_core.train.sprites import SpriteSet, build_sprites
from gesso_core.train.text_cache import CaptionStates, encode_captions

CAPTION_SEED = 0
STATE = "state.safetensors"
TEXT_ENCODER = "smollm2-l6"
CAPTIONS_FOR_THRESHOLD = 2000


@dataclass(frozen=True)
class Workspace:
    """Where a profile's data, runs and results are."""

    profile: Profile
    data: Path
    runs: Path
    weights: Path

    @property
    def run(self) -> Path:
        """Folder of this profile's runs."""
        return self.runs / self.profile.name

    def sprites(self) -> SpriteSet:
        """All sprites: rendered on the first call, then read."""
        path = self.data / f"sprites-{self.profile.sprite_size}.safetensors"
        if not path.exists():
            protected = frozenset(everyday_answers())
            packages = self.data / "packages"
            build_sprites(packages, self.profile.sprite_size, protected).save(path)
        return SpriteSet.load(path)

    def drawn_sprites(self) -> SpriteSet:
        """The sprites of the concepts and styles that the denoiser learns."""
        sprites, names = self.sprites().of_styles(self.profile.styles), everyday_names()
        if not self.profile.everyday:
            return sprites
        return sprites.subset(lambda concept: concept.name in names)

    def captions(self, sprites: SpriteSet) -> list[CaptionRecord]:
        """Captions of all styles, the same on every call; those without a sprite go unused."""
        return draw_records(sprites.concepts, self.profile.captions, CAPTION_SEED)

    def latents(self, sprites: SpriteSet) -> LatentViews:
        """Cached latents of the frozen encoder."""
        path = self.run / "latents.safetensors"
        if not path.exists():
            encoder = self._frozen_encoder()
            size, views = self.profile.size, self.profile.views
            encode_views(encoder, sprites, size=size, views=views).save(path)
        return LatentViews.load(path)

    def caption_states(self, records: list[CaptionRecord]) -> CaptionStates:
        """Cached text states of the captions."""
        path = self.run / "captions.safetensors"
        if not path.exists():
            encoder = SmolLM2Encoder.from_folder(resolve(TEXT_ENCODER))
            encode_captions(encoder, [record.text for record in records]).save(path)
        return CaptionStates.load(path)

    def _frozen_encoder(self) -> DCAE:
        path = self.run / "autoencoder" / "encoder.safetensors"
        if not path.exists():
            raise WeightsError(
                f"{path} does not exist yet: the encoder is written after two thirds of the "
                "autoencoder's training; run the stage 'autoencoder' first"
            )
        model = DCAE(DC_AE_CONFIGS[self.profile.autoencoder])
        model.load_state_dict(load_file(path), strict=False)
        return model.eval().to(self.profile.device)


def run_data(workspace: Workspace) -> None:
    """Fetch and render; does nothing when the sprites are there."""
    sprites = workspace.sprites()
    print(f"{len(sprites.pixels_NHW4)} sprites of {len(sprites.concepts)} concepts")


def run_autoencoder(workspace: Workspace) -> None:
    """Train the autoencoder and report its quality on concepts that it never saw."""
    sprites = workspace.sprites()
    model = train_autoencoder(workspace.profile, sprites, workspace.run / "autoencoder")
    held_out = sprites.subset(lambda concept: concept.held_out)
    print(held_out_quality(model, held_out, workspace.profile.size))


def run_denoiser(workspace: Workspace) -> None:
    """Cache latents and text states, then train the denoiser."""
    sprites = workspace.drawn_sprites()
    records = workspace.captions(sprites)
    latents, states = workspace.latents(sprites), workspace.caption_states(records)
    data = CaptionedLatents(sprites, latents, records, states)
    train_denoiser(workspace.profile, data, workspace.run / "denoiser")


def run_publish(workspace: Workspace) -> None:
    """Write both weight folders from the newest saved states."""
    profile, sprites = workspace.profile, workspace.drawn_sprites()
    records = workspace.captions(sprites)
    latents, states = workspace.latents(sprites), workspace.caption_states(records)
    autoencoder_state = workspace.run / "autoencoder" / STATE
    autoencoder = DCAE(DC_AE_CONFIGS[profile.autoencoder])
    load_averaged(autoencoder, autoencoder_state)
    everything = workspace.sprites()
    held_out = everything.subset(lambda concept: concept.held_out)
    quality = held_out_quality(autoencoder.eval(), held_out, profile.size)
    publish_autoencoder(
        autoencoder,
        latents.std,
        held_out,
        workspace.weights / "dcae-tiny",
        size=profile.size,
        about={"seed": AUTOENCODER_SEED, "held_out": quality, **_budget(autoencoder_state)},
    )
    denoiser_state = workspace.run / "denoiser" / STATE
    denoiser = Sana(SANA_CONFIGS[profile.denoiser])
    load_averaged(denoiser, denoiser_state)
    texts = [record.text for record in records if record.style < profile.styles]
    publish_denoiser(
        denoiser,
        states.statistics(),
        sprites,
        texts[:CAPTIONS_FOR_THRESHOLD],
        workspace.weights / "sana-tiny",
        autoencoder=workspace.weights / "dcae-tiny",
        text_encoder=resolve(TEXT_ENCODER),
        about={
            "seed": DENOISER_SEED,
            "concepts": len(sprites.concepts),
            **_budget(denoiser_state),
        },
    )


def _budget(state: Path) -> dict[str, float]:
    counters = read_counters(state)
    return {
        "updates": counters["step"],
        "samples": counters["samples"],
        "wall_seconds": round(counters["used_s"]),
    }


def limit_threads(count: int) -> None:
    """On a busy machine one thread per process is faster than several."""
    torch.set_num_threads(count)
