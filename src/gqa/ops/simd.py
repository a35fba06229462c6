"""A vocabulary of vectors for kernels written in Python and compiled by Numba.

A `Vector` holds WIDTH float32 lanes and is an ordinary variable of a jitted function: LLVM keeps it in a register.
A tile is a tuple of rows, each a tuple of vectors. Memory is addressed by plain integers (bytes). All arithmetic is
float32; what memory holds may be fp32, bf16, fp16 or int8, named by a `Kind`, and is converted on the way.

The words are generic LLVM, no instruction set is named: the same kernels run with 4 lanes (SSE, NEON), 8 (AVX2) and
16 (AVX-512). WIDTH is the host's, or that of the environment variable GQA_SIMD_WIDTH.
"""

from __future__ import annotations

import operator
import os
from dataclasses import dataclass
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import extending, njit, types
from numba.core import cgutils
from numba.core.imputils import lower_constant
from numba.extending import models, overload, register_model, typeof_impl

from gqa.errors import GqaError

WIDTHS = (4, 8, 16)


def _host_width() -> int:
    wanted = os.environ.get("GQA_SIMD_WIDTH")
    if wanted is not None:
        if wanted not in map(str, WIDTHS):
            raise GqaError("GQA_SIMD_WIDTH is not a vector width", got=wanted, allowed="4, 8 or 16 float32 lanes")
        return int(wanted)
    features = llvm.get_host_cpu_features()
    return 16 if features.get("avx512f") else 8 if features.get("avx2") else 4


WIDTH = _host_width()
VECTOR_BYTES = 4 * WIDTH
# AVX-512VL and NEON have 32 vector registers, AVX2 has 16. It decides how large a tile of sums may be.
REGISTERS = 32 if llvm.get_host_cpu_features().get("avx512vl") or "aarch64" in llvm.get_default_triple() else 16

# Without instructions for them LLVM calls a library that a process may not have, and ends the process.
CONVERTS_FP16 = llvm.get_host_cpu_features().get("f16c", False) or "aarch64" in llvm.get_default_triple()

_F32 = ir.FloatType()
_I32 = ir.IntType(32)


# Decorated functions are Numba's; a type checker shall not hold them to the signature written.
intrinsic: Any = extending.intrinsic
_njit: Any = njit
jit = _njit(error_model="numpy", no_cpython_wrapper=True)  # a function of its own inside a kernel
inline = _njit(forceinline=True, error_model="numpy", no_cpython_wrapper=True)  # compiled into its caller


class VectorType(types.Type):
    def __init__(self, lanes: int) -> None:
        super().__init__(name=f"Vector({lanes})")
        self.lanes = lanes


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: VectorType) -> None:
        super().__init__(manager, vector, ir.VectorType(_F32, vector.lanes))


VECTOR = VectorType(WIDTH)
_VEC = ir.VectorType(_F32, WIDTH)
_IVEC = ir.VectorType(_I32, WIDTH)


@dataclass(frozen=True)
class Kind:
    """What numbers in memory are: a constant of the kernels, which are compiled for each."""

    name: str  # fp32, bf16, fp16 or int8
    size: int  # bytes


FP32, BF16, FP16, INT8 = Kind("fp32", 4), Kind("bf16", 2), Kind("fp16", 2), Kind("int8", 1)


class KindType(types.Type):
    def __init__(self, kind: Kind) -> None:
        super().__init__(name=f"Kind({kind.name})")
        self.kind = kind


register_model(KindType)(models.OpaqueModel)


@typeof_impl.register(Kind)
def _typeof_kind(value: Kind, context: Any) -> KindType:
    return KindType(value)


@lower_constant(KindType)
def _kind_constant(context: Any, builder: Any, kind: KindType, value: Kind) -> Any:
    return context.get_dummy_value()


# Memory


def _pointer(builder: ir.IRBuilder, address: Any, to: ir.Type) -> Any:
    return builder.inttoptr(address, to.as_pointer())


def _splat(builder: ir.IRBuilder, scalar: Any, lanes: int = WIDTH) -> Any:
    one = builder.insert_element(ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined), scalar, _I32(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes))


def _constant(element: ir.Type, value: Any, lanes: int) -> Any:
    return ir.Constant(ir.VectorType(element, lanes), [value] * lanes)


_STORED = {"fp32": _F32, "bf16": ir.IntType(16), "fp16": ir.HalfType(), "int8": ir.IntType(8)}


