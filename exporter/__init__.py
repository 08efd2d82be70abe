"""Export: a checkpoint becomes a bundle."""
