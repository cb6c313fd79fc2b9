"""Commands that load a model and let it generate."""
