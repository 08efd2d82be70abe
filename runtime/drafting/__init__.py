"""Drafts that need no model: what may come next, by the text itself."""
