"""The idea of the project: rounds, the loop that runs them, and the text that comes out. Read this first."""
