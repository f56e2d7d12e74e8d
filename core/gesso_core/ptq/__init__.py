"""Post-training quantization: a 16-bit model and prompts in, a quantized one and a report out."""
