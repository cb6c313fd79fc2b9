"""What others see of a quantized model: the page of a run."""
