"""The best exit layers and speculation length for a text and a device."""
