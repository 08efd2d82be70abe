"""The verbs of the command line that need nothing but what a device installs."""
