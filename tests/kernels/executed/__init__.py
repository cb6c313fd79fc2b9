"""Our kernels executed on the machine of tests/kernels/machine, and compared with float64."""
