"""Vectors of numbers inside compiled loops, and how such loops are compiled.

What a compiler makes of plain loops over a few states is several times slower than vectors, and may sum in another
order from one loop to the next; this way results are the same to the bit. Kernels that call what stands here are kept
on disk by the time stamp of their own file: whoever edits this one removes ``__pycache__``.
"""

import math
from collections.abc import Callable
from functools import partial
from inspect import unwrap
from typing import Any

import numba
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba.core import types
from numba.extending import intrinsic, models, register_model

#: Numbers of a vector. Four doubles fill a register of AVX2; narrower ones are ganged, wider ones are rarely faster.
LANES = 4
#: Numbers of a wide one, for loops that do nothing but multiply and add: what the machine's own registers hold.
WIDE = 8 if get_host_cpu_features().get("avx512f") else LANES
#: Exponentials below this become zero, so that products of messages are never denormal.
FLUSH = 1e-160


def _compiled(function: Callable[..., Any], **options: Any) -> Any:
    # What checks annotations at run time wraps functions; numba reads the bytecode of the one inside.
    return numba.njit(nogil=True, error_model="numpy", **options)(unwrap(function))


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """A function for kernels alone to call: without the wrappers that Python needs it takes a third less to compile."""
    return _compiled(function, no_cpython_wrapper=True, no_cfunc_wrapper=True, **options)


def inlined(function: Callable[..., Any]) -> Any:
    """A function that becomes part of each kernel that calls it."""
    return compiled(function, forceinline=True)


def kernel(function: Callable[..., Any]) -> Any:
    """Compile at the first call, once per machine where there is a place to keep the result."""
    try:
        return _compiled(function, cache=True)
    except RuntimeError:  # no directory for it can be written to
        return _compiled(function)


def operation(function: Callable[..., Any]) -> Any:
    """What kernels call and the function emits instructions for."""
    return intrinsic(unwrap(function))


class _LanesType(types.Type):
    def __init__(self, width: int) -> None:
        self.width = width
        super().__init__(name=f"lanes{width}")


lanes, wide = _LanesType(LANES), _LanesType(WIDE)
_INDEX = ir.IntType(32)


def _floats(width: int) -> ir.VectorType:
    return ir.VectorType(ir.DoubleType(), width)


@register_model(_LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any):
        super().__init__(manager, kind, _floats(kind.width))


def _constant(like: Any, value: float) -> ir.Constant:
    """A number in all lanes of a vector like another."""
    return ir.Constant(like.type, [value] * like.type.count)


def _integers(like: Any) -> ir.VectorType:
    return ir.VectorType(ir.IntType(64), like.type.count)


def _shuffled(builder: Any, a: Any, b: Any, *places: int) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INDEX, len(places)), list(places)))


def _address(context: Any, builder: Any, kind: Any, array: Any, index: Any, width: int) -> tuple[Any, Any]:
    """A pointer to ``width`` numbers of a flat array, and their type."""
    data = builder.gep(context.make_array(kind)(context, builder, array).data, [index])
    numbers = ir.VectorType(context.get_value_type(kind.dtype), width)
    return builder.bitcast(data, numbers.as_pointer()), numbers


