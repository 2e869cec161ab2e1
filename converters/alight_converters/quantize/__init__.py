"""Quantization passes, one per file."""
