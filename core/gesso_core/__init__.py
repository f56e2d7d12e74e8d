"""Models, samplers, text encoders, weights and pipelines of gesso.

Importing this package loads nothing heavy: the gateway needs its errors, its registry and its
picture guards, and stays without torch. The doors to the rest:

    from gesso_core.models.dc_ae import DCAE, DC_AE_CONFIGS
    from gesso_core.models.sana import Sana, SANA_CONFIGS
    from gesso_core.pipelines.text_to_image import TextToImage
    from gesso_core.hub import load_dc_ae, load_sana
"""
