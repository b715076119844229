"""mogine: the AI assistant of a company website, on its own server."""
