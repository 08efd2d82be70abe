"""Recipes: how models are trained, and what ships with edgeskip."""
