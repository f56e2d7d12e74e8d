"""Layers that more than one model shares."""
