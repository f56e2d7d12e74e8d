"""Finding, fetching, verifying and loading weights."""

from gesso_core.hub.checkpoint import is_quantized, load_state_dict, trained_dtype
from gesso_core.hub.convert import convert_pickle
from gesso_core.hub.load import load_dc_ae, load_sana, require_its_autoencoder
from gesso_core.hub.manifest import FileReport, verify, weights_hash, write_manifest
from gesso_core.hub.store import DEFAULT_STORE, Parts, pull, quantized_from, resolve, resolve_parts

__all__ = [
    "DEFAULT_STORE",
    "FileReport",
    "Parts",
    "convert_pickle",
    "is_quantized",
    "load_dc_ae",
    "load_sana",
    "load_state_dict",
    "pull",
    "quantized_from",
    "require_its_autoencoder",
    "resolve",
    "resolve_parts",
    "trained_dtype",
    "verify",
    "weights_hash",
    "write_manifest",
]
