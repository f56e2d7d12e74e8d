"""SVDQuant (arXiv 2411.05007): linear layers in 4 and 8 bit with a 16-bit low-rank branch."""
