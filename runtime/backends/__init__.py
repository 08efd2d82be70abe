"""Who runs a round: sessions on ONNX Runtime and TensorRT, and which of them serves a bundle here."""
