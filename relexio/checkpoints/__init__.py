"""Hugging Face checkpoint directories: finding, checking, reading, and writing them."""
