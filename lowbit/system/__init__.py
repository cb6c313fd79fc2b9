"""The machine: memory, the page cache, versions."""
