"""Every reader on mutated files, for a bounded time; and the fuzzers, on a reader that is known to be broken.

FLOWGRAPH_FUZZ_SECONDS is the time for all targets together, FLOWGRAPH_FUZZ_SEED another sequence of inputs.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.fuzz import run
from tests.fuzz.mutate import Mutator
from tests.fuzz.run import Tally, fuzz, try_one
from tests.fuzz.targets import Target, targets

pytestmark = pytest.mark.fuzz
SECONDS = float(os.environ.get("FLOWGRAPH_FUZZ_SECONDS", "8"))
SEED = int(os.environ.get("FLOWGRAPH_FUZZ_SEED", "0"))


@pytest.mark.parametrize("name", targets())
def test_nothing_but_declared_errors_escapes(name: str, one_thread: None) -> None:
    tally = fuzz(name, seed=SEED, seconds=SECONDS / len(targets()), inputs=10**9)
    again = f"python -m tests.fuzz.run --only '{name}' --seed {SEED} --inputs {tally.inputs}"
    assert not tally.findings, (
        "\n".join(f"{what}: {data}" for what, data in tally.findings.items()) + f"\nagain: {again}"
    )
    assert tally.accepted >= 1, "not even the valid inputs were read"


@pytest.mark.parametrize("name", targets())
def test_seeds_are_valid(name: str, tmp_path: Path) -> None:
    for data in targets()[name].seeds:
        targets()[name].run(data, tmp_path)


def broken(data: bytes, folder: Path) -> None:
    if data.startswith(b"index"):
        [][1]
    if data.startswith(b"silent"):
        raise ValueError
    if data.startswith(b"declared"):
        raise ValueError("x is wrong")
    if data.startswith(b"slow"):
        while True:
            pass
    if data.startswith(b"memory"):
        bytearray(run.MEMORY + (1 << 28))


@pytest.mark.parametrize(
    ("data", "found"),
    [(b"index", "IndexError"), (b"silent", "says nothing"), (b"declared", None), (b"slow", "TookTooLong"),
     (b"memory", "MemoryError"), (b"fine", None)],
)  # fmt: skip
def test_the_harness_finds(data: bytes, found: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SLOW", 0.2)
    tally = Tally()
    with run._ready() as folder:
        try_one(Target("broken", broken, [b""]), data, folder, tally)
    assert tally.inputs == 1
    assert [found in what for what in tally.findings] == [True] if found else not tally.findings


def test_only_what_is_slow_twice_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SLOW", 0.2)
    tries: list[bytes] = []

    def slow_once(data: bytes, folder: Path) -> None:
        tries.append(data)
        if len(tries) == 1:
            broken(b"slow", folder)

    tally = Tally()
    with run._ready() as folder:
        try_one(Target("slow once", slow_once, [b""]), b"x", folder, tally)
    assert (tries, tally.findings, tally.accepted, tally.inputs) == ([b"x", b"x"], {}, 1, 1)


def test_the_same_seed_gives_the_same_inputs() -> None:
    one, other, third = (Mutator([b'{"a": 1}', b"x"], [b"word"], seed) for seed in (3, 3, 4))
    first = [one() for _ in range(200)]
    assert first == [other() for _ in range(200)] != [third() for _ in range(200)]
    assert len(set(first)) > 100 and any(b"word" in data for data in first)
