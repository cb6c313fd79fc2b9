"""Which weights of a model can be quantized, and which are, found from its modules: no table of architectures."""

from lowbit.discovery.choice import choose, decoder_layers
from lowbit.discovery.in_config import exceptions_and_ignored, known_as, named_in_config
from lowbit.discovery.sites import Site, find_sites, heads_in
from lowbit.discovery.skeleton import model_class, require_language_head, skeleton
from lowbit.discovery.tables import head_beside, table_and_heads
from lowbit.transformers_api import CheckpointNames

__all__ = [
    "CheckpointNames", "Site", "choose", "decoder_layers", "exceptions_and_ignored", "find_sites", "head_beside",
    "heads_in", "known_as", "model_class", "named_in_config", "require_language_head", "skeleton", "table_and_heads",
]  # fmt: skip
