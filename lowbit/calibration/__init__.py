"""What a linear has to know of its inputs: instrumented forward passes, moments, scales for smoothing."""
