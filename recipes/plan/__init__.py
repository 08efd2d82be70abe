"""What fits where, and how fast it is there."""
