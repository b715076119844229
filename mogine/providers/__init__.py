"""Ways to get an answer: one module per vendor."""