def _widen(builder: ir.IRBuilder, kind: Kind, raw: Any) -> Any:
    """Numbers as they lie in memory -> float32; scalars and vectors alike."""
    vector = isinstance(raw.type, ir.VectorType)
    lanes = raw.type.count if vector else 0

    def shaped(element: ir.Type) -> ir.Type:
        return ir.VectorType(element, lanes) if vector else element

    if kind.name == "fp32":
        return raw
    if kind.name == "fp16":
        return builder.fpext(raw, shaped(_F32))
    if kind.name == "int8":
        return builder.sitofp(raw, shaped(_F32))
    sixteen = _constant(_I32, 16, lanes) if vector else _I32(16)
    return builder.bitcast(builder.shl(builder.zext(raw, shaped(_I32)), sixteen), shaped(_F32))


def _narrow(builder: ir.IRBuilder, kind: Kind, x: Any) -> Any:
    """float32 -> numbers as they lie in memory, rounded to nearest, ties to even; scalars and vectors alike."""
    vector = isinstance(x.type, ir.VectorType)
    lanes = x.type.count if vector else 0

    def shaped(element: ir.Type) -> ir.Type:
        return ir.VectorType(element, lanes) if vector else element

    def number(value: int) -> Any:
        return _constant(_I32, value, lanes) if vector else _I32(value)

    if kind.name == "fp32":
        return x
    if kind.name == "fp16":
        return builder.fptrunc(x, shaped(ir.HalfType()))
    assert kind.name == "bf16", kind
    bits = builder.bitcast(x, shaped(_I32))
    odd = builder.and_(builder.lshr(bits, number(16)), number(1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, number(0x7FFF))), number(16))
    is_nan = builder.fcmp_unordered("uno", x, x)
    return builder.trunc(builder.select(is_nan, number(0x7FC0), rounded), shaped(ir.IntType(16)))


def _load_vector(builder: ir.IRBuilder, kind: Kind, address: Any, lanes: int = WIDTH) -> Any:
    raw = builder.load(_pointer(builder, address, ir.VectorType(_STORED[kind.name], lanes)), align=kind.size)
    return _widen(builder, kind, raw)


def _store_vector(builder: ir.IRBuilder, kind: Kind, address: Any, value: Any) -> None:
    raw = _narrow(builder, kind, value)
    builder.store(raw, _pointer(builder, address, raw.type), align=kind.size)


@intrinsic
def load(typing: Any, address: Any) -> Any:
    """WIDTH float32 numbers from memory."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _load_vector(builder, FP32, arguments[0])

    return VECTOR(types.int64), code


@intrinsic
def load_as(typing: Any, kind: Any, address: Any) -> Any:
    """WIDTH numbers of a kind from memory."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _load_vector(builder, signature.args[0].kind, arguments[1])

    return VECTOR(kind, types.int64), code


@intrinsic
def store(typing: Any, address: Any, vector: Any) -> Any:
    """A vector to memory, as float32."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _store_vector(builder, FP32, *arguments)
        return context.get_dummy_value()

    return types.void(types.int64, VECTOR), code


@intrinsic
def store_as(typing: Any, kind: Any, address: Any, vector: Any) -> Any:
    """A vector to memory, as numbers of a kind."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _store_vector(builder, signature.args[0].kind, *arguments[1:])
        return context.get_dummy_value()

    return types.void(kind, types.int64, VECTOR), code


@intrinsic
def load_scalar(typing: Any, kind: Any, address: Any) -> Any:
    """One number of a kind, as float32."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0].kind
        return _widen(builder, kind, builder.load(_pointer(builder, arguments[1], _STORED[kind.name])))

    return types.float32(kind, types.int64), code


@intrinsic
def store_scalar(typing: Any, kind: Any, address: Any, value: Any) -> Any:
    """One float32 to memory, as a number of a kind."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        raw = _narrow(builder, signature.args[0].kind, arguments[2])
        builder.store(raw, _pointer(builder, arguments[1], raw.type))
        return context.get_dummy_value()

    return types.void(kind, types.int64, types.float32), code


