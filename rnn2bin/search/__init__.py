"""Searches: over recipes with a stored study (`study`), and over densities inside one conversion (`descent`). `front`: which is chosen."""
