"""Promptable segmentation: one contract, several networks, embeddings that are kept."""
