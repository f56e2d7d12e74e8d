"""First weights of a HART transformer, as its authors draw them."""

from torch import Generator, nn

from gesso_core.models.hart.blocks import Block
from gesso_core.models.hart.residual_diffusion import initialize_residual
from gesso_core.models.hart.transformer import HART

HEAD_SCALE = 0.02  # of the output head and of its modulation


def initialize_weights(model: HART, generator: Generator) -> None:
    """Normal of std ``√(1/3D)``; the outputs of both halves of a block times ``1/√(2·depth)``."""
    std = (1 / model.config.width / 3) ** 0.5
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=std, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=std, generator=generator)
    for block in model.blocks:
        assert isinstance(block, Block)
        for layer in (block.attention.out, block.mlp.down):
            layer.weight.data.div_((2 * model.config.depth) ** 0.5)
    model.head.weight.data.mul_(HEAD_SCALE)
    model.head_modulation.weight.data.mul_(HEAD_SCALE)
    initialize_residual(model.residual, generator)
