"""Quantizing a checkpoint: planned to the byte from headers, then run tensor by tensor, or layer by layer with data."""
