"""What a user may choose, stated once: frozen dataclasses whose fields are keywords in Python and flags of commands."""

from lowbit.options.generation import SamplingOptions, SessionOptions
from lowbit.options.keywords import changed, keywords, like, option, shows_options, takes_options
from lowbit.options.model import LoadOptions, OutputOptions, RevisionOptions, ShardOptions, SourceOptions
from lowbit.options.recipe import (
    CalibrationOptions,
    FileOptions,
    HeadOption,
    OnLoadOptions,
    RecipeOptions,
    RunOptions,
    SampleOptions,
)

__all__ = [
    "CalibrationOptions", "FileOptions", "HeadOption", "LoadOptions", "OnLoadOptions", "OutputOptions", "RecipeOptions",
    "RevisionOptions", "RunOptions", "SampleOptions", "SamplingOptions", "SessionOptions", "ShardOptions",
    "SourceOptions", "changed", "keywords", "like", "option", "shows_options", "takes_options",
]  # fmt: skip
