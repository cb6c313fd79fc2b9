"""Safetensors checkpoints on disk: read tensor by tensor, written shard by shard, whole or not at all."""

from lowbit.checkpoint.layout import TensorInfo
from lowbit.checkpoint.reader import CheckpointReader
from lowbit.checkpoint.writer import CheckpointWriter

__all__ = ["CheckpointReader", "CheckpointWriter", "TensorInfo"]
