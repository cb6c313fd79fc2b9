"""A machine that executes PTX on the CPU: README.md says what it models."""
