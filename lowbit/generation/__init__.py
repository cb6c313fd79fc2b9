"""Text generation with streaming, on transformers' `generate`."""

from lowbit.generation.stream import Generation, Session, open_session

__all__ = ["Generation", "Session", "open_session"]
