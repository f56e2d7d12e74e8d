"""The files of the nunchaku engine: layouts of tensors, names, metadata, and conversions."""
