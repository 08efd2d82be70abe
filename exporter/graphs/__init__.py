"""Graphs: the model's mathematics, written in the operators of each dialect."""
