"""Whether what runs is what was trained: a session against transformers."""
