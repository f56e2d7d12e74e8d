"""HART, the hybrid autoregressive transformer (arXiv 2410.10812): import from its modules."""
