"""The modules of a quantized model: linears, experts, products that linears share."""
