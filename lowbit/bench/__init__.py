"""Models of known shapes and other tools, measured in turns."""
