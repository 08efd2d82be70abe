"""Conversations: a Python object, and a terminal's."""
