"""A cache around a text encoder: the encoder outweighs the denoiser, and prompts repeat."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from gesso_core.errors import ConfigError
from gesso_core.text.states import TextEncoder, TextStates

DEFAULT_BYTES: Final = 256 * 1024 * 1024
Key = tuple[str, str, int]  # instruction hash, or "" without instruction; prompt; length


class CachedEncoder:
    """A `TextEncoder` that remembers the prompts it saw last.

    States are kept per (instruction hash, prompt, length), the least recently used are dropped
    beyond ``capacity`` bytes. Safe from several threads; the encoder runs one call at a time.
    """

    def __init__(self, encoder: TextEncoder, capacity: int = DEFAULT_BYTES) -> None:
        if capacity < 0:
            raise ConfigError(f"a cache cannot hold {capacity} bytes; give 0 or more")
        self.encoder = encoder
        self.capacity = capacity
        self._entries: OrderedDict[Key, TextStates] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        self._running = threading.Lock()

    @property
    def width(self) -> int:
        """Channels of a state."""
        return self.encoder.width

    @property
    def max_tokens(self) -> int:
        """Token positions of every result."""
        return self.encoder.max_tokens

    @property
    def instruction_hash(self) -> str:
        """That of the encoder."""
        return self.encoder.instruction_hash

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._bytes

    def encode(self, prompts: Sequence[str]) -> TextStates:
        """States of positive prompts."""
        return self._encode(prompts, self.instruction_hash, self.encoder.encode)

    def encode_negative(self, prompts: Sequence[str]) -> TextStates:
        """States of negative or empty prompts."""
        return self._encode(prompts, "", self.encoder.encode_negative)

    def _encode(
        self,
        prompts: Sequence[str],
        instruction_hash: str,
        encode: Callable[[Sequence[str]], TextStates],
    ) -> TextStates:
        keys = [(instruction_hash, prompt, self.max_tokens) for prompt in prompts]
        found = self._look_up(keys)
        if missing := [key for key in dict.fromkeys(keys) if key not in found]:
            with self._running:
                # Another thread may have encoded the same prompts meanwhile.
                found |= self._look_up(missing)
                missing = [key for key in missing if key not in found]
                if missing:
                    states = encode([prompt for _, prompt, _ in missing])
                    found |= dict(zip(missing, states.split(), strict=True))
                    self._remember(missing, found)
        return TextStates.concatenate([found[key] for key in keys])

    def _look_up(self, keys: Sequence[Key]) -> dict[Key, TextStates]:
        with self._lock:
            found = {key: self._entries[key] for key in keys if key in self._entries}
            for key in found:
                self._entries.move_to_end(key)
            return found

    def _remember(self, keys: Sequence[Key], states: Mapping[Key, TextStates]) -> None:
        with self._lock:
            for key in keys:
                self._entries[key] = states[key]
                self._bytes += states[key].nbytes
            while self._bytes > self.capacity:
                _, dropped = self._entries.popitem(last=False)
                self._bytes -= dropped.nbytes
