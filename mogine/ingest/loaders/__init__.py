"""Bytes in, text out: one module per kind of file."""
