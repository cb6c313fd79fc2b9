"""The library as Python sees it: constants, structures and functions that abi.h lists and abi.c exports as a table.

Constants, enumerators and types of arguments are read from the table, so there is one of each. Structures are declared
on both sides, and compared: one that differs would have the kernels read and write memory that is not theirs.
"""

import ctypes
import re
from collections.abc import Callable, Iterator
from pathlib import Path


class AbiError(Exception):
    """A library whose structures are not those of this module, or that lacks something."""


_Sizes = ctypes.c_int64 * 4  # one for each of DIMENSIONS


class Weight(ctypes.Structure):
    """`Weight` of abi.h."""

    _sizes = ("scale_dtype", "bits", "out_features", "in_features", "group_size", "integer_inputs")
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros")),
        *((name, ctypes.c_int64) for name in _sizes),
    )


class Experts(ctypes.Structure):
    """`Experts` of abi.h."""

    _fields_ = (("start", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("count", "least", "most")))


class Strided(ctypes.Structure):
    """`Strided` of abi.h."""

    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "token")))


class Attention(ctypes.Structure):
    """`Attention` of abi.h."""

    _sizes = ("batch", "heads", "group", "queries", "keys", "head_dim", "value_dim", "dtype", "last")
    _fields_ = (
        *((name, Strided) for name in ("query", "key", "value", "mask", "out")),
        *((name, ctypes.c_int64) for name in _sizes),
        ("scale", ctypes.c_float),
    )


class Operand(ctypes.Structure):
    """`Operand` of abi.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("strides", _Sizes),
        ("dtype", ctypes.c_int64),
        ("value", ctypes.c_float),
    )


class Instruction(ctypes.Structure):
    """`Instruction` of abi.h."""

    _fields_ = (
        ("operation", ctypes.c_int64),
        ("sizes", _Sizes),
        ("out", Operand),
        ("a", Operand),
        ("b", Operand),
        ("index", ctypes.c_void_p),
        ("step", ctypes.c_int64),
    )


_STRUCTURES = {cls.__name__: cls for cls in (Weight, Experts, Strided, Attention, Operand, Instruction)}
_NAMES = {ctypes.c_void_p: "pointer", ctypes.c_int64: "int64_t", ctypes.c_float: "float", _Sizes: "int64_t"}
_NUMBERS = {"void": None, "int64_t": ctypes.c_int64, "float": ctypes.c_float}


class _Entry(ctypes.Structure):
    """`Entry` of abi.c. The table ends with one that has no kind."""

    _fields_ = (
        *((name, ctypes.c_char_p) for name in ("kind", "name", "type")),
        *((name, ctypes.c_int64) for name in ("value", "size")),
    )


class Library(ctypes.CDLL):
    """The kernels, with the types of their arguments, on one level of instructions at a time.

    Attributes:
        constants: value of each constant and enumerator of abi.h.
        levels: names of the levels that the library has and this machine runs, the best one first.
        level: the one whose functions have the plain names: the best, until `use` names another.

    Raises:
        OSError: the file is no library.
        AbiError: it lacks its table, a function or a structure, or has another layout of one; says which.
    """

    def __init__(self, path: Path):
        super().__init__(str(path))
        entries = list(self._entries())
        _compare(entries)
        of_kind = {kind: [entry for entry in entries if entry.kind == kind] for kind in (b"constant", b"level")}
        self.constants = {entry.name.decode(): entry.value for entry in of_kind[b"constant"]}
        self._types = {entry.name.decode(): _signature(entry.type) for entry in entries if entry.kind == b"function"}
        self.levels = tuple(entry.name.decode().lower() for entry in reversed(of_kind[b"level"]) if self._runs(entry))
        self.use(self.levels[0])

    def _entries(self) -> Iterator[_Entry]:
        entry = ctypes.cast(self._symbol("lowbit_abi", "table"), ctypes.POINTER(_Entry))
        index = 0
        while entry[index].kind:
            yield entry[index]
            index += 1

    def _symbol(self, name: str, kind: str = "function") -> Callable:
        try:
            return self[name]
        except AttributeError as error:
            raise AbiError(f"it has no {kind} {name}") from error

    def _runs(self, level: _Entry) -> bool:
        """Whether there are functions for a level, as on every machine for the portable one, and it can run them."""
        runs = self._symbol("lowbit_runs")
        runs.argtypes, runs.restype = [ctypes.c_int64], ctypes.c_int64
        name = level.name.decode().lower()
        return level.value == 0 or bool(runs(level.value) and hasattr(self, f"{next(iter(self._types))}_{name}"))

    def use(self, level: str) -> None:
        """Give the functions of one of `levels` the plain names: `lowbit_linear` is that of this level from here on."""
        for name, (result, arguments) in self._types.items():
            function = self._symbol(f"{name}_{level}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self.level = level


def _signature(declared: bytes) -> tuple[type | None, list[type]]:
    """Types of the result and of the arguments of a C function: "void(const Weight *w, int64_t rows)"."""
    result, arguments = re.fullmatch(r"(.+?)\((.*)\)", declared.decode()).groups()
    return _NUMBERS[result], [_type_of(argument.rpartition(" ")) for argument in arguments.split(", ")]


def _type_of(argument: tuple[str, str, str]) -> type:
    """The ctypes type of an argument of C: ("const Weight", " ", "*w") is POINTER(Weight)."""
    kind, _, name = argument
    kind = kind.removeprefix("const ")
    if not name.startswith("*"):
        return _NUMBERS[kind]
    return ctypes.POINTER(_STRUCTURES[kind]) if kind in _STRUCTURES else ctypes.c_void_p


def _compare(entries: list[_Entry]) -> None:
    """Raise AbiError where a structure of the library differs from that of this module."""
    theirs = {}
    for entry in entries:
        name, kind = entry.name.decode(), entry.type.decode()
        if entry.kind == b"structure":
            theirs[name] = f"{entry.value} bytes"
        elif entry.kind == b"field":
            theirs[name] = f"{'pointer' if kind.endswith('*') else kind}, {entry.size} bytes at {entry.value}"
    ours = {}
    for name, structure in _STRUCTURES.items():
        for field, kind in structure._fields_:
            where = getattr(structure, field)
            ours[f"{name}.{field}"] = f"{_NAMES.get(kind, kind.__name__)}, {where.size} bytes at {where.offset}"
        ours[name] = f"{ctypes.sizeof(structure)} bytes"
    for name in {**ours, **theirs}:  # the first that differs is where the two part
        if ours.get(name) != theirs.get(name):
            found, expected = theirs.get(name, "nothing"), ours.get(name, "nothing")
            raise AbiError(f"{name} is {found} in the library and {expected} in Python")