def _pointwise(build: Callable[..., Any], operands: int) -> Any:
    """An operation on vectors of one width from what emits it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return build(builder, *arguments)

    if operands == 1:
        return operation(lambda typing, a: (a(a), generate))
    if operands == 2:
        return operation(lambda typing, a, b: (a(a, b), generate))
    if operands == 3:
        return operation(lambda typing, a, b, c: (a(a, b, c), generate))
    return operation(lambda typing, a, b, c, d: (a(a, b, c, d), generate))


def _emit_fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    # "contract" lets the two become one instruction where there is one; nothing else may be reordered.
    return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))


def _emit_reduced(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fsub(c, builder.fmul(a, b, flags=("contract",)), flags=("contract",))


def _emit_sums(builder: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    ab = builder.fadd(_shuffled(builder, a, b, 0, 4, 2, 6), _shuffled(builder, a, b, 1, 5, 3, 7))
    cd = builder.fadd(_shuffled(builder, c, d, 0, 4, 2, 6), _shuffled(builder, c, d, 1, 5, 3, 7))
    return builder.fadd(_shuffled(builder, ab, cd, 0, 1, 4, 5), _shuffled(builder, ab, cd, 2, 3, 6, 7))


def _emit_lane(lane: int) -> Callable[..., Any]:
    """The numbers of one lane of four vectors; what two lanes share the compiler finds."""
    one, two = ((0, 4, 2, 6), (1, 5, 3, 7))[lane % 2], ((0, 1, 4, 5), (2, 3, 6, 7))[lane // 2]

    def build(builder: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        return _shuffled(builder, _shuffled(builder, a, b, *one), _shuffled(builder, c, d, *one), *two)

    return build


#: High part of log 2, of few digits so that its multiples are exact, and the rest.
_LOG2 = float.fromhex("0x0.B17217F7Dp0"), float.fromhex("0x0.1CF79ABC9E3B398p-36")
#: Added to a number, 1.5 · 2^52 leaves the nearest integer in the lowest digits of the sum.
_ROUND = 1.5 * 2.0**52


def _emit_exponential(builder: Any, x: Any) -> Any:
    # x = n log 2 + r with |r| ≤ log 2 / 2, so that exp x = 2^n · (Taylor's polynomial of degree 12 at r, to 2e-16).
    number, integers = partial(_constant, x), _integers(x)
    rounded = _emit_fused(builder, x, number(1 / math.log(2)), number(_ROUND))
    n = builder.fsub(rounded, number(_ROUND))
    rest = _emit_fused(builder, n, number(-_LOG2[0]), x)
    rest = _emit_fused(builder, n, number(-_LOG2[1]), rest)
    value = number(1 / math.factorial(12))
    for degree in range(11, -1, -1):
        value = _emit_fused(builder, value, rest, number(1 / math.factorial(degree)))
    power = builder.shl(builder.bitcast(rounded, integers), ir.Constant(integers, [52] * integers.count))
    value = builder.bitcast(builder.add(builder.bitcast(value, integers), power), x.type)
    small = builder.fcmp_ordered("<", x, number(math.log(FLUSH)))
    value = builder.select(small, number(0.0), value)
    return builder.select(builder.fcmp_unordered("uno", x, x), x, value)


#: Where the exponents of numbers from √½ to √2 begin to be zero, as integers see doubles; and 1.5 · 2^52 to them.
_HALF_ROOT, _ROUND_BITS, _ONE_BITS = 0x3FE6A09E667F3BCD, 0x4338000000000000, 1023


def _emit_logarithm(builder: Any, x: Any, lost: Any = None) -> Any:
    # x = 2^n m with m from √½ to √2, and log m = 2 artanh s = 2 Σ s^(2j+1) / (2j + 1) at s = (m − 1) / (m + 1), of
    # which eleven terms are enough to 1e-17. What was lost when x was rounded joins m − 1.
    number, integers = partial(_constant, x), _integers(x)

    def whole(value: int) -> Any:
        return ir.Constant(integers, [value] * integers.count)

    bits = builder.bitcast(x, integers)
    n = builder.ashr(builder.sub(bits, whole(_HALF_ROOT)), whole(52))
    m = builder.bitcast(builder.sub(bits, builder.shl(n, whole(52))), x.type)
    rest = builder.fsub(m, number(1.0))
    if lost is not None:
        scale = builder.bitcast(builder.shl(builder.sub(whole(_ONE_BITS), n), whole(52)), x.type)
        rest = _emit_fused(builder, lost, scale, rest)
    s = builder.fdiv(rest, builder.fadd(rest, number(2.0)))
    square = builder.fmul(s, s)
    value = number(2 / 21)
    for j in range(9, 0, -1):
        value = _emit_fused(builder, value, square, number(2 / (2 * j + 1)))
    value = builder.fmul(value, square)
    n = builder.fsub(builder.bitcast(builder.add(n, whole(_ROUND_BITS)), x.type), number(_ROUND))
    value = _emit_fused(builder, value, s, _emit_fused(builder, n, number(_LOG2[1]), builder.fadd(s, s)))
    value = _emit_fused(builder, n, number(_LOG2[0]), value)
    return builder.select(builder.fcmp_unordered("uno", x, x), x, value)


def _emit_log1p(builder: Any, x: Any) -> Any:
    one = _constant(x, 1.0)
    above = builder.fadd(x, one)
    return _emit_logarithm(builder, above, builder.fsub(x, builder.fsub(above, one)))


plus = _pointwise(lambda builder, a, b: builder.fadd(a, b), 2)
minus = _pointwise(lambda builder, a, b: builder.fsub(a, b), 2)
times = _pointwise(lambda builder, a, b: builder.fmul(a, b), 2)
over = _pointwise(lambda builder, a, b: builder.fdiv(a, b), 2)
fused = _pointwise(_emit_fused, 3)  # a b + c
reduced = _pointwise(_emit_reduced, 3)  # c − a b
where_less = _pointwise(  # c where a < b, else d
    lambda builder, a, b, c, d: builder.select(builder.fcmp_ordered("<", a, b), c, d), 4
)
larger = _pointwise(lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b), 2)
smaller = _pointwise(lambda builder, a, b: builder.select(builder.fcmp_ordered("<", a, b), a, b), 2)
unless_below = _pointwise(  # a, or zero where a < b
    lambda builder, a, b: builder.select(builder.fcmp_ordered("<", a, b), _constant(a, 0.0), a), 2
)
tainted = _pointwise(  # b where it is NaN, else a
    lambda builder, a, b: builder.select(builder.fcmp_unordered("uno", b, b), b, a), 2
)
exponential = _pointwise(_emit_exponential, 1)  # of what is not positive
logarithm = _pointwise(_emit_logarithm, 1)  # of what is normal and positive
log1p = _pointwise(_emit_log1p, 1)  # of what is neither negative nor infinite
lane0, lane1, lane2, lane3 = (_pointwise(_emit_lane(lane), 4) for lane in range(4))  # rows of four columns
sums = _pointwise(_emit_sums, 4)  # the total of each of four vectors


def _loading(kind: _LanesType) -> Any:
    """A vector of consecutive numbers, as doubles."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = signature.args[0]
        address, numbers = _address(context, builder, array, arguments[0], arguments[1], kind.width)
        value = builder.load(address, align=array.dtype.bitwidth // 8)
        return value if numbers == _floats(kind.width) else builder.fpext(value, _floats(kind.width))

    return operation(lambda typing, array, index: (kind(array, types.intp), generate))


load, load_wide = _loading(lanes), _loading(wide)


@operation
def store(typing, array, index, value):
    """Write a vector to consecutive places, in the array's type."""

    def generate(context, builder, signature, arguments):
        address, numbers = _address(context, builder, array, arguments[0], arguments[1], value.width)
        new = arguments[2] if numbers == _floats(value.width) else builder.fptrunc(arguments[2], numbers)
        builder.store(new, address, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), generate


def _repeated(builder: Any, number: Any, width: int) -> Any:
    empty = ir.Constant(_floats(width), ir.Undefined)
    return _shuffled(builder, builder.insert_element(empty, number, _INDEX(0)), empty, *[0] * width)


def _splatting(kind: _LanesType) -> Any:
    """A vector of one number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _repeated(builder, arguments[0], kind.width)

    return operation(lambda typing, value: (kind(types.float64), generate))


splat, splat_wide = _splatting(lanes), _splatting(wide)


@operation
def spread_wide(typing, array, index):
    """A wide vector of the one number at a place of an array of doubles."""

    def generate(context, builder, signature, arguments):
        address, _ = _address(context, builder, array, arguments[0], arguments[1], 1)
        address = builder.bitcast(address, ir.DoubleType().as_pointer())
        return _repeated(builder, builder.load(address), WIDE)

    return wide(array, types.intp), generate


@operation
def prefetch(typing, array, index):
    """Have the memory at a place on its way to the caches."""

    def generate(context, builder, signature, arguments):
        address, _ = _address(context, builder, array, arguments[0], arguments[1], 1)
        address = builder.bitcast(address, ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [address.type, _INDEX, _INDEX, _INDEX])
        function = builder.module.declare_intrinsic("llvm.prefetch", [address.type], kind)
        builder.call(function, [address, _INDEX(0), _INDEX(2), _INDEX(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@operation
def gather(typing, array, a, b, c, d):
    """A vector of the numbers at four places, as doubles."""

    def generate(context, builder, signature, arguments):
        value = ir.Constant(_floats(LANES), ir.Undefined)
        for lane in range(LANES):
            address, _ = _address(context, builder, array, arguments[0], arguments[1 + lane], 1)
            address = builder.bitcast(address, context.get_value_type(array.dtype).as_pointer())
            number = builder.load(address)
            number = number if number.type == ir.DoubleType() else builder.fpext(number, ir.DoubleType())
            value = builder.insert_element(value, number, _INDEX(lane))
        return value

    return lanes(array, types.intp, types.intp, types.intp, types.intp), generate


@operation
def less(typing, a, b):
    """A bit for each number of one vector that is less than that of another."""

    def generate(context, builder, signature, arguments):
        bits = builder.bitcast(builder.fcmp_ordered("<", *arguments), ir.IntType(LANES))
        return builder.zext(bits, ir.IntType(64))

    return types.int64(lanes, lanes), generate


@operation
def equal(typing, a, b):
    """A bit for each pair of equal numbers."""

    def generate(context, builder, signature, arguments):
        bits = builder.bitcast(builder.fcmp_ordered("==", *arguments), ir.IntType(LANES))
        return builder.zext(bits, ir.IntType(64))

    return types.int64(lanes, lanes), generate


@operation
def lowest(typing, bits):
    """The place of the lowest bit that is set."""

    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), generate


def _folded(combine: Callable[..., Any]) -> Any:
    """A number from a vector by halving it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (value,) = arguments
        width = value.type.count
        while width > 1:
            width //= 2
            low = _shuffled(builder, value, value, *range(width))
            value = combine(builder, low, _shuffled(builder, value, value, *range(width, 2 * width)))
        return builder.extract_element(value, _INDEX(0))

    return operation(lambda typing, a: (types.float64(a), generate))


total = _folded(lambda builder, a, b: builder.fadd(a, b))
largest = _folded(lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))
smallest = _folded(lambda builder, a, b: builder.select(builder.fcmp_ordered("<", a, b), a, b))
