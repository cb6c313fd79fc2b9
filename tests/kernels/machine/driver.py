"""Triton's launcher on the machine: Triton compiles for a GPU that is not here, the machine executes what it compiled.

    with on_machine(80) as session:
        y = skinny.launch(x, weight, meta, layout, config)
    assert not session.problems()

What Triton specialises on (alignment, divisibility by 16, None, 1) it does here as on the GPU; grid, parameters and the
size of shared memory are used as they are. This is the one file that knows Triton's inside; it has been the same from
3.6.0 to 3.9.0. A kernel must have been defined while the interpreter was off (decode.INTERPRETED).
"""

import contextlib
import ctypes
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from machine.copies import TensorMap
from machine.emit import PARAMETER_BASE, Compiled
from machine.global_memory import GlobalMemory, Tensor
from machine.processor import Launch, Settings, compiled
from machine.program import parse
from machine.threads import Array, Fault, Observer

SCALARS = {
    "i1": "<?", "i8": "<b", "i16": "<h", "i32": "<i", "i64": "<q", "u32": "<I", "u64": "<Q", "fp32": "<f", "fp64": "<d",
}  # fmt: skip
TENSOR_MAP_BYTES = 128
# Every launch finds these as if nobody had written them: programs of a launch write before they read
SCRATCH = ("partials",)

_run = JITFunction.run
_compiled: dict[str, Compiled] = {}  # by PTX text


class Driver:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass
class Executed:
    """A launch that has run. fault: what stopped it, if anything; tensors: its arguments, in the order of memory."""

    kernel: str
    grid: tuple[int, int, int]
    launch: Launch
    fault: str | None
    tensors: list[torch.Tensor]

    def problems(self) -> list[str]:
        return [f"{self.kernel} {self.grid}: {problem}" for problem in [self.fault, *self.launch.findings] if problem]


