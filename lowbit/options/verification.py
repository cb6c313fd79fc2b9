"""Options of checking a quantized folder."""

from dataclasses import dataclass
from typing import Any

from lowbit.options.keywords import like, option
from lowbit.options.model import DeviceOptions


@dataclass(frozen=True)
class VerifyOptions:
    """What is checked, and what passes."""

    run: bool = option(True, "Load the model and let it generate, too.", flags=("--run/--no-run",))
    # with more of its bytes as they were, a folder is hardly a quantized model
    max_unquantized: float = option(
        0.05, "Share of what could be quantized that may be left as it was.", least=0, most=1
    )
    device_map: Any = like(DeviceOptions, "device_map")
