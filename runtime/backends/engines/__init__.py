"""TensorRT: its engines, the weights that they read, and the kernels of ours between them."""