class Arguments:
    """What a launch passes, as memory, bytes of parameters and tensor maps."""

    def __init__(self, session: "Session", code: Compiled):
        self.session, self.code = session, code
        self.tensors: list[torch.Tensor] = []
        self.names: list[str] = []
        self.fields: list[tuple[str, object]] = []
        self.descriptors: list[tuple[int, object]] = []

    def add(self, name: str, kind: str, value: object) -> None:
        """kind: of Triton's signature."""
        if kind == "constexpr":
            return
        if kind.startswith("*"):
            self.fields.append(("pointer", self.number_of(name, value)))
        elif kind.startswith("tensordesc"):
            self.fields.append(("map", len(self.descriptors)))
            self.descriptors.append((self.number_of(name, value.base), value))
            self.fields += [("i32", size) for size in value.shape] + [("i64", stride) for stride in value.strides]
        else:
            self.fields.append((kind, value))

    def number_of(self, name: str, tensor: torch.Tensor) -> int:
        for n, known in enumerate(self.tensors):
            if known.data_ptr() == tensor.data_ptr() and known.shape == tensor.shape:
                return n
        self.tensors.append(tensor)
        self.names.append(name)
        return len(self.tensors) - 1

    def memory(self) -> GlobalMemory:
        return GlobalMemory(
            [
                Tensor(name, bytes_of(t), member_bytes(t), self.session.written(name, t), t.data_ptr() % 256)
                for name, t in zip(self.names, self.tensors, strict=True)
            ]
        )

    def packed(self, memory: GlobalMemory) -> tuple[bytes, dict[int, TensorMap]]:
        """Bytes of the parameters, and tensor maps by address. Triton appends two scratch pointers, which are null."""
        program = self.code.program
        fields = [*self.fields, ("i64", 0), ("i64", 0)]
        if len(fields) != len(program.parameters):
            raise Fault(f"{len(fields)} arguments, the kernel has {len(program.parameters)}")
        offsets, size = program.parameter_offsets()
        raw, maps = bytearray(size), {}
        for (kind, value), (name, length) in zip(fields, program.parameters, strict=True):
            at = offsets[name]
            if kind == "pointer":
                field = struct.pack("<Q", memory.address(value))
            elif kind == "map":
                maps[PARAMETER_BASE + at] = self.tensor_map(memory, value)
                field = bytes(TENSOR_MAP_BYTES)
            else:
                field = struct.pack(SCALARS[kind], value)
            if len(field) != length:
                raise Fault(f"{name} takes {length} bytes, {kind} has {len(field)}")
            raw[at : at + length] = field
        return bytes(raw), maps

    def tensor_map(self, memory: GlobalMemory, number: int) -> TensorMap:
        """Triton loads a block in boxes no wider than the swizzle."""
        tensor, descriptor = self.descriptors[number]
        element, swizzle = descriptor.base.element_size(), descriptor.layout.swizzle_byte_width
        rows, columns = descriptor.block_shape
        block = rows, min(columns, swizzle // element)
        shape, strides = tuple(descriptor.shape), tuple(descriptor.strides)
        return TensorMap(element, shape, strides, memory.address(tensor), block, swizzle)


class Session:
    """Launches on one machine. capability: 80 or 90. change: PTX -> PTX, for mutations."""

    def __init__(
        self, capability: int, seed: int = 0, races: bool = True, change: Callable[[str], str] | None = None,
        observer: Observer | None = None,
    ):  # fmt: skip
        self.capability, self.seed, self.races, self.change = capability, seed, races, change
        self.observer = observer
        self.executed: list[Executed] = []
        self.uninitialised: dict[int, tuple[torch.Tensor, Array]] = {}  # of torch.empty: storage -> written bytes

    def run(self, function: JITFunction, args: tuple, grid: object, kwargs: dict) -> object:
        """Compile and execute; returns Triton's compiled kernel."""
        kernel = _run(function, *args, grid=grid, warmup=True, **kwargs)
        text = kernel.asm["ptx"]
        code = _compile(self.change(text) if self.change else text)
        *_, binder = function.device_caches[self.capability]
        bound, *_ = binder(*args, **kwargs)
        grid = grid(bound) if callable(grid) else grid
        grid = (*grid, 1, 1)[:3]
        arguments = Arguments(self, code)
        for name, value in bound.items():
            arguments.add(name, kernel.src.signature[name], value)
        memory = arguments.memory()
        parameters, maps = arguments.packed(memory)
        settings = Settings(self.seed, self.races, self.observer)
        launch = Launch(code, grid, parameters, memory, kernel.metadata.shared, maps, settings)
        self.seed += 1
        fault = None
        try:
            launch.run()
        except Fault as error:
            fault = str(error)
        for n, tensor in enumerate(arguments.tensors):
            self.write_back(tensor, memory, memory.piece(n))
        self.executed.append(Executed(function.__name__, grid, launch, fault, arguments.tensors))
        return kernel

    def write_back(self, tensor: torch.Tensor, memory: GlobalMemory, piece: slice) -> None:
        """What the launch wrote, and nothing else: views of one storage are tensors of their own here."""
        touched = memory.touched[piece]
        bytes_of(tensor)[touched] = memory.data[piece][touched]
        if (written := self.written_of_storage(tensor)) is not None:
            written |= touched

    def written(self, name: str, tensor: torch.Tensor) -> Array:
        """Which bytes of a tensor anybody has written."""
        count = span(tensor) * tensor.element_size()
        if name in SCRATCH:
            return np.zeros(count, bool)
        written = self.written_of_storage(tensor)
        return np.ones(count, bool) if written is None else written

    def written_of_storage(self, tensor: torch.Tensor) -> Array | None:
        """A view of what is known of memory that torch.empty made; None for other memory."""
        storage = tensor.untyped_storage().data_ptr()
        if storage not in self.uninitialised:
            return None
        start = tensor.data_ptr() - storage
        return self.uninitialised[storage][1][start : start + span(tensor) * tensor.element_size()]

    def empty(self, make: Callable[..., torch.Tensor], *args, **kwargs) -> torch.Tensor:
        """torch.empty, whose bytes are 0xFF (NaN) and count as unwritten until a launch has written them."""
        tensor = make(*args, **kwargs)
        self.forget(tensor)
        return tensor

    def forget(self, tensor: torch.Tensor) -> None:
        """Let a tensor that has its storage for itself be as `empty` makes it."""
        if tensor.numel() and tensor.ndim:
            bytes_of(tensor)[:] = 0xFF
            storage = tensor.untyped_storage()
            self.uninitialised[storage.data_ptr()] = (tensor, np.zeros(len(storage), bool))

    def problems(self) -> list[str]:
        return [problem for one in self.executed for problem in one.problems()]


def span(tensor: torch.Tensor) -> int:
    """Elements from the first to the last."""
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0


def bytes_of(tensor: torch.Tensor) -> Array:
    """The memory from the first element to the last, uint8."""
    if not (count := span(tensor) * tensor.element_size()):
        return np.zeros(0, np.uint8)
    return np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(tensor.data_ptr()))


def member_bytes(tensor: torch.Tensor) -> Array:
    """Which bytes of the span belong to the tensor: not what lies between the rows of a slice."""
    member = torch.zeros(span(tensor), dtype=torch.bool)
    member.as_strided(tensor.shape, tensor.stride()).fill_(True)
    return np.repeat(member.numpy(), tensor.element_size())


def _compile(text: str) -> Compiled:
    if text not in _compiled:
        _compiled[text] = compiled(parse(text))
    return _compiled[text]


@contextlib.contextmanager
def on_machine(capability: int, **options) -> Iterator[Session]:
    """Launches of Triton kernels on CPU tensors run on the machine. options: of Session."""
    session = Session(capability, **options)
    make, active = torch.empty, triton.runtime.driver._active

    def run(self: JITFunction, *args, grid: object, warmup: bool, **kwargs) -> object:
        return session.run(self, args, grid, kwargs)

    triton.runtime.driver.set_active(Driver(capability))
    JITFunction.run = run
    torch.empty = lambda *args, **kwargs: session.empty(make, *args, **kwargs)
    try:
        yield session
    finally:
        torch.empty = make
        JITFunction.run = _run
        triton.runtime.driver._active = active
