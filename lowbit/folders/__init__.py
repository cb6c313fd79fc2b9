"""Model folders: where one is, what is stored in it, opened."""
