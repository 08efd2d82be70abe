"""The verbs of the command line that need no more than a device installs."""
