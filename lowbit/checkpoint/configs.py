"""config.json of a quantized folder, and what else readers of its format look for."""

import json
from pathlib import Path

from lowbit.guards.safe_files import write_whole


def write_configs(folder: Path, config: dict, fmt, quantization_config: dict) -> None:
    """config.json with the quantization in it, and what else readers of the format look for."""
    files = fmt.companions(quantization_config)
    files["config.json"] = {**config, "quantization_config": quantization_config}
    for name, data in files.items():
        write_whole(folder / name, json.dumps(data, indent=2) + "\n")
