"""What is on disk: the contract between exporter and runtime."""
