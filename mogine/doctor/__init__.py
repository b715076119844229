"""Whether all is well with a home, with its vendors, and with the site as visitors see it."""
