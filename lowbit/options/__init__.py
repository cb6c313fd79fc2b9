"""What a user may choose, stated once: frozen dataclasses whose fields are keywords in Python and flags of commands."""

from lowbit.options.generation import SamplingOptions, SessionOptions, TokenOptions
from lowbit.options.keywords import changed, keywords, like, option, shows_options, takes_options
from lowbit.options.merging import ComparisonOptions, MergeOptions
from lowbit.options.model import (
    DeviceOptions,
    LoadOptions,
    OutputOptions,
    RevisionOptions,
    ShardOptions,
    ShareOptions,
    SourceOptions,
)
from lowbit.options.publishing import PushOptions
from lowbit.options.recipe import (
    CalibrationOptions,
    DataOptions,
    DrawnSampleOptions,
    FileOptions,
    HeadOption,
    OnLoadOptions,
    RecipeOptions,
    RunOptions,
    SampleOptions,
)
from lowbit.options.running import LoadedOptions, TargetOptions
from lowbit.options.serving import BatchingOptions, LimitOptions, ListenOptions
from lowbit.options.verification import VerifyOptions

__all__ = [
    "BatchingOptions", "CalibrationOptions", "ComparisonOptions", "DataOptions", "DeviceOptions",
    "DrawnSampleOptions", "FileOptions", "HeadOption", "LimitOptions", "ListenOptions", "LoadOptions", "LoadedOptions",
    "MergeOptions", "OnLoadOptions", "OutputOptions", "PushOptions", "RecipeOptions", "RevisionOptions",
    "RunOptions", "SampleOptions", "SamplingOptions", "SessionOptions", "ShardOptions", "ShareOptions", "SourceOptions",
    "TargetOptions", "TokenOptions", "VerifyOptions", "changed", "keywords", "like", "option", "shows_options",
    "takes_options",
]  # fmt: skip
