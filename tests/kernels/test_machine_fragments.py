"""Matrices on the PTX machine: which lane holds what, by the figures of the PTX ISA, element by element in Python."""

import numpy as np
import pytest
from machine.copies import TensorMap, swizzled
from machine.wgmma import operand_addresses
from snippets import execute

LANES = range(32)
SHARED = 1024  # where shared memory starts


def patterns(kind, *shape, seed=0):
    """Numbers that a kind holds exactly, as (bits, float64): small integers, so that sums are exact too."""
    values = np.random.default_rng(seed).integers(-8, 9, shape)
    if kind == "s8":
        return values.astype(np.int8).view(np.uint8), values.astype(np.float64)
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16), values.astype(np.float64)
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16), values.astype(np.float64)


def word(elements):
    """Patterns of 8 or 16 bits, the first lowest, as a register."""
    return sum(int(e) << (8 * e.dtype.itemsize) * n for n, e in enumerate(elements))


def a_registers(a):
    """[32][4] of A [16, k]: ISA figures of m16n8k16 and m16n8k32. Register i holds row g, or g + 8 if i is odd;
    columns of the left half of k, or of the right half from i = 2 on."""
    per = 4 // a.dtype.itemsize
    half = a.shape[1] // 2
    return [
        [word(a[lane // 4 + 8 * (i % 2), half * (i // 2) + per * (lane % 4) :][:per]) for i in range(4)]
        for lane in LANES
    ]


def b_registers(b):
    """[32][2] of B [k, 8]: register i holds column g, rows of the first or second half of k."""
    per, half = 4 // b.dtype.itemsize, b.shape[0] // 2
    return [[word(b[half * i + per * (lane % 4) :, lane // 4][:per]) for i in range(2)] for lane in LANES]


def d_elements(columns):
    """(row, column) of each lane's accumulators of D [16, columns]."""
    return [
        [(lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2) for i in range(columns // 2)]
        for lane in LANES
    ]


def accumulator(values, kind):
    return values.astype(np.int32).view(np.uint32) if kind == "s8" else values.astype(np.float32).view(np.uint32)


@pytest.mark.parametrize("kind", ["bf16", "f16", "s8"])
def test_mma(kind):
    k = 32 if kind == "s8" else 16
    (a_bits, a), (b_bits, b) = patterns(kind, 16, k), patterns(kind, k, 8, seed=1)
    c = np.random.default_rng(2).integers(-50, 50, (16, 8)).astype(np.float64)
    places = d_elements(8)
    held = np.array([[accumulator(c[at], kind) for at in lane] for lane in places]).astype(np.uint32)
    inputs = np.concatenate([np.array(a_registers(a_bits)), np.array(b_registers(b_bits)), held], 1).astype(np.uint32)
    types = "satfinite.s32.s8.s8.s32" if kind == "s8" else f"f32.{kind}.{kind}.f32"
    body = (
        f"mma.sync.aligned.m16n8k{k}.row.col.{types} {{ %o0, %o1, %o2, %o3 }}, {{ %i0, %i1, %i2, %i3 }}, "
        "{ %i4, %i5 }, { %i6, %i7, %i8, %i9 };"
    )
    got = execute(body, inputs, 4).outputs
    want = a @ b + c
    assert got.tolist() == [[int(accumulator(want[at], kind)) for at in lane] for lane in places]


@pytest.mark.parametrize("types, want", [("satfinite.s32.s8.s8.s32", 2**31 - 1), ("s32.s8.s8.s32", -(2**31) + 516127)])
def test_integer_sums_saturate_where_the_opcode_says_so(types, want):
    full = np.full((32, 4), 0x7F7F7F7F, np.uint32)
    body = f"""
      mov.b32 %r0, 0x7FFFFFFF;
      mma.sync.aligned.m16n8k32.row.col.{types} {{ %o0, %r1, %r2, %r3 }}, {{ %i0, %i1, %i2, %i3 }}, {{ %i0, %i1 }},
        {{ %r0, %r0, %r0, %r0 }};
    """
    assert 32 * 127 * 127 - 1 == 516127
    assert set(execute(body, full).outputs[:, 0].view(np.int32).tolist()) == {want}


def test_sums_round_once():
    """float32 after all products of the instruction: 2^24 + 1 + 1 is not lost in two steps."""
    one = np.full((32, 4), 0x3F803F80, np.uint32)
    body = """
      mov.b32 %r0, 0f4B800000;
      mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %o0, %r1, %r2, %r3 }, { %i0, %i1, %i2, %i3 }, { %i0, %i1 },
        { %r0, %r0, %r0, %r0 };
    """
    assert set(execute(body, one).outputs[:, 0].view(np.float32).tolist()) == {2.0**24 + 16}


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_and_stmatrix(count, transposed):
    """Lane 8 * m + r names row r of matrix m; lane 4 * g + c then holds columns 2c, 2c + 1 of row g of each, or of the
    transpose. Rows lie in a random order."""
    how = ".trans" if transposed else ""
    registers = ", ".join(f"%o{n}" for n in range(count))
    row_of_lane = np.random.default_rng(0).permutation(32).astype(np.uint32)
    data = np.arange(32 * 8, dtype=np.uint16).reshape(32, 8)  # by the place in memory
    words = data.view(np.uint32)
    body = f"""
      shl.b32 %r1, %i0, 4;
      add.s32 %r1, %r1, {SHARED};
      mov.u32 %r2, %tid.x;
      shl.b32 %r2, %r2, 4;
      add.s32 %r2, %r2, {SHARED};
      st.shared.v4.b32 [%r2], {{ %i1, %i2, %i3, %i4 }};
      bar.warp.sync -1;
      ldmatrix.sync.aligned.m8n8.x{count}{how}.shared.b16 {{ {registers} }}, [%r1];
      stmatrix.sync.aligned.m8n8.x{count}{how}.shared.b16 [%r1+512], {{ {registers} }};
      bar.warp.sync -1;
      ld.shared.v4.b32 {{ %o4, %o5, %o6, %o7 }}, [%r1+512];
    """
    inputs = np.concatenate([row_of_lane[:, None], words], 1)
    ran = execute(body, inputs, 8, shared=1024)
    assert not ran.findings or count < 4  # with fewer matrices the other lanes read what nobody wrote
    for m in range(count):
        matrix = data[row_of_lane[8 * m : 8 * m + 8]]
        matrix = matrix.T if transposed else matrix
        for lane in LANES:
            g, c = divmod(lane, 4)
            assert ran.outputs[lane, m] == int(matrix[g, 2 * c]) | int(matrix[g, 2 * c + 1]) << 16
    stored = ran.outputs[: 8 * count, 4:].copy().view(np.uint16)
    assert (stored == data[row_of_lane[: 8 * count]]).all()


def swizzle_by_the_figure(row, chunk, swizzle):
    """ISA 5.5.4: of rows of `swizzle` bytes, chunks of 16 bytes change places by the number of the 128-byte line."""
    address = row * swizzle + chunk * 16
    line = address // 128
    pattern = {32: line % 2, 64: line % 4, 128: line % 8}[swizzle]
    return address // swizzle * swizzle + (chunk ^ pattern) * 16


@pytest.mark.parametrize("swizzle", [32, 64, 128])
def test_swizzles(swizzle):
    """Every 16 bytes of eight rows somewhere else, and columns of chunks over all banks."""
    for row in range(32):
        for chunk in range(swizzle // 16):
            assert swizzled(np.array(row * swizzle + chunk * 16), swizzle) == swizzle_by_the_figure(row, chunk, swizzle)


@pytest.mark.parametrize("swizzle, code", [(0, 0), (128, 1), (64, 2), (32, 3)])
def test_matrix_descriptors(swizzle, code):
    """ISA 9.7.15.5.1: bits 0-13 start, 16-29 leading and 32-45 stride offset, in units of 16 bytes; 62-63 swizzle."""
    start, leading, stride = 0x4000, 0x100, 0x800
    descriptor = np.array([start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | code << 62], np.uint64)
    got = operand_addresses(descriptor, np.arange(24)[None, :], 32)[0]
    for row in range(24):
        for byte in range(32):
            if swizzle:
                in_core = swizzle_by_the_figure(row % 8, byte // 16, swizzle) + byte % 16
                # a start at a multiple of the repeat: the pattern goes by the address, which is that of the row here
                want = start + stride * (row // 8) + in_core
            else:
                want = start + stride * (row // 8) + leading * (byte // 16) + 16 * (row % 8) + byte % 16
            assert got[row, byte] == want


def shared_image(b_bits, swizzle):
    """B^T [n, bytes of k] as the bytes of shared memory that a descriptor of this swizzle means, k filling a row."""
    rows = np.ascontiguousarray(b_bits.T).view(np.uint8)  # [n, 32]
    image = np.zeros(len(rows) * max(swizzle, 32), np.uint8)
    for n, row in enumerate(rows):
        for chunk in range(2):
            if swizzle:
                at = swizzle * 8 * (n // 8) + swizzle_by_the_figure(n % 8, chunk, swizzle)
            else:
                at = 256 * (n // 8) + 128 * chunk + 16 * (n % 8)
            image[at : at + 16] = row[16 * chunk : 16 * chunk + 16]
    return image


@pytest.mark.parametrize("kind", ["bf16", "f16", "s8"])
@pytest.mark.parametrize("swizzle, code", [(0, 0), (128, 1), (64, 2), (32, 3)])
@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("in_shared", [False, True], ids=["A in registers", "A in shared memory"])
def test_wgmma(kind, swizzle, code, keep, in_shared):
    """D [64, 16] = A [64, k] B [k, 16], plus D if `keep`: warp w has rows 16w to 16w + 15."""
    k = 32 if kind == "s8" else 16
    (a_bits, a), (b_bits, b) = patterns(kind, 64, k), patterns(kind, k, 16, seed=1)
    before = np.random.default_rng(2).integers(-50, 50, (64, 16)).astype(np.float64)
    stride, leading = (swizzle * 8, 16) if swizzle else (256, 128)
    image_b, image_a = shared_image(b_bits, swizzle), shared_image(np.ascontiguousarray(a_bits.T), swizzle)
    base_a = 4096
    image = np.zeros(16384, np.uint8)
    image[: len(image_b)], image[base_a : base_a + len(image_a)] = image_b, image_a
    words = image.view(np.uint32).reshape(128, 32)
    held = np.concatenate([[a_registers(a_bits[16 * w : 16 * w + 16])] for w in range(4)]).reshape(128, 4)
    places = [[(16 * w + row, column) for row, column in lane] for w in range(4) for lane in d_elements(16)]
    sums = np.array([[accumulator(before[at], kind) for at in lane] for lane in places])

    def descriptor(base):
        return (SHARED + base) >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | code << 62

    stores = "\n".join(f"st.shared.b32 [%r1+{4 * n}], %i{n};" for n in range(32))
    moves = "\n".join(f"mov.b32 %o{n}, %i{36 + n};" for n in range(8))
    out = ", ".join(f"%o{n}" for n in range(8))
    left = "%rd2" if in_shared else "{ %i32, %i33, %i34, %i35 }"
    flags = "" if kind == "s8" else ", 1, 1, 0, 0" if in_shared else ", 1, 1, 0"
    body = f"""
      mov.u32 %r1, %tid.x;
      shl.b32 %r1, %r1, 7;
      add.s32 %r1, %r1, {SHARED};
      {stores}
      {moves}
      fence.proxy.async.shared::cta;
      bar.sync 0;
      mov.b64 %rd1, {descriptor(0)};
      mov.b64 %rd2, {descriptor(base_a)};
      setp.ne.b32 %p1, {keep}, 0;
      wgmma.fence.sync.aligned;
      wgmma.mma_async.sync.aligned.m64n16k{k}.{"s32" if kind == "s8" else "f32"}.{kind}.{kind} {{ {out} }}, {left},
        %rd1, %p1{flags};
      wgmma.commit_group.sync.aligned;
      wgmma.wait_group.sync.aligned 0;
    """
    inputs = np.concatenate([words, held.astype(np.uint32), sums.astype(np.uint32)], 1)
    ran = execute(body, inputs, 8, threads=128, shared=16384)
    assert ran.findings == []
    want = a @ b + (before if keep else 0)
    assert ran.outputs.tolist() == [[int(accumulator(want[at], kind)) for at in lane] for lane in places]


@pytest.mark.parametrize("swizzle", [32, 64, 128])
def test_tma_copies_a_box(swizzle):
    """A box of 8 rows, one swizzle wide, at row 3 and a column that reaches out of the matrix: zeros come from there.
    The mbarrier says when it has arrived."""
    columns = swizzle // 2  # of 16 bits
    matrix = np.arange(16 * 96, dtype=np.uint16).reshape(16, 96)  # rows 80 long, 96 apart
    tensor = TensorMap(2, (16, 80), (96, 1), 0, (8, columns), swizzle)
    first = 80 - columns // 2
    words = swizzle * 8 // 4 // 32
    loads = "\n".join(f"ld.shared.b32 %o{n}, [%r1+{4 * n}];" for n in range(words))
    body = f"""
      mov.u32 %r0, %tid.x;
      setp.eq.u32 %p0, %r0, 0;
      mov.b64 %rd1, snippet_param_2;
      cvta.param.u64 %rd1, %rd1;
      @%p0 mbarrier.init.shared::cta.b64 [{SHARED + 2048}], 1;
      fence.proxy.async.shared::cta;
      bar.sync 0;
      @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [{SHARED + 2048}], {swizzle * 8};
      mov.b32 %r10, {first};
      mov.b32 %r11, 3;
      @%p0 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [{SHARED}], [%rd1, {{ %r10, %r11 }}],
        [{SHARED + 2048}];
      mov.b32 %r12, 0;
      wait: mbarrier.try_wait.parity.shared::cta.b64 %p2, [{SHARED + 2048}], %r12;
      @!%p2 bra.uni wait;
      mul.lo.u32 %r1, %r0, {4 * words};
      add.s32 %r1, %r1, {SHARED};
      {loads}
    """
    inputs = matrix.view(np.uint32).reshape(32, -1)
    ran = execute(body, inputs, words, shared=4096, tensor_map=tensor)
    assert ran.findings == []
    got = ran.outputs.reshape(-1).view(np.uint16)
    for row in range(8):
        for column in range(columns):
            at = swizzle_by_the_figure(row, column // 8, swizzle) // 2 + column % 8
            inside = first + column < 80
            assert got[at] == (matrix[3 + row, first + column] if inside else 0)


def test_shuffles():
    """ISA 9.7.9.6: lane, offset or mask, within segments that `c` gives; out of bounds the lane's own value."""
    values = np.arange(100, 132, dtype=np.uint32)
    index = np.random.default_rng(0).integers(0, 32, 32).astype(np.uint32)
    body = """
      shfl.sync.idx.b32 %o0, %i0, %i1, 31, -1;
      shfl.sync.bfly.b32 %o1, %i0, 5, 31, -1;
      shfl.sync.down.b32 %o2, %i0, 3, 31, -1;
      shfl.sync.up.b32 %o3, %i0, 3, 0, -1;
      shfl.sync.idx.b32 %o4|%p1, %i0, %i1, 0x181F, -1;
      selp.b32 %o5, 1, 0, %p1;
      shfl.sync.down.b32 %o6, %i0, 2, 0x1C03, -1;
    """
    got = execute(body, [values, index], 7).outputs
    for lane in LANES:
        i = int(index[lane])
        assert got[lane, 0] == values[i] and got[lane, 1] == values[lane ^ 5]
        assert got[lane, 2] == values[lane + 3 if lane + 3 < 32 else lane]
        assert got[lane, 3] == values[lane - 3 if lane >= 3 else lane]
        assert got[lane, 4] == values[lane // 8 * 8 + i % 8] and got[lane, 5] == 1
        assert got[lane, 6] == values[lane + 2 if lane % 4 + 2 < 4 else lane]


def test_reductions_and_elections():
    values = np.random.default_rng(0).integers(0, 2**32, 64, dtype=np.uint32)
    body = """
      redux.sync.max.s32 %o0, %i0, -1;
      redux.sync.min.u32 %o1, %i0, -1;
      elect.sync %o2|%p1, -1;
      selp.b32 %o3, 1, 0, %p1;
    """
    leaders = set()
    for seed in range(8):
        got = execute(body, [values], 4, threads=64, seed=seed).outputs.reshape(2, 32, 4)
        for warp, held in zip(got, values.reshape(2, 32), strict=True):
            assert (warp[:, 0] == held.view(np.int32).max().view(np.uint32)).all() and (warp[:, 1] == held.min()).all()
            assert warp[:, 3].sum() == 1 and (warp[:, 2] == warp[:, 3].argmax()).all()
            leaders.add(int(warp[0, 2]))
    assert len(leaders) > 1
