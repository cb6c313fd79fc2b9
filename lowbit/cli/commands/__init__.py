"""One file for each command: a function, its options, its exit codes."""
