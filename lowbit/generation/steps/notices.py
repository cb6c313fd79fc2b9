"""What the log says of how a model runs: once in a process, however often it generates."""

import logging
from functools import cache

logger = logging.getLogger("lowbit")


@cache
def say_once(message: str, level: int = logging.INFO) -> None:
    logger.log(level, message)
