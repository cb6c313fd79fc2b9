"""What is computed: schemes, grids, quantized weights, and the definition of a quantized linear in plain torch."""
