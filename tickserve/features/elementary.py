"""exp and log as plain arithmetic: the same bits in a vectorised loop, in a lone call, and on every machine.

A maths library gives other bits in its vector functions than in its scalar ones, and others in its next release.
These two are additions, multiplications and shifts of bits, so the compiler may vectorise them and changes nothing.
`exp_minus` is within three units in the last place over the range stated, `log_positive` within one.
"""

# numpy types an element of a float64 array as Any; these functions return floats.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from tickserve.features.jit import inlined, reinterpreted

# Below this a price or a size is none; keeps the logarithm clear of subnormal numbers.
SMALLEST: Final = 1e-300
# Beyond exp(-460), about 1e-200, nothing of the past counts.
FADED: Final = 460.0

_LOG2_E: Final = 1.4426950408889634
_LN2_HIGH: Final = 6.93147180369123816490e-01
_LN2_LOW: Final = 1.90821492927058770002e-10
# Adding 1.5 * 2^52 rounds to an integer, which then stands in the low bits.
_ROUND: Final = 6755399441055744.0
_BIAS: Final = np.uint64(1023)
_MANTISSA_BITS: Final = np.uint64(52)
_MANTISSA: Final = np.uint64(0x000F_FFFF_FFFF_FFFF)
_ROOT_HALF: Final = np.uint64(0x3FE6_A09E_667F_3BCD)
_TO_ONE: Final = np.uint64(0x3FF0_0000_0000_0000 - 0x3FE6_A09E_667F_3BCD)
_TWO_52_BITS: Final = np.uint64(0x4330_0000_0000_0000)
_TWO_52: Final = 4503599627370496.0 + 1023.0

_bits_of: Any = reinterpreted("float64", "uint64")
_float_of: Any = reinterpreted("uint64", "float64")


@inlined
def exp_minus(y: float) -> float:
    """exp(-y) for y >= 0; 0 beyond FADED. Taylor's series after taking out the nearest power of two."""
    t = min(y, FADED) * -_LOG2_E + _ROUND
    k = t - _ROUND
    r = (-min(y, FADED) - k * _LN2_HIGH) - k * _LN2_LOW
    q = r * r
    odd = 1.0 / 6 + q * (1.0 / 120 + q * (1.0 / 5040 + q * (1.0 / 362880 + q * (1.0 / 39916800))))
    even = 0.5 + q * (1.0 / 24 + q * (1.0 / 720 + q * (1.0 / 40320 + q * (1.0 / 3628800 + q * (1.0 / 479001600)))))
    value = 1.0 + (r + q * (even + r * odd))
    scale = _float_of((_bits_of(t) + _BIAS) << _MANTISSA_BITS)
    return value * scale if y < FADED else 0.0


@inlined
def log_positive(x: float) -> float:
    """Natural logarithm from SMALLEST to the largest finite number, else NaN. The method of fdlibm's `log`."""
    bits = _bits_of(x) + _TO_ONE
    k = _float_of((bits >> _MANTISSA_BITS) | _TWO_52_BITS) - _TWO_52
    f = _float_of((bits & _MANTISSA) + _ROOT_HALF) - 1.0
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    even = w * (3.999999999940941908e-01 + w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01))
    odd = 2.857142874366239149e-01 + w * (1.818357216161805012e-01 + w * 1.479819860511658591e-01)
    odd = z * (6.666666666666735130e-01 + w * odd)
    half = 0.5 * f * f
    value = k * _LN2_HIGH - ((half - (s * (half + (even + odd)) + k * _LN2_LOW)) - f)
    return value if (x >= SMALLEST) & (x <= 1.7976931348623157e308) else math.nan
