"""The library as Python sees it: constants, structures and functions that abi.h lists and abi.c exports as a table.

Constants, enumerators and types of arguments are read from the table, so there is one of each. Structures are declared
on both sides, and compared: one that differs would have the kernels read and write memory that is not theirs.
"""

import ctypes
import re
from pathlib import Path


class AbiError(Exception):
    """A library whose structures are not those of this module, or that lacks something."""


_Sizes = ctypes.c_int64 * 4  # one for each of DIMENSIONS


class Weight(ctypes.Structure):
    """`Weight` of abi.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros")),
        *((name, ctypes.c_int64) for name in ("bits", "out_features", "in_features", "group_size", "integer_inputs")),
    )


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


_STRUCTURES = {cls.__name__: cls for cls in (Weight, Strided, Attention, Operand, Instruction)}
_NAMES = {ctypes.c_void_p: "pointer", ctypes.c_int64: "int64_t", ctypes.c_float: "float", _Sizes: "int64_t"}
_NUMBERS = {"void": None, "int64_t": ctypes.c_int64, "float": ctypes.c_float}


class _Entry(ctypes.Structure):
    """`Entry` of abi.c. The table ends with one that has no kind."""

    _fields_ = (
        *((name, ctypes.c_char_p) for name in ("kind", "name", "type")),
        *((name, ctypes.c_int64) for name in ("value", "size")),
    )


class Library(ctypes.CDLL):
    """The kernels, with the types of their arguments.

    Attributes:
        constants: value of each constant and enumerator of abi.h.

    Raises:
        OSError: the file is no library.
        AbiError: it lacks its table, a function or a structure, or has another layout of one; says which.
    """

    def __init__(self, path: Path):
        super().__init__(str(path))
        entries = list(self._entries())
        self.constants = {entry.name.decode(): entry.value for entry in entries if entry.kind == b"constant"}
        _compare(entries)
        for entry in entries:
            if entry.kind == b"function":
                self._declare(entry.name.decode(), entry.type.decode())

    def _entries(self):
        try:
            entry = ctypes.cast(self.lowbit_abi, ctypes.POINTER(_Entry))
        except AttributeError as error:
            raise AbiError("it has no table lowbit_abi") from error
        index = 0
        while entry[index].kind:
            yield entry[index]
            index += 1

    def _declare(self, name: str, declared: str) -> None:
        try:
            function = getattr(self, name)
        except AttributeError as error:
            raise AbiError(f"it has no function {name}") from error
        result, arguments = re.fullmatch(r"(.+?)\((.*)\)", declared).groups()
        function.restype = _NUMBERS[result]
        function.argtypes = [_type_of(argument.rpartition(" ")) for argument in arguments.split(", ")]


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
