"""Compiling the kernels for a GPU that is not here, and reading from the machine code what they will do there."""
