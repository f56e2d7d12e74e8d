"""Text encoders: prompts to per-token states."""

from gesso_core.text.cache import CachedEncoder
from gesso_core.text.domain import Domain, Verdict
from gesso_core.text.gemma2 import Gemma2Encoder
from gesso_core.text.smollm2 import SmolLM2Encoder
from gesso_core.text.states import TextEncoder, TextStates

__all__ = [
    "CachedEncoder",
    "Domain",
    "Gemma2Encoder",
    "SmolLM2Encoder",
    "TextEncoder",
    "TextStates",
    "Verdict",
]
