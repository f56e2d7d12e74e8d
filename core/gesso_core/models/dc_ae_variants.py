"""Every published DC-AE, and the small one that comes with gesso."""

from dataclasses import replace
from typing import Any

from gesso_core.models.dc_ae_config import DCAEConfig, Stage


def _imagenet(latent_channels: int, scaling_factor: float, *deep_widths: int) -> DCAEConfig:
    """The `in` and `mix` families: residual stages, batch norm in the decoder, EfficientViT."""
    widths = (128, 256, 512, 512, 1024, 1024, *deep_widths)

    def stages(*depths: int, batch_norm: bool) -> tuple[Stage, ...]:
        shallow: dict[str, Any] = {"norm": "batch_norm", "activation": "relu"} if batch_norm else {}
        return tuple(
            Stage(width=width, depth=depth, **shallow)
            if depth_index < 3
            else Stage(width=width, depth=2, block="EfficientViTBlock")
            for depth_index, (width, depth) in enumerate(
                zip(widths, depths + (2,) * (len(widths) - 3), strict=True)
            )
        )

    return DCAEConfig(
        latent_channels=latent_channels,
        encoder=stages(0, 4, 8, batch_norm=False),
        decoder=stages(0, 5, 10, batch_norm=True),
        scaling_factor=scaling_factor,
    )


def _sana() -> DCAEConfig:
    widths = (128, 256, 512, 512, 1024, 1024)

    def stages(*depths: int) -> tuple[Stage, ...]:
        return tuple(
            Stage(width=width, depth=depth)
            if index < 3
            else Stage(width=width, depth=depth, block="EfficientViTBlock", scales=(5,))
            for index, (width, depth) in enumerate(zip(widths, depths, strict=True))
        )

    return DCAEConfig(
        latent_channels=32,
        encoder=stages(2, 2, 2, 3, 3, 3),
        decoder=stages(3, 3, 3, 3, 3, 3),
        downsample="conv",
        upsample="interpolate",
        scaling_factor=0.41407,
    )


def _tiny() -> DCAEConfig:
    """f16, for 64 px pictures on a CPU: residual blocks, EfficientViT at the deepest level."""

    def stages(*depths: int) -> tuple[Stage, ...]:
        shallow = [Stage(width=w, depth=d) for w, d in zip((24, 32, 64, 128), depths, strict=False)]
        return (*shallow, Stage(width=256, depth=depths[-1], block="EfficientViTBlock"))

    return DCAEConfig(
        latent_channels=32, encoder=stages(0, 1, 2, 2, 1), decoder=stages(0, 2, 3, 3, 1)
    )


_F32_IN, _F64_IN = _imagenet(32, 0.3189), _imagenet(128, 0.2889, 2048)
_F128_IN = _imagenet(512, 0.4883, 2048, 2048)

DC_AE_CONFIGS: dict[str, DCAEConfig] = {
    "dc-ae-f32c32-in-1.0": _F32_IN,
    "dc-ae-f32c32-mix-1.0": replace(_F32_IN, scaling_factor=0.4552),
    "dc-ae-f64c128-in-1.0": _F64_IN,
    "dc-ae-f64c128-mix-1.0": replace(_F64_IN, scaling_factor=0.4538),
    "dc-ae-f128c512-in-1.0": _F128_IN,
    "dc-ae-f128c512-mix-1.0": replace(_F128_IN, scaling_factor=0.3620),
    "dc-ae-f32c32-sana-1.0": _sana(),
    "dc-ae-f32c32-sana-1.1": _sana(),
    "dcae-tiny": _tiny(),
}
