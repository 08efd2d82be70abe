"""Quantization: the numbers and scales that stand for a matrix in 8 or 4 bits."""
