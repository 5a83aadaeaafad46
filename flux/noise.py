"""The normal numbers that PyTorch's CPU generator makes of a seed, for seeds from diffusers and ComfyUI.

Equal to `torch.randn` in float32 to the bit, as PyTorch computes on x86 with AVX2 (and AVX-512). There the
logarithm, sine and cosine are polynomials (Cephes, in Pommier's arrangement for vectors) whose compiler fuses
multiplication and addition; on other machines it calls the C library's and differs in some last bits.
"""

import numpy as np

_LOG = (
    *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1),
    *(-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
)
_LOG_2 = (0.693359375, -2.12194440e-4)  # in two parts, the first short enough that multiples are exact
_COSINE = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
_SINE = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_QUARTER_PI = (
    -0.78515625,
    -2.4187564849853515625e-4,
    -3.77489497744594108e-8,
)  # its negative, in three parts


def randn(seed: int, count: int) -> np.ndarray:
    """What `torch.randn(count)` gives after `torch.manual_seed(seed)` on a CPU: (count,), float32.

    seed: 0 to 2**64 - 1, of which the generator takes the low 32 bits.
    """
    words = _Words(seed)
    if count < 16:
        return _randn_one_by_one(words, count)
    numbers = _box_muller(words.uniform(count)[: count // 16 * 16])
    if rest := count % 16:  # the last 16 are drawn anew, over those that are there
        numbers = np.concatenate([numbers[: rest - 16], _box_muller(words.uniform(16))])
    return numbers


class _Words:
    """The Mersenne twister's 32-bit words in their order. NumPy's old generator seeds it as PyTorch does."""

    def __init__(self, seed: int):
        self.state = np.random.RandomState(seed & 0xFFFFFFFF)

    def draw(self, count: int) -> np.ndarray:
        return np.frombuffer(self.state.bytes(4 * count), "<u4")

    def uniform(self, count: int) -> np.ndarray:
        """Numbers in [0, 1), float32: of each word the low 24 bits."""
        return (self.draw(count) & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)


def _randn_one_by_one(words: _Words, count: int) -> np.ndarray:
    """Fewer than 16 are made in float64, a pair from two numbers of two words each."""
    pairs = (count + 1) // 2
    high, low = words.draw(4 * pairs).astype(np.uint64).reshape(-1, 2).T
    uniform = ((high << np.uint64(32) | low) & np.uint64(2**53 - 1)).astype(np.float64) * 2**-53
    angle, radius = 2 * np.pi * uniform[0::2], np.sqrt(-2 * np.log1p(-uniform[1::2]))
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).ravel()[:count].astype(np.float32)


def _box_muller(uniform: np.ndarray) -> np.ndarray:
    """Uniform numbers -> normal ones (Box & Muller 1958), by blocks of 16: element i goes with i + 8."""
    first, second = np.moveaxis(uniform.reshape(-1, 2, 8), 1, 0)  # (blocks, 8) each
    radius = np.sqrt(np.float32(-2) * _log(1 - first))
    sine, cosine = _sine_and_cosine(np.float32(2 * np.pi) * second)
    return np.stack([radius * cosine, radius * sine], axis=1).ravel()


def _fma(a: np.ndarray, b: np.ndarray | float, c: np.ndarray | float) -> np.ndarray:
    """a b + c, float32, by way of float64, where the product is exact.

    The sum is rounded there as well: in 60 million normal numbers that changed none.
    """
    return (a.astype(np.float64) * np.float32(b) + np.float32(c).astype(np.float64)).astype(np.float32)


def _polynomial(x: np.ndarray, coefficients: tuple[float, ...]) -> np.ndarray:
    y = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        y = _fma(y, x, coefficient)
    return y


def _log(x: np.ndarray) -> np.ndarray:
    """The natural logarithm of positive normal float32: of the mantissa by a polynomial, and the exponent."""
    bits = x.view(np.int32)
    exponent = ((bits >> 23) - 126).astype(np.float32)
    mantissa = (bits & 0x007FFFFF | 0x3F000000).view(np.float32)  # 0.5 to 1
    is_small = mantissa < np.float32(np.sqrt(0.5))
    exponent -= is_small
    x = mantissa - 1 + np.where(is_small, mantissa, np.float32(0))
    square = x * x
    y = _fma(_polynomial(x, _LOG) * x, square, exponent * np.float32(_LOG_2[1]))
    return _fma(exponent, _LOG_2[0], x + _fma(-square, 0.5, y))


def _sine_and_cosine(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of angles from 0 on, float32: by polynomials between -pi/4 and pi/4 and the octant."""
    octant = (x * np.float32(4 / np.pi)).astype(np.int32) + 1 & ~1
    for part in _QUARTER_PI:
        x = _fma(octant.astype(np.float32), part, x)
    square = x * x
    cosine = _fma(_polynomial(square, _COSINE) * square, square, -(square * np.float32(0.5))) + 1
    sine = _fma(_polynomial(square, _SINE) * square, x, x)
    sine, cosine = np.where(octant & 2, (cosine, sine), (sine, cosine))
    return np.where(octant & 4, -sine, sine), np.where(octant + 2 & 4, -cosine, cosine)
