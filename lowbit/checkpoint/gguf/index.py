"""How the tensors of a GGUF file belong to a model of transformers: a small file in a folder beside it.

`gguf_index.json` is written where a GGUF file is opened (`lowbit.folders.gguf`), and is all that tells a folder with
one from any other model folder.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from lowbit.errors import InputError
from lowbit.guards.reading import read_json
from lowbit.guards.records import record, shown
from lowbit.guards.safe_files import write_whole

INDEX_NAME = "gguf_index.json"


@dataclass(frozen=True)
class Index:
    """
    Attributes:
        files: Names of the GGUF files in the folder.
        architecture: What they call theirs.
        names: Names of tensors, as transformers knows them -> of the parameters that are made of them.
        shapes: Of these parameters.
        experts: Names of parameters that checkpoints hold as matrices of each expert -> those of the parts of one,
            with {} for its number.
        packed: Parameters that are kept in integers.
        linears: Parameters that quantizing quantizes.
        left_out: Names of tensors of the files that no parameter is made of.
    """

    files: tuple[str, ...]
    architecture: str
    names: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    experts: dict[str, tuple[str, ...]]
    packed: tuple[str, ...]
    linears: tuple[str, ...]
    left_out: tuple[str, ...] = ()


def write_index(folder: Path, index: Index) -> None:
    """Write `gguf_index.json` into a folder."""
    write_whole(folder / INDEX_NAME, json.dumps(asdict(index), indent=1) + "\n")


def read_index(folder: Path) -> Index:
    """Raises InputError, where it names other files than those beside it too."""
    path = folder / INDEX_NAME
    index = record(Index, read_json(path), str(path))
    for name in index.files:
        if name != Path(name).name or not name.endswith(".gguf") or "\\" in name:
            raise InputError(f"{path} names {shown(name)}; expected *.gguf files beside it")
    return index
