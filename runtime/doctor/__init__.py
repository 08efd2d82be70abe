"""What a machine has, and what works on it."""
