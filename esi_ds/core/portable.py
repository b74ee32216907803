"""Logarithm and cosine in float64 with the same bits on every device.

torch's own differ in the last bit between CPUs and GPUs, and between CPUs. These use additions, products, quotients
and selections of tensors only, each of which IEEE 754 rounds in one way, and no two of which torch fuses: never divide
by a number, which CUDA turns into a product. The polynomials are those of fdlibm (Sun Microsystems, 1993: e_log.c,
k_cos.c, k_sin.c, e_rem_pio2.c); errors stay below one unit in the last place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LN2_HIGH, LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
LOG = (
    6.666666666666735130e-01,
    3.999999999940941908e-01,
    2.857142874366239149e-01,
    2.222219843214978396e-01,
    1.818357216161805012e-01,
    1.531383769920937332e-01,
    1.479819860511658591e-01,
)
TWO_OVER_PI = 6.36619772367581382433e-01
HALF_PI_HIGH, HALF_PI_LOW = 1.57079632673412561417e00, 6.07710050650619224932e-11  # of 33 bits, and the rest
COSINE = (
    4.16666666666666019037e-02,
    -1.38888888888741095749e-03,
    2.48015872894767294178e-05,
    -2.75573143513906633035e-07,
    2.08757232129817482790e-09,
    -1.13596475577881948265e-11,
)
SINE = (
    -1.66666666666666324348e-01,
    8.33333333332248946124e-03,
    -1.98412698298579493134e-04,
    2.75573137070700676789e-06,
    -2.50507602534068634195e-08,
    1.58969099521155010221e-10,
)


def _polynomial(values: Tensor, coefficients: Sequence[float]) -> Tensor:
    """c₀·z + c₁·z² + … by Horner's rule."""
    total = values * coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        total = (total + coefficient) * values
    return total


def log(values: Tensor) -> Tensor:
    """Natural logarithm of normal, positive float64 numbers."""
    mantissa, exponent = torch.frexp(values)  # mantissa in [1/2, 1)
    is_small = mantissa < 0.5**0.5
    mantissa = torch.where(is_small, mantissa + mantissa, mantissa)
    exponent = (exponent - is_small.to(exponent.dtype)).double()
    part = mantissa - 1.0
    ratio = part / (part + 2.0)
    half_square = part * part * 0.5
    rest = ratio * (half_square + _polynomial(ratio * ratio, LOG)) + exponent * LN2_LOW
    return exponent * LN2_HIGH - ((half_square - rest) - part)


def cos(angles: Tensor) -> Tensor:
    """Cosine of float64 numbers in [0, 2π]."""
    quarter = (angles * TWO_OVER_PI).round()
    angles = (angles - quarter * HALF_PI_HIGH) - quarter * HALF_PI_LOW  # in [−π/4, π/4]
    square = angles * angles
    half = square * 0.5
    cosine = 1.0 - half
    cosine = cosine + (((1.0 - cosine) - half) + square * _polynomial(square, COSINE))
    sine = angles + angles * _polynomial(square, SINE)
    turned = torch.where(quarter % 2 == 0, cosine, sine)
    return torch.where((quarter == 1) | (quarter == 2), -turned, turned)
