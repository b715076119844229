"""The knowledge base: passages in, hits out."""
