"""Annotation without training: promptable masks, masks of characters, cars stood up in 3D."""
