"""What could not be answered, and how it comes to be answered."""
