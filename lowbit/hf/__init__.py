"""transformers integration. Importing it registers the quantization method `lowbit` (in memory only: on disk it is
always a standard format)."""

from lowbit.hf.config import LowbitConfig
from lowbit.hf.load import check_vocabulary, load, loading_config
from lowbit.hf.lora import enable_lora
from lowbit.hf.quantizer import LowbitQuantizer

__all__ = ["LowbitConfig", "LowbitQuantizer", "check_vocabulary", "enable_lora", "load", "loading_config"]
