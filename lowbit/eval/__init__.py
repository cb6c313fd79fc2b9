"""Quality on text: perplexity, and KL divergence to a reference model on the same tokens."""

from lowbit.eval.compare import Quality, evaluate

__all__ = ["Quality", "evaluate"]
