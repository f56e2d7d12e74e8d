"""Elementwise functions that run inside the Triton kernels: activations, rounding, encoding.

All work on fp32 blocks with arithmetic that every architecture and the interpreter have, so the
same source gives the same bits everywhere. Encoders return int32 codes.
"""

from gesso_kernels.triton_import import tl, triton


@triton.jit
def silu(x):  # type: ignore[no-untyped-def]
    """x · sigmoid(x)."""
    # The bound keeps the exponential finite; the quotient is below 1e-32 there.
    return x / (1.0 + tl.exp(tl.minimum(-x, 80.0)))


@triton.jit
def gelu_tanh(x):  # type: ignore[no-untyped-def]
    """½x·(1 + tanh(√(2/π)(x + 0.044715x³)))."""
    # ½(1 + tanh u) is sigmoid(2u), which has no quotient of two infinite exponentials.
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(tl.minimum(-2.0 * u, 80.0)))


@triton.jit
def rne(x):  # type: ignore[no-untyped-def]
    """The nearest integer, half to even, int32; |x| < 2²².

    Adding 1.5·2²³ leaves no bits for the fraction, so the adder rounds, to even; the integer then
    stands in the low bits. It would be wrong if the addition were fused with a product that made x.
    """
    return (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def e2m1_encode(x, unit):  # type: ignore[no-untyped-def]
    """Nearest e2m1 code 0..15 of x / unit, unit > 0, half to even; beyond ±6 saturates, no −0.

    Counts the middles between neighbours that |x| passes. The products are exact for an e4m3 unit,
    whereas a fast division would miss the ties, which 16-bit inputs often hit.
    """
    magnitude = tl.abs(x)
    index = (magnitude > 0.25 * unit).to(tl.int32)
    index += (magnitude >= 0.75 * unit).to(tl.int32)
    index += (magnitude > 1.25 * unit).to(tl.int32)
    index += (magnitude >= 1.75 * unit).to(tl.int32)
    index += (magnitude > 2.5 * unit).to(tl.int32)
    index += (magnitude >= 3.5 * unit).to(tl.int32)
    index += (magnitude > 5.0 * unit).to(tl.int32)
    return tl.where((x < 0.0) & (index > 0), index + 8, index)


@triton.jit
def e4m3_encode(x):  # type: ignore[no-untyped-def]
    """Nearest e4m3 code 0..255 (float8_e4m3fn), half to even; beyond ±448 saturates."""
    magnitude = tl.minimum(tl.abs(x), 448.0)
    # Keep three bits of the mantissa: add a bit less than half their unit, and their last bit, so
    # that a tie goes up only from an odd one. The exponent bias is 127 in fp32 and 7 here.
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2⁻⁶ the steps no longer shrink; they are 2⁻⁹.
    code = tl.where(magnitude < 0.015625, rne(512.0 * magnitude), normal)
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return code | sign


@triton.jit
def e4m3_decode(code):  # type: ignore[no-untyped-def]
    """fp32 value of e4m3 codes without sign, 0..126."""
    normal = ((code + (120 << 3)) << 20).to(tl.float32, bitcast=True)
    return tl.where(code < 8, code.to(tl.float32) * 0.001953125, normal)
