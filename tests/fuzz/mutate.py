"""New inputs out of valid ones: flipped bits, cut, spliced and repeated pieces, edited numbers, nasty text.

Left out: coverage. This is the engine for machines without atheris, and the one whose runs can be repeated from a seed;
`python -m tests.fuzz.run --engine atheris` lets libFuzzer choose what to keep.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

LARGEST = 1 << 16
"""Inputs stay below so many bytes, so that many fit into a second; long ones have tests of their own."""

_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
_NUMBERS = (
    b"0", b"-0", b"-1", b"1", b"2", b"0.5", b"1.5", b"1e-30", b"1e-320", b"1e400", b"-1e400", b"NaN", b"nan",
    b"Infinity", b"-Infinity", b"inf", b"127", b"255", b"65536", b"2147483647", b"2147483648", b"4294967296",
    b"9007199254740993",
    b"9223372036854775807", b"9223372036854775808", b"18446744073709551616", b"1" * 400, b"9" * 5000, b"1_0", b"0x1f",
    "\u0663".encode(), b"null", b"true", b"[]", b"{}", b'""', b'"1"',
)  # fmt: skip
_NASTY = (
    b"\x00", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xc3", b"\xf4\x90\x80\x80", b"\r\n", b"\n",
    b"\t", b"\x1f",
    "\u202e\u2066".encode(), "\u2028\u2029".encode(), "\ufffd\ufffc".encode(), "\U0001f468\u200d\U0001f469".encode(),
    "e\u0301".encode(), "\u05e9\u05dc\u05d5\u05dd".encode(), b'"', b"'", b"\\", b"\\u0000", b"\\ud800", b"%s%n",
    b"{", b"}", b"[", b"]", b"<", b">", b"&", b"&#0;", b"</script>", b"../../etc/passwd",
    b"!!python/name:os.system", b"*a", b"&a ",
)  # fmt: skip


class Mutator:
    """Endless inputs made of `seeds` and `words` (what the format has a meaning for); the same ones for one `seed`."""

    def __init__(self, seeds: Sequence[bytes], words: Sequence[bytes] = (), seed: int = 0) -> None:
        self._seeds, self._words = list(seeds), [*words, *_NASTY]
        self._random = random.Random(seed)

    def __call__(self) -> bytes:
        data = bytearray(self._random.choice(self._seeds))
        # Often one change, so that most of a file stays valid and the change gets far.
        for _ in range(min(1 + int(self._random.expovariate(0.7)), 12)):
            self._random.choice(_CHANGES)(self, data)
            del data[LARGEST:]
        return bytes(data)

    def _place(self, data: bytearray) -> int:
        # Half of the time near the start, where headers are.
        size = len(data)
        return self._random.randrange((size if self._random.random() < 0.5 else min(size, 64)) + 1)

    def _piece(self, data: bytearray) -> slice:
        start = self._place(data)
        return slice(start, start + 1 + int(self._random.expovariate(1 / 16)))

    def _flip(self, data: bytearray) -> None:
        if data:
            data[min(self._place(data), len(data) - 1)] ^= 1 << self._random.randrange(8)

    def _set(self, data: bytearray) -> None:
        if data:
            data[min(self._place(data), len(data) - 1)] = self._random.randrange(256)

    def _cut(self, data: bytearray) -> None:
        del data[self._place(data) :]

    def _drop(self, data: bytearray) -> None:
        del data[self._piece(data)]

    def _insert(self, data: bytearray) -> None:
        start = self._place(data)
        data[start:start] = self._random.choice(self._words)

    def _repeat(self, data: bytearray) -> None:
        piece = self._piece(data)
        data[piece] = bytes(data[piece]) * self._random.choice([2, 3, 10, 100, 1000])

    def _splice(self, data: bytearray) -> None:
        other = self._random.choice(self._seeds)
        start = self._random.randrange(len(other) + 1)
        data[self._piece(data)] = other[start : start + 1 + int(self._random.expovariate(1 / 64))]

    def _field(self, data: bytearray) -> None:
        """A whole number of 1, 2, 4 or 8 bytes, as binary formats keep lengths and offsets."""
        width = self._random.choice([1, 2, 4, 8])
        at = self._place(data)
        top = 1 << (8 * width)
        value = self._random.choice([0, 1, top - 1, top // 2, top // 2 - 1, len(data), at, self._random.randrange(top)])
        data[at : at + width] = (value % top).to_bytes(width, self._random.choice(["little", "big"]))

    def _number(self, data: bytearray) -> None:
        found = list(_NUMBER.finditer(data))
        if found:
            start, stop = self._random.choice(found).span()
            data[start:stop] = self._random.choice(_NUMBERS)

    def _nest(self, data: bytearray) -> None:
        start = self._place(data)
        data[start:start] = self._random.choice([b"[", b"{", b"(", b'{"a":', b"<a>"]) * self._random.choice([3, 2000])


_CHANGES = (
    Mutator._flip, Mutator._set, Mutator._cut, Mutator._drop, Mutator._insert, Mutator._insert, Mutator._repeat,
    Mutator._splice, Mutator._field, Mutator._number, Mutator._number, Mutator._nest,
)  # fmt: skip
