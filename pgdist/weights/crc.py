"""CRC-32 of what was read in parts, by several threads: the checksum of two parts from those of each.

With a part taken as a polynomial over two elements, crc(a + b) = crc(a) * x^(8 * len(b)) + crc(b) modulo the CRC's
polynomial; the power is found by repeated squaring, as zlib's crc32_combine does, which Python's zlib lacks.
"""

from __future__ import annotations

_POLYNOMIAL = 0xEDB88320  # of CRC-32, the highest power in the lowest bit
_ONE, _X_TO_8 = 1 << 31, 1 << 23


def combine(first: int, second: int, second_size: int) -> int:
    """CRC-32 of two parts in a row, the second of so many bytes."""
    return _multiply(_power(_X_TO_8, second_size), first) ^ second


def _multiply(a: int, b: int) -> int:
    """a * b modulo the polynomial."""
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1
    return product


def _power(base: int, exponent: int) -> int:
    result = _ONE
    while exponent:
        if exponent & 1:
            result = _multiply(result, base)
        base, exponent = _multiply(base, base), exponent >> 1
    return result
