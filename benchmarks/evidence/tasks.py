"""Tasks whose carriers are known: which statements, or steps of a response, the answer depends on.

    chains      a=3;b=a;d=b;...  ?d=      -> 3      the statements that lead from the asked variable to its digit
    needles     a3;c5;a9;...     ?a       -> 2      the statements with the asked mark: their sum modulo 10
    addition    h48;u29;t75;...  ?h       -> 3      a column of digits per place, in any order: the asked digit of the
                                                    sum depends on its column and on those a carry can come from
    scratchpad  b:a+4;a:3+2;...  b+7?     -> a:3+2a=5;b:a+4b=9;...b+7=6
                                                    the response works out every variable, useful or not, in an order
                                                    that respects dependencies, and then answers modulo 10

A unit is what is ranked: a statement of the prompt, or in "scratchpad" a step of the response. It is a carrier exactly
if another value in it can make another answer: all other statements being the same, or, in "scratchpad", all later
steps working on with that value. Hop 1 is read by the answer itself, hop 2 by hop 1, and so on. Every symbol of the
texts above is one token, but `a:`, `a=` and `+4` are one too. All problems of a task have the same number of tokens,
and the answer is the last.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from random import Random
from string import ascii_lowercase, ascii_uppercase
from typing import ClassVar

from typing_extensions import Self  # in typing only from Python 3.11 on

DIGITS = [str(digit) for digit in range(10)]
_ADDED = [f"+{digit}" for digit in DIGITS[1:]]
START = "<"
"""The first token of every problem."""


@dataclass(frozen=True)
class Problem:
    """One problem with its right answer. Ranges are half-open and count tokens."""

    task: str
    tokens: list[int]
    prompt: int
    """`tokens[:prompt]` is the prompt, the rest the response."""
    answer: tuple[int, int]
    units: list[tuple[int, int]]
    """What is ranked: the statements of the prompt or the steps of the response, in order."""
    carriers: list[int]
    """Indices into `units`, the nearest to the answer first."""
    hops: list[int]
    """The hop of each carrier."""
    level: int
    """Hops of the whole problem; in "needles", where all hops are 1, the number of carriers."""


class Task(ABC):
    """A way to draw problems, and to change one unit of them."""

    name: str
    levels: tuple[int, ...] = (1, 2, 3)
    vocabulary: ClassVar[list[str]]

    @abstractmethod
    def sample(self, generator: Random, level: int) -> Problem:
        """A random problem of that level (one of `levels`)."""

    @abstractmethod
    def redraws(self, problem: Problem, unit: int) -> list[list[int]]:
        """All tokens, once for each other value that the unit could have, with what is right after it."""

    def questions(self, problem: Problem) -> list[list[int]]:
        """Question and answer for everything that could be asked about the problem's prompt, to train on."""
        return [problem.tokens[problem.prompt :]]

    def encode(self, symbols: Sequence[str]) -> list[int]:
        """Token ids of symbols."""
        return [self._ids[symbol] for symbol in symbols]

    def symbols(self, tokens: Sequence[int]) -> list[str]:
        """Symbols of token ids."""
        return [self.vocabulary[token] for token in tokens]

    def render(self, tokens: Sequence[int]) -> str:
        """The text of token ids."""
        return "".join(self.symbols(tokens))

    def easier(self, level: int) -> Self:
        """The same task with levels up to this one and nothing deeper in its problems: to learn on, first."""
        self._check(level)
        task = copy(self)
        task.levels = tuple(own for own in self.levels if own <= level)
        return task

    def _check(self, level: int) -> None:
        if level not in self.levels:
            raise ValueError(f"level {level} of {self.name}: must be one of {self.levels}")

    def __init__(self) -> None:
        self._ids = {symbol: token for token, symbol in enumerate(self.vocabulary)}


