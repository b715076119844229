"""Measurements of mogine; each is one command and writes its results as JSON."""
