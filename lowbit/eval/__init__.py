"""Quality on text: perplexity, and KL divergence to a reference model on the same tokens. And the release gate."""

from lowbit.eval.compare import Quality, evaluate
from lowbit.eval.gate import Verification, verify

__all__ = ["Quality", "Verification", "evaluate", "verify"]
