"""Quantization by what a model reads: texts go through its layers, in torch."""