class _PromptTask(Task):
    """Statements of one length, then "?" and what is asked, then the answer."""

    width: int
    """Tokens per statement."""

    @abstractmethod
    def asked(self, statements: Sequence[Sequence[str]]) -> dict[str, str]:
        """The answer to every question about these statements."""

    def problem(
        self, statements: Sequence[Sequence[str]], question: str, carriers: list[int], hops: list[int], level: int
    ) -> Problem:
        tokens = self._tokens(statements, question)
        starts = range(1, 1 + self.width * len(statements), self.width)
        end = len(tokens)
        units = [(start, start + self.width) for start in starts]
        return Problem(self.name, tokens, end - 1, (end - 1, end), units, carriers, hops, level)

    def statements(self, problem: Problem) -> list[list[str]]:
        return [self.symbols(problem.tokens[start:end]) for start, end in problem.units]

    def questions(self, problem: Problem) -> list[list[int]]:
        asked = self.asked(self.statements(problem))
        return [self.encode(("?", question, answer)) for question, answer in asked.items()]

    def redraws(self, problem: Problem, unit: int) -> list[list[int]]:
        statements = self.statements(problem)
        question = self.vocabulary[problem.tokens[problem.prompt - 1]]
        before, after = statements[:unit], statements[unit + 1 :]
        return [self._tokens([*before, other, *after], question) for other in self.others(statements, statements[unit])]

    @abstractmethod
    def others(self, statements: Sequence[Sequence[str]], statement: Sequence[str]) -> list[list[str]]:
        """The statement with every other value that it could have."""

    def _tokens(self, statements: Sequence[Sequence[str]], question: str) -> list[int]:
        body = [symbol for statement in statements for symbol in statement]
        return self.encode([START, *body, "?", question, self.asked(statements)[question]])


class Chains(_PromptTask):
    """Variables are bound to digits or to other variables, in any order; what is the asked one?

    The bindings are a forest: other chains share the carriers' variables or stand apart. Roots have different digits.
    """

    name = "chains"
    width = 3
    count = 8
    names = ascii_lowercase[:12]
    digits: ClassVar = DIGITS
    """What variables may be bound to; at least `count` of them."""
    vocabulary: ClassVar = [START, ";", "?", *digits, *names, *(f"{name}=" for name in names)]

    def sample(self, generator: Random, level: int) -> Problem:
        self._check(level)
        while True:
            parents, depths = _forest(generator, self.count, max(self.levels))
            if level in depths and parents.count(None) > 1:
                break
        names = generator.sample(self.names, self.count)
        digits = generator.sample(self.digits, self.count)
        right = [digits[own] if parent is None else names[parent] for own, parent in enumerate(parents)]
        path = _path(parents, generator.choice([own for own, depth in enumerate(depths) if depth == level]))
        order = generator.sample(range(self.count), self.count)
        statements = [[f"{names[own]}=", right[own], ";"] for own in order]
        carriers = [order.index(own) for own in path]
        return self.problem(statements, f"{names[path[0]]}=", carriers, list(range(1, level + 1)), level)

    def asked(self, statements: Sequence[Sequence[str]]) -> dict[str, str]:
        bound = {left[0]: right for left, right, _ in statements}

        def value(name: str) -> str:
            return bound[name] if bound[name] in self.digits else value(bound[name])

        return {f"{name}=": value(name) for name in bound}

    def others(self, statements: Sequence[Sequence[str]], statement: Sequence[str]) -> list[list[str]]:
        bound = {left[0]: right for left, right, _ in statements}
        left, right, end = statement
        if right in self.digits:
            return [[left, digit, end] for digit in self.digits if digit not in bound.values()]
        values = self.asked(statements)  # a variable of another tree: no circle, and another value
        near = [name for name in bound if values[f"{name}="] != values[f"{right}="] and self._depth(bound, name) == 1]
        return [[left, name, end] for name in near]

    def _depth(self, bound: dict[str, str], name: str) -> int:
        return 1 if bound[name] in self.digits else 1 + self._depth(bound, bound[name])


class Needles(_PromptTask):
    """Every statement is a mark and a digit; what is the sum, modulo 10, of those with the asked mark?"""

    name = "needles"
    width = 3
    count = 10
    marks = ascii_lowercase[:12]
    vocabulary: ClassVar = [START, ";", "?", *DIGITS, *marks]

    def sample(self, generator: Random, level: int) -> Problem:
        self._check(level)
        most = max(self.levels)  # statements of any mark
        mark, *others = generator.sample(self.marks, 2 + math.ceil((self.count - level) / most))
        rest = generator.sample(others * most, self.count - level)
        shuffled = [mark] * level + rest
        generator.shuffle(shuffled)
        statements = [[own, generator.choice(DIGITS), ";"] for own in shuffled]
        carriers = [place for place in reversed(range(self.count)) if shuffled[place] == mark]
        return self.problem(statements, mark, carriers, [1] * level, level)

    def asked(self, statements: Sequence[Sequence[str]]) -> dict[str, str]:
        sums: dict[str, int] = {}
        for mark, digit, _ in statements:
            sums[mark] = sums.get(mark, 0) + int(digit)
        return {mark: str(total % 10) for mark, total in sums.items()}

    def others(self, statements: Sequence[Sequence[str]], statement: Sequence[str]) -> list[list[str]]:
        mark, own, end = statement
        return [[mark, digit, end] for digit in DIGITS if digit != own]


