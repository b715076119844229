"""Three aiohttp servers and the plumbing they share."""
