"""One decoding step: the cache that it fills, the tensors that it works on, and how it is repeated."""
