"""Quantized files of other tools: Nunchaku, deepcompressor, ModelOpt."""
