"""How well the knowledge base finds."""
