"""Training with the LayerSkip recipe."""