@intrinsic(prefer_literal=True)
def load_int(typing: Any, address: Any, size: Any) -> Any:
    """A signed integer of 1, 4 or 8 bytes (a literal), as int64."""
    if not isinstance(size, types.IntegerLiteral):
        return None
    bits = ir.IntType(8 * size.literal_value)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        raw = builder.load(_pointer(builder, arguments[0], bits))
        return raw if bits.width == 64 else builder.sext(raw, ir.IntType(64))

    return types.int64(types.int64, size), code


@intrinsic
def store_int(typing: Any, address: Any, value: Any) -> Any:
    """An int64 to memory."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[1], _pointer(builder, arguments[0], ir.IntType(64)))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), code


@intrinsic
def size_of(typing: Any, kind: Any) -> Any:
    """Bytes of one number of a kind."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.IntType(64)(signature.args[0].kind.size)

    return types.int64(kind), code


@intrinsic
def prefetch(typing: Any, address: Any) -> Any:
    """Ask for the cache line of an address, to be read soon; any address is harmless."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [builder.inttoptr(arguments[0], pointer), _I32(0), _I32(3), _I32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), code


@intrinsic
def fetch_add(typing: Any, address: Any, value: Any) -> Any:
    """Add to an int64 shared by threads; returns what it was."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", _pointer(builder, arguments[0], ir.IntType(64)), arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), code


# Arithmetic


