"""Workflows of other programs, read into this program's options."""
