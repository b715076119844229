"""How fast the knowledge base answers and takes in, and what it survives."""
