"""How fast a model runs here, beside the same model unquantized and quantized by others."""
