"""The recipe of the built-in FLUX."""
