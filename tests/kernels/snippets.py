"""A few lines of PTX as a kernel on the machine: each thread has inputs in %i0, %i1, ... and results in %o0, ..."""

import numpy as np
from machine.copies import TensorMap
from machine.emit import PARAMETER_BASE
from machine.global_memory import GlobalMemory, Tensor
from machine.processor import Launch, Settings, compiled
from machine.program import parse

HEADER = """
.version 8.7
.target sm_90a
.visible .entry snippet(
  .param .u64 .ptr .global .align 1 snippet_param_0,
  .param .u64 .ptr .global .align 1 snippet_param_1,
  .param .align 64 .b8 snippet_param_2[128]
)
.reqntid {threads}
.maxnreg {max_registers}
{{
  .reg .pred %p<16>;
  .reg .b16 %rs<16>;
  .reg .b32 %r<64>, %i<{inputs}>, %o<{outputs}>;
  .reg .b64 %rd<32>, %in, %out;
  mov.u32 %r60, %ctaid.x;
  mov.u32 %r61, %tid.x;
  mad.lo.s32 %r62, %r60, {threads}, %r61;
  ld.param.b64 %in, [snippet_param_0];
  ld.param.b64 %out, [snippet_param_1];
  mad.wide.u32 %in, %r62, {input_bytes}, %in;
  mad.wide.u32 %out, %r62, {output_bytes}, %out;
"""


class Snippet:
    """Ran once. outputs uint32 [threads, n]; findings: their texts."""

    def __init__(self, launch: Launch, outputs: np.ndarray):
        self.launch, self.outputs = launch, outputs
        self.findings = [str(finding) for finding in launch.findings]


def kernel(body: str, inputs: int, outputs: int, threads: int = 32, max_registers: int = 128, out: bool = True) -> str:
    """The PTX of a snippet. out: results are stored at its end."""
    text = HEADER.format(
        threads=threads, max_registers=max_registers, inputs=max(inputs, 1), outputs=max(outputs, 1),
        input_bytes=4 * inputs, output_bytes=4 * outputs,
    )  # fmt: skip
    text += "".join(f"  ld.global.b32 {{ %i{n} }}, [ %in + {4 * n} ];\n" for n in range(inputs))
    text += body + "\n"
    text += "".join(f"  st.global.b32 [ %out + {4 * n} ], {{ %o{n} }};\n" for n in range(outputs if out else 0))
    return text + "  ret;\n}\n"


def words(column: np.ndarray) -> np.ndarray:
    """uint32: the bits of 32-bit elements, or the numbers of int64."""
    return column.view(np.uint32) if column.dtype.itemsize == 4 else column.astype(np.uint32)


def execute(
    body: str, inputs: np.ndarray | list | None = None, outputs: int = 1, *, threads: int = 32, ctas: int = 1,
    shared: int = 0, seed: int = 0, races: bool = True, tensor_map: TensorMap | None = None, max_registers: int = 128,
    unwritten: slice | None = None, text: str | None = None,
) -> Snippet:  # fmt: skip
    """inputs [threads of the grid, n] of any 32-bit dtype, or a list of such columns. unwritten: threads whose inputs
    nobody has written. tensor_map: its address is replaced by that of the inputs."""
    total = threads * ctas
    if isinstance(inputs, list):
        inputs = np.stack([words(column) for column in inputs], 1)
    given = np.zeros((total, 0), np.uint32) if inputs is None else np.ascontiguousarray(inputs).view(np.uint32)
    given = given.reshape(total, -1)
    code = compiled(parse(text or kernel(body, given.shape[1], outputs, threads, max_registers)))
    raw = given.reshape(-1).view(np.uint8)
    written = np.ones(len(raw), bool)
    if unwritten is not None:
        written.reshape(total, -1)[unwritten] = False
    size = total * outputs * 4
    memory = GlobalMemory(
        [
            Tensor("inputs", raw, np.ones(len(raw), bool), written),
            Tensor("outputs", np.full(size, 0xFF, np.uint8), np.ones(size, bool), np.zeros(size, bool)),
        ]
    )
    parameters = np.array([memory.address(0), memory.address(1)], np.uint64).tobytes() + bytes(48 + 128)
    maps = {}
    if tensor_map is not None:
        moved = TensorMap(
            tensor_map.element, tensor_map.shape, tensor_map.strides, memory.address(0), tensor_map.block,
            tensor_map.swizzle,
        )  # fmt: skip
        maps[PARAMETER_BASE + code.program.parameter_offsets()[0]["snippet_param_2"]] = moved
    launch = Launch(code, (ctas, 1, 1), parameters, memory, shared, maps, Settings(seed, races))
    launch.run()
    return Snippet(launch, memory.data[memory.piece(1)].view(np.uint32).reshape(total, outputs))
