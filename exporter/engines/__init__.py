"""TensorRT engines, each built in a process of its own."""
