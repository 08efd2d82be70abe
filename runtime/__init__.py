"""The device's side: load a bundle, decode, measure. It imports neither exporter nor recipes."""