class Addition(_PromptTask):
    """Two numbers of five digits, given as columns in any order: what is the asked digit of their sum?

    The digit depends on its own column and on the next lower one, whose carry it gets, and while that column adds up
    to 9 on the next lower still. The number of columns is the level.
    """

    name = "addition"
    width = 4
    places = "uthkm"
    """Ones, tens, hundreds, thousands and ten thousands."""
    vocabulary: ClassVar = [START, ";", "?", *DIGITS, *places]

    def sample(self, generator: Random, level: int) -> Problem:
        self._check(level)
        count = len(self.places)
        place = 0 if level == 1 else generator.randrange(level - 1, count)
        lowest = place - level + 1
        columns = [(generator.randrange(10), generator.randrange(10)) for _ in range(count)]
        if self.levels == (1,):  # an easier task: nothing carries
            columns = [(first, generator.randrange(10 - first)) for first, _ in columns]
        for between in range(lowest + 1, place):
            columns[between] = _column(generator, nine=True)
        if lowest > 0:
            columns[lowest] = _column(generator, nine=False)
        order = generator.sample(range(count), count)
        statements = [[self.places[own], *map(str, columns[own]), ";"] for own in order]
        carriers = [order.index(own) for own in range(place, lowest - 1, -1)]
        return self.problem(statements, self.places[place], carriers, list(range(1, level + 1)), level)

    def asked(self, statements: Sequence[Sequence[str]]) -> dict[str, str]:
        columns = {place: int(first) + int(second) for place, first, second, _ in statements}
        digits, carry = {}, 0
        for place in self.places:
            carry, digit = divmod(columns[place] + carry, 10)
            digits[place] = str(digit)
        return digits

    def others(self, statements: Sequence[Sequence[str]], statement: Sequence[str]) -> list[list[str]]:
        place, *own, end = statement
        return [[place, first, second, end] for first in DIGITS for second in DIGITS if [first, second] != own]


class Scratchpad(Task):
    """Sums of variables and digits; the response works out all of them, step by step, and then the asked sum.

    Much of what the response says is beside the question: other variables, some of which are made of the useful ones.
    The asked sum is one operation more than the steps, and the prompt states no value: even `a:3+2` is to be added up.
    """

    name = "scratchpad"
    count = 7
    names = ascii_lowercase[:10]
    added = tuple(_ADDED)
    vocabulary: ClassVar = [START, ";", "?", "=", *DIGITS, *names, *_ADDED]
    vocabulary += [f"{name}{sign}" for name in names for sign in ":="]

    def sample(self, generator: Random, level: int) -> Problem:
        self._check(level)
        # In the order of the response, so that the carriers are a random subset of the steps: position says nothing.
        chain = sorted(generator.sample(range(self.count), level))
        parents: list[int | None] = []
        depths: list[int] = []
        for own in range(self.count):
            if own in chain:
                parent = chain[chain.index(own) - 1] if own != chain[0] else None
            else:
                parent = _parent(generator, depths, max(self.levels))
            parents.append(parent)
            depths.append(1 if parent is None else depths[parent] + 1)

        names = generator.sample(self.names, self.count)
        terms = [generator.choice(DIGITS) if parent is None else names[parent] for parent in parents]
        added = [generator.choice(self.added) for _ in range(self.count + 1)]
        sums = [[f"{name}:", term, more] for name, term, more in zip(names, terms, added, strict=False)]
        question = [names[chain[-1]], added[-1]]
        prompt = [START]
        for own in generator.sample(range(self.count), self.count):
            prompt += [*sums[own], ";"]
        prompt += [*question, "?"]
        steps = [symbol for name, own in zip(names, sums, strict=True) for symbol in (*own, f"{name}=", "0", ";")]
        symbols = [*prompt, *steps, *question, "=", "0"]
        units = [(len(prompt) + 6 * own, len(prompt) + 6 * (own + 1)) for own in range(self.count)]
        carriers = chain[::-1]
        end = len(symbols)
        return Problem(
            self.name,
            self.encode(self._worked(symbols, units)),
            len(prompt),
            (end - 1, end),
            units,
            carriers,
            list(range(1, level + 1)),
            level,
        )

    def easier(self, level: int) -> Self:
        """Besides, nothing above 3 is added: finding values is learned before adding them up."""
        task = super().easier(level)
        task.added = self.added[:3]
        return task

    def redraws(self, problem: Problem, unit: int) -> list[list[int]]:
        place = problem.units[unit][1] - 2
        own = self.vocabulary[problem.tokens[place]]
        others = [digit for digit in DIGITS if digit != own]
        symbols = self.symbols(problem.tokens)
        return [self.encode(self._worked(symbols, problem.units, {unit: digit})) for digit in others]

    @staticmethod
    def _worked(
        symbols: Sequence[str], units: Sequence[tuple[int, int]], given: Mapping[int, str] | None = None
    ) -> list[str]:
        """The symbols with every step, unless given, and the answer worked out from the values before."""
        worked = list(symbols)
        values: dict[str, int] = {}
        for unit, (start, end) in enumerate(units):
            name, term, added = worked[start : start + 3]
            right = (values[term] if term in values else int(term)) + int(added)
            worked[end - 2] = (given or {}).get(unit, str(right % 10))
            values[name[0]] = int(worked[end - 2])
        name, added = worked[-4:-2]
        worked[-1] = str((values[name] + int(added)) % 10)
        return worked


