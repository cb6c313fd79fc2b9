"""Adapters merged into models: the adapter and its arithmetic are PEFT's, files and grids are ours."""
