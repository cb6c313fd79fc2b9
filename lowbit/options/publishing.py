"""Options that say how a model is published."""

from dataclasses import dataclass

from lowbit.options.keywords import option


@dataclass(frozen=True)
class PushOptions:
    """Who sees what is published, and what it may replace."""

    private: bool = option(
        True,
        "Who can see it: a repository that others can see is refused; --public publishes what was pushed privately.",
        flags=("--private/--public",),
    )
    dry_run: bool = option(False, "Show the model card and the files; upload nothing.")
    overwrite: bool = option(False, "Replace other weights in the repository.")
    base_model: str | None = option(None, "Hub id of the model that was quantized, where the folder does not say.")
