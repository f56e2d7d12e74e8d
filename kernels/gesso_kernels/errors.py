"""What a kernel can refuse; `gesso_core` shows these to users in its own terms."""


class UnsupportedMode(ValueError):
    """A mode that this device, format or shape does not have; names the best that it has."""