def _call(builder: Any, name: str, *arguments: Any) -> Any:
    kind = ir.FunctionType(arguments[0].type, [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{WIDTH}f32")
    return builder.call(function, arguments)


@intrinsic
def splat(typing: Any, scalar: Any) -> Any:
    """A number in every lane."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _splat(builder, arguments[0])

    return VECTOR(types.float32), code


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _call(builder, "fma", *arguments)

    return VECTOR(VECTOR, VECTOR, VECTOR), code


def _elementwise(name: str, doc: str) -> Any:
    def word(typing: Any, a: Any, b: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return getattr(builder, name)(*arguments)

        return VECTOR(VECTOR, VECTOR), code

    word.__doc__ = doc
    return intrinsic(word)


_add, _subtract = _elementwise("fadd", "a + b"), _elementwise("fsub", "a - b")
_multiply, _divide = _elementwise("fmul", "a * b"), _elementwise("fdiv", "a / b")


def _spell(symbol: Any, word: Any) -> None:
    """Let kernels write a + b for vectors."""

    @overload(symbol)
    def _operator(a, b):
        if isinstance(a, VectorType) and isinstance(b, VectorType):
            return lambda a, b: word(a, b)
        return None


for _symbol, _word in ((operator.add, _add), (operator.sub, _subtract), (operator.mul, _multiply),
                       (operator.truediv, _divide)):  # fmt: skip
    _spell(_symbol, _word)


@intrinsic
def maximum(typing: Any, a: Any, b: Any) -> Any:
    """The larger, lane by lane; b where a is NaN."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, b = arguments
        return builder.select(builder.fcmp_ordered(">", a, b), a, b)

    return VECTOR(VECTOR, VECTOR), code


@intrinsic
def where_less(typing: Any, a: Any, b: Any, yes: Any, no: Any) -> Any:
    """yes where a < b, else no (also where one is NaN), lane by lane."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        a, b, yes, no = arguments
        return builder.select(builder.fcmp_ordered("<", a, b), yes, no)

    return VECTOR(VECTOR, VECTOR, VECTOR, VECTOR), code


@intrinsic
def nearest(typing: Any, x: Any) -> Any:
    """Rounded to the nearest integer, as float32."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _call(builder, "rint", arguments[0])

    return VECTOR(VECTOR), code


@intrinsic
def times_power_of_two(typing: Any, x: Any, n: Any) -> Any:
    """x * 2**n for integral n, where x and the result are normal numbers: n is added to the exponent's bits."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, n = arguments
        shifted = builder.shl(builder.fptosi(n, _IVEC), _constant(_I32, 23, WIDTH))
        return builder.bitcast(builder.add(builder.bitcast(x, _IVEC), shifted), _VEC)

    return VECTOR(VECTOR, VECTOR), code


def _exp2_coefficients(degree: int = 6) -> tuple[float, ...]:
    """2**f on [-1/2, 1/2], fitted in float64 for the relative error at Chebyshev's points; highest power last."""
    points = 0.5 * np.cos((2 * np.arange(4000) + 1) * np.pi / 8000)
    chebyshev = np.polynomial.Chebyshev.fit(points, np.exp2(points), degree, domain=[-0.5, 0.5], w=np.exp2(-points))
    return tuple(float(c) for c in chebyshev.convert(kind=np.polynomial.Polynomial).coef)


_C0, _C1, _C2, _C3, _C4, _C5, _C6 = (np.float32(c) for c in _exp2_coefficients())


@inline
def exp2(x):
    """2**x for x <= 127; 0 below -126 and for -inf; NaN stays. Relative error below 2e-7."""
    n = nearest(maximum(splat(np.float32(-127.0)), x))
    f = x - n
    p = fma(splat(_C6), f, splat(_C5))
    p = fma(p, f, splat(_C4))
    p = fma(p, f, splat(_C3))
    p = fma(p, f, splat(_C2))
    p = fma(p, f, splat(_C1))
    p = fma(p, f, splat(_C0))
    return where_less(x, splat(np.float32(-126.0)), splat(np.float32(0.0)), times_power_of_two(p, n))


_2_LOG2_E = np.float32(2.0 / np.log(2.0))


@inline
def tanh(x):
    """(e^2x - 1) / (e^2x + 1), and a polynomial near 0 where that would cancel. Absolute error below 2e-7."""
    limited = where_less(x, splat(np.float32(-10.0)), splat(np.float32(-10.0)), x)
    limited = where_less(splat(np.float32(10.0)), limited, splat(np.float32(10.0)), limited)
    power = exp2(limited * splat(_2_LOG2_E))
    one = splat(np.float32(1.0))
    far = (power - one) / (power + one)
    square = x * x
    near = fma(square, splat(np.float32(62.0 / 2835.0)), splat(np.float32(-17.0 / 315.0)))
    near = fma(square, near, splat(np.float32(2.0 / 15.0)))
    near = fma(square, near, splat(np.float32(-1.0 / 3.0)))
    near = fma(square * x, near, x)
    return where_less(square, splat(np.float32(0.04)), near, far)


@intrinsic(prefer_literal=True)
def swap(typing: Any, vector: Any, distance: Any) -> Any:
    """Lane i gets lane i XOR distance (a literal power of two); a distance of WIDTH or more changes nothing."""
    if not isinstance(distance, types.IntegerLiteral):
        return None
    step = distance.literal_value

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes = [lane ^ step if step < WIDTH else lane for lane in range(WIDTH)]
        return builder.shuffle_vector(arguments[0], arguments[0], ir.Constant(ir.VectorType(_I32, WIDTH), lanes))

    return VECTOR(VECTOR, distance), code


# Tiles


def _tile_type(rows: int, columns: int) -> Any:
    return types.UniTuple(types.UniTuple(VECTOR, columns), rows)


def _read(builder: Any, tile: Any, row: int, column: int) -> Any:
    return builder.extract_value(tile, [row, column])


@intrinsic(prefer_literal=True)
def zeros(typing: Any, rows: Any, columns: Any) -> Any:
    """A tile of zeros; rows and columns are literals."""
    if not isinstance(rows, types.IntegerLiteral) or not isinstance(columns, types.IntegerLiteral):
        return None
    tile = _tile_type(rows.literal_value, columns.literal_value)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(context.get_value_type(signature.return_type), None)

    return tile(rows, columns), code


@intrinsic
def add_tile(typing: Any, tile: Any, address: Any, stride: Any) -> Any:
    """A tile plus one of its shape from memory; stride: bytes from row to row."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile, address, stride = arguments
        for i in range(signature.args[0].count):
            row = builder.add(address, builder.mul(stride, ir.IntType(64)(i)))
            for j in range(signature.args[0].dtype.count):
                other = _load_vector(builder, FP32, builder.add(row, ir.IntType(64)(j * VECTOR_BYTES)))
                tile = builder.insert_value(tile, builder.fadd(_read(builder, tile, i, j), other), [i, j])
        return tile

    return tile(tile, types.int64, types.int64), code


@intrinsic
def store_tile(typing: Any, tile: Any, address: Any, stride: Any) -> Any:
    """A tile to memory; stride: bytes from row to row."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile, address, stride = arguments
        for i in range(signature.args[0].count):
            row = builder.add(address, builder.mul(stride, ir.IntType(64)(i)))
            for j in range(signature.args[0].dtype.count):
                place = builder.add(row, ir.IntType(64)(j * VECTOR_BYTES))
                _store_vector(builder, FP32, place, _read(builder, tile, i, j))
        return context.get_dummy_value()

    return types.void(tile, types.int64, types.int64), code


@intrinsic(prefer_literal=True)
def rank_one(typing: Any, kind: Any, tile: Any, a: Any, step: Any, b: Any) -> Any:
    """tile[i][j] += a[i * step] * b[j]: the one step of every matrix product here.

    a: address of float32 scalars, `step` (a literal) apart; b: address of a row of numbers of a kind.
    """
    if not isinstance(step, types.IntegerLiteral):
        return None
    apart = 4 * step.literal_value

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, tile, a, _, b = arguments
        stored = signature.args[0].kind
        rows, columns = signature.args[1].count, signature.args[1].dtype.count
        vector_bytes = stored.size * WIDTH
        row = [_load_vector(builder, stored, builder.add(b, ir.IntType(64)(j * vector_bytes))) for j in range(columns)]
        for i in range(rows):
            scalar = builder.load(_pointer(builder, builder.add(a, ir.IntType(64)(i * apart)), _F32))
            factor = _splat(builder, scalar)
            for j in range(columns):
                total = _call(builder, "fma", factor, row[j], _read(builder, tile, i, j))
                tile = builder.insert_value(tile, total, [i, j])
        return tile

    return tile(kind, tile, types.int64, step, types.int64), code


@intrinsic(prefer_literal=True)
def rank_shared(typing: Any, tile: Any, a: Any, step: Any, b: Any, terms: Any) -> Any:
    """tile[i][lane] += a[i * step + lane % terms] * b[lane]: `rank_one` where a vector's lanes share `terms` products.

    A tile of few rows of queries leaves lanes idle; so WIDTH // terms queries lie in a vector, each in `terms`
    neighbouring lanes that sum every terms-th product. `fold` adds them up. tile has one column; step, terms: literals.
    """
    if not isinstance(step, types.IntegerLiteral) or not isinstance(terms, types.IntegerLiteral):
        return None
    apart, shared = 4 * step.literal_value, terms.literal_value

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        tile, a, _, b, _ = arguments
        row = _load_vector(builder, FP32, b)
        pattern = ir.Constant(ir.VectorType(_I32, WIDTH), [lane % shared for lane in range(WIDTH)])
        for i in range(signature.args[0].count):
            few = _load_vector(builder, FP32, builder.add(a, ir.IntType(64)(i * apart)), shared)
            factor = builder.shuffle_vector(few, few, pattern)
            tile = builder.insert_value(tile, _call(builder, "fma", factor, row, _read(builder, tile, i, 0)), [i, 0])
        return tile

    return tile(tile, types.int64, step, types.int64, terms), code


@intrinsic(prefer_literal=True)
def fold(typing: Any, tile: Any, terms: Any) -> Any:
    """Add up what `rank_shared` left in `terms` lanes each.

    From rows (one per key i) with lanes (query, term) to rows // terms rows with lanes (key, query): the sums, keys
    outermost, so that they lie in memory as a matrix [key][query]. A tree of pairwise sums, no horizontal additions.
    """
    if not isinstance(terms, types.IntegerLiteral):
        return None
    shared = terms.literal_value
    keys = tile.count
    result = _tile_type(keys // shared, 1)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def shuffle(x: Any, y: Any, lanes: list[int]) -> Any:
            return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(_I32, WIDTH), lanes))

        # Lane (query, j) of x and y holds the j-th partial sum of two keys; after a step, those lanes whose j has the
        # bit `distance` hold y's sums with the lanes that differ in it, the others x's. At the end j counts the keys.
        vectors = [_read(builder, arguments[0], key, 0) for key in range(keys)]
        distance = 1
        while distance < shared:
            ours = [lane + WIDTH - distance if lane & distance else lane for lane in range(WIDTH)]
            theirs = [lane + WIDTH if lane & distance else lane + distance for lane in range(WIDTH)]
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [builder.fadd(shuffle(x, y, ours), shuffle(x, y, theirs)) for x, y in pairs]
            distance *= 2
        queries = WIDTH // shared
        order = [lane % queries * shared + lane // queries for lane in range(WIDTH)]
        tile = ir.Constant(context.get_value_type(signature.return_type), ir.Undefined)
        for i, vector in enumerate(vectors):
            tile = builder.insert_value(tile, shuffle(vector, vector, order), [i, 0])
        return tile

    return result(tile, terms), code
