"""Texts that keep to a grammar: JSON after a schema, a regular expression, or rules of their own."""
