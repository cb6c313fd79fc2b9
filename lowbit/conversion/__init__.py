"""A quantized model in another format, another dtype, or dense; exports to other tools."""
