"""Text generation: the decode loop on a static cache, and sessions that stream text."""

from lowbit.generation.draft import Draft
from lowbit.generation.loop import Decoder, Result, generate
from lowbit.generation.sampling import Sampling
from lowbit.generation.stats import Stats
from lowbit.generation.stream import Generation, Session, open_session

__all__ = ["Decoder", "Draft", "Generation", "Result", "Sampling", "Session", "Stats", "generate", "open_session"]
