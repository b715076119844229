"""A document in: load, chunk, embed, index."""
