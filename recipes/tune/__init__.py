"""The best exit layer and speculation length for a text and a device."""
