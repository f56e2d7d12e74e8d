"""One file per paper: configuration, blocks, model, from top to bottom."""
