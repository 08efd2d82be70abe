"""TensorRT engines, built each in a process of its own."""