class LongChains(Chains):
    """Twice the statements and up to five hops; values are digits and capital letters."""

    name = "chains-long"
    levels = (1, 2, 3, 4, 5)
    count = 16
    names = ascii_lowercase[:24]
    digits: ClassVar = [*DIGITS, *ascii_uppercase[:12]]
    vocabulary: ClassVar = [START, ";", "?", *digits, *names, *(f"{name}=" for name in names)]


class LongNeedles(Needles):
    """24 statements, and up to five with the asked mark."""

    name = "needles-long"
    levels = (1, 2, 3, 4, 5)
    count = 24
    marks = ascii_lowercase
    vocabulary: ClassVar = [START, ";", "?", *DIGITS, *marks]


class LongAddition(Addition):
    """Ten digits, and carries from up to four columns away."""

    name = "addition-long"
    levels = (1, 2, 3, 4, 5)
    places = "uthkmabcde"
    vocabulary: ClassVar = [START, ";", "?", *DIGITS, *places]


class LongScratchpad(Scratchpad):
    """Twelve steps, of which up to five carry."""

    name = "scratchpad-long"
    levels = (1, 2, 3, 4, 5)
    count = 12
    names = ascii_lowercase[:16]
    vocabulary: ClassVar = [START, ";", "?", "=", *DIGITS, *names, *_ADDED]
    vocabulary += [f"{name}{sign}" for name in names for sign in ":="]


TASKS: dict[str, Task] = {task.name: task for task in (Chains(), Needles(), Addition(), Scratchpad())}
LONG: dict[str, Task] = {task.name: task for task in (LongChains(), LongNeedles(), LongAddition(), LongScratchpad())}
"""The same for larger decoders; see benchmarks/evidence/gpu.py."""
EVERY = TASKS | LONG


def _parent(generator: Random, depths: Sequence[int], deepest: int) -> int | None:
    """One of those drawn before, if it may have children, or None: a root."""
    open_ = [other for other, depth in enumerate(depths) if depth < deepest]
    return generator.choice(open_) if open_ and generator.random() < 0.65 else None


def _forest(generator: Random, count: int, deepest: int) -> tuple[list[int | None], list[int]]:
    """Parents (None at a root) and depths (1 at a root) of a random forest."""
    parents: list[int | None] = []
    depths: list[int] = []
    for _ in range(count):
        parent = _parent(generator, depths, deepest)
        parents.append(parent)
        depths.append(1 if parent is None else depths[parent] + 1)
    return parents, depths


def _path(parents: Sequence[int | None], own: int) -> list[int]:
    """From `own` to its root."""
    path, parent = [own], parents[own]
    while parent is not None:
        path.append(parent)
        parent = parents[parent]
    return path


def _column(generator: Random, *, nine: bool) -> tuple[int, int]:
    """Two digits that add up to 9, or that don't."""
    while True:
        first, second = generator.randrange(10), generator.randrange(10)
        if nine:
            return first, 9 - first
        if first + second != 9:
            return first, second
