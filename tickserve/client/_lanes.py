"""A few float32 values looked at all at once: their bytes as one whole number, a lane of 32 bits for each.

After a wait numpy's code is cold, and a call that wakes it pays more than for the comparisons; the arithmetic of whole
numbers is a few short loops. What crosses a lane's end is kept out by its highest bit, which each step sets or clears.
"""

from __future__ import annotations

from functools import lru_cache

SIGN, EXPONENT, FRACTION = 0x8000_0000, 0x7F80_0000, 0x007F_FFFF


def lanes(value: int, count: int) -> int:
    """`value` in each of `count` lanes."""
    return int.from_bytes(value.to_bytes(4, "little") * count, "little")


@lru_cache(maxsize=64)
def _carrying(count: int) -> tuple[int, int, int]:
    return lanes(EXPONENT, count), lanes(FRACTION + 1, count), lanes(SIGN, count)


def all_finite(data: bytes) -> bool:
    """Whether every float32 in `data` is finite: none has an exponent of ones alone, where one more carries."""
    exponents, one, carried = _carrying(len(data) // 4)
    return not ((int.from_bytes(data, "little") & exponents) + one) & carried


class Ends:
    """The ends of some float32 values, each as the bytes of finite ones.

    A float's bits, all turned where it is negative and the sign alone where it is not, have the order of the floats.
    """

    __slots__ = ("_fraction", "_highest", "_highest_signed", "_lowest", "_lowest_rest", "_rest", "_sign")

    def __init__(self, lowest: bytes, highest: bytes) -> None:
        count = len(lowest) // 4
        self._sign, self._fraction, self._rest = lanes(SIGN, count), lanes(FRACTION, count), lanes(SIGN - 1, count)
        self._lowest, self._highest = (_ordered(int.from_bytes(end, "little"), self._sign) for end in (lowest, highest))
        self._lowest_rest, self._highest_signed = self._lowest & self._rest, self._highest | self._sign

    def hold(self, data: bytes, *, nan: bool) -> bool:
        """Whether each value lies between its ends; a NaN does where `nan` says so. A zero may count as outside."""
        sign, bits = self._sign, int.from_bytes(data, "little")
        values = _ordered(bits, sign)
        above, below = values ^ self._lowest, values ^ self._highest
        # Where two highest bits differ they decide; elsewhere the rest does, from which nothing can be borrowed.
        inside = (values & above) | (~above & ((values | sign) - self._lowest_rest))
        inside &= (self._highest & below) | (~below & (self._highest_signed - (values & self._rest)))
        inside &= sign
        if inside != sign and nan:
            inside |= ((bits & self._rest) + self._fraction) & sign  # beyond infinity
        return inside == sign


def _ordered(bits: int, sign: int) -> int:
    negative = bits & sign
    return bits ^ ((negative << 1) - (negative >> 31) | sign)
