"""Parameter names of HART's tokenizer as it was published: ``vae.*`` and ``disc.*`` keys."""

from gesso_core.models.keys.translate import KeyMap, Rule
from gesso_core.models.keys.vqgan import under, vqgan_keys

_WB = "{p:weight|bias}"
_DISCRIMINATOR = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

ENCODER: KeyMap = vqgan_keys("down", fused_qkv=True)
DECODER: KeyMap = vqgan_keys("up", fused_qkv=True)
AUTOENCODER: KeyMap = (
    *under(ENCODER, "encoder.", "encoder."),
    *under(DECODER, "decoder.", "decoder."),
    Rule(f"{{n:quant_conv|post_quant_conv}}.{_WB}", "{n}.{p}"),
)


def quantizer_keys(phi_sharing: int) -> KeyMap:
    """Names of the quantizer alone; how the φ convolutions are shared shows in their names."""
    phi = {
        0: Rule(f"quant_resi.{{i}}.{_WB}", "phis.{i}.{p}"),
        1: Rule(f"quant_resi.qresi.{_WB}", "phis.0.{p}"),
    }
    return (
        Rule("embedding.weight", "codebook_VC"),
        phi.get(phi_sharing, Rule(f"quant_resi.qresi_ls.{{i}}.{_WB}", "phis.{i}.{p}")),
        # Counts of how often each code was hit in training; nothing reads them afterwards.
        Rule("ema_vocab_hit_SV", None),
    )


def tokenizer_keys(phi_sharing: int) -> KeyMap:
    """Names of a whole tokenizer file: ``autoencoder.*`` and ``quantizer.*`` here.

    The discriminator of its training is dropped.
    """
    return (
        *under(AUTOENCODER, "vae.", "autoencoder."),
        *under(quantizer_keys(phi_sharing), "vae.quantize.", "quantizer."),
        *(Rule(f"disc.main.{{i}}.{name}", None) for name in _DISCRIMINATOR),
    )
