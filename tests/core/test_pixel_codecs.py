"""Networks other than a DC-AE behind the autoencoder that takes and gives pixels."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gesso_core.errors import InvalidRequest, WeightsError
from gesso_core.hub.load_hart_tokenizer import TokenizerParts
from gesso_core.models.hart.autoencoder import HARTAutoencoder
from gesso_core.models.hart.tokenizer_config import HARTTokenizerConfig
from gesso_core.models.keys.hart_tokenizer import tokenizer_keys
from gesso_core.models.keys.translate import untranslate
from gesso_core.models.vila_u.vision_tower import preprocess
from gesso_core.pipelines.autoencoder import Autoencoder
from gesso_core.pipelines.pictures import Pixels
from gesso_core.pipelines.pixel_codecs import HartCodec, TowerCodec
from gesso_core.pipelines.vila_u import VilaUPipeline
from safetensors.torch import save_file


def picture(height: int, width: int) -> Pixels:
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return np.stack([rows * 3, columns * 2, rows + columns], axis=-1).clip(0, 255).astype(np.uint8)


@pytest.fixture
def tower(vila_u: VilaUPipeline) -> Autoencoder:
    return Autoencoder("tower", TowerCodec(vila_u.model.tower))


def test_a_tower_gives_the_features_of_its_codes_and_paints_them(
    tower: Autoencoder, vila_u: VilaUPipeline
) -> None:
    latent = tower.encode(picture(40, 24))
    config = vila_u.model.tower.config
    assert tuple(latent.shape) == (config.width, *config.grid)
    signal = preprocess(picture(40, 24), config.image_size)
    codes = vila_u.model.tower.encode(signal[None]).codes_BhwD
    torch.testing.assert_close(latent, vila_u.model.tower.embed(codes)[0].permute(2, 0, 1))
    assert tower.decode(latent).shape == (*config.decoded_size, 3)
    assert tower.decode(latent, 8, 12).shape == (8, 12, 3)


def test_a_tower_is_measured_at_the_only_size_it_knows(tower: Autoencoder) -> None:
    made = tower.reconstruct(picture(40, 24))
    assert made.pixels_HWC.shape == (16, 16, 3)
    assert np.isfinite(made.psnr_db)


def test_a_latent_of_another_grid_is_refused_with_the_right_one(tower: Autoencoder) -> None:
    with pytest.raises(InvalidRequest, match=r"\(32, 3, 2\); tower decodes \(32, 2, 2\)"):
        tower.decode(torch.zeros(32, 3, 2))


def test_the_autoencoder_of_a_hart_takes_pictures_of_any_size() -> None:
    torch.manual_seed(0)
    config = HARTTokenizerConfig(
        vocabulary=16, channels=8, scales=(1, 2), width=32, multipliers=(1, 1, 1)
    )
    codec = HartCodec(HARTAutoencoder(config).eval())
    autoencoder = Autoencoder("hart", codec)
    latent = autoencoder.encode(picture(18, 30))
    assert tuple(latent.shape) == (8, 5, 8)
    assert autoencoder.decode(latent, 18, 30).shape == (18, 30, 3)


def test_a_tokenizer_without_a_decoder_names_the_one_that_has_it(tmp_path: Path) -> None:
    config = HARTTokenizerConfig(vocabulary=16, channels=8, scales=(1, 2), autoencoder="dcae-tiny")
    (tmp_path / "config.json").write_text(json.dumps(config.to_original()))
    keys = tokenizer_keys(config.phi_sharing)
    state = untranslate(TokenizerParts(config).state_dict(), keys)
    save_file({k: t.contiguous() for k, t in state.items()}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="latents of dcae-tiny, which decodes them"):
        Autoencoder.load(tmp_path)
