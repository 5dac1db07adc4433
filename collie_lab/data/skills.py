"""Skills: a generated instruction set of ten short tasks with one right answer each.

Words are made of syllables, so that no list of words is needed and a byte-level model can learn them.
"""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Callable

from collie_lab.cells import CellError, Problem, Skills

__all__ = ["make_skills"]

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


def make_skills(cell: Skills, split: str) -> list[tuple[str, str]]:
    """The `(prompt, answer)` pairs of the `train` split, else of the test split; tasks in turn.

    A hash of the prompt says to which split it belongs, so the two are disjoint, also between cells of
    different tasks, sizes and seeds; the same cell always gives the same pairs.

    Raises:
        CellError: the tasks have fewer different prompts than are asked for.
    """
    test = split != "train"
    rng, size = random.Random(f"{cell.seed} {test}"), cell.test_size if test else cell.size
    pairs: dict[str, str] = {}
    misses = 0
    for task in itertools.cycle(cell.tasks):  # where one task has no new prompts left, the others fill its place
        prompt, answer = _TASKS[task](rng)
        if _is_test(prompt) == test and prompt not in pairs:
            pairs[prompt] = answer
            misses = 0
        elif (misses := misses + 1) > 20_000:
            raise CellError([Problem("Skills", "test_size" if test else "size", f"{', '.join(cell.tasks)} have too few "
                                     f"different prompts for {size} records", "ask for fewer, or more tasks")])
        if len(pairs) == size:
            break
    return list(pairs.items())


def _is_test(prompt: str) -> bool:
    """One prompt in eight is a test prompt, whatever cell it is drawn for."""
    return zlib.crc32(prompt.encode()) % 8 == 0


def _word(rng: random.Random, syllables: int = 2) -> str:
    return "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(syllables))


def _copy(rng: random.Random) -> tuple[str, str]:
    word = _word(rng, rng.randint(1, 3))
    return f"copy {word}", word


def _reverse(rng: random.Random) -> tuple[str, str]:
    word = _word(rng, rng.randint(1, 2)) + rng.choice(_CONSONANTS)
    return f"reverse {word}", word[::-1]


def _uppercase(rng: random.Random) -> tuple[str, str]:
    word = _word(rng, rng.randint(1, 3))
    return f"uppercase {word}", word.upper()


def _first(rng: random.Random) -> tuple[str, str]:
    word = _word(rng, rng.randint(2, 3))
    return f"first letter of {word}", word[0]


def _last(rng: random.Random) -> tuple[str, str]:
    word = _word(rng, rng.randint(2, 3))
    return f"last letter of {word}", word[-1]


def _next(rng: random.Random) -> tuple[str, str]:
    number = rng.randint(1, 9998)
    return f"number after {number}", str(number + 1)


def _add(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    return f"add {a} and {b}", str(a + b)


def _count(rng: random.Random) -> tuple[str, str]:
    word, letter = _word(rng, 3), rng.choice(_VOWELS)
    return f"count {letter} in {word}", str(word.count(letter))


def _longest(rng: random.Random) -> tuple[str, str]:
    lengths = rng.sample([1, 2, 3], 3)
    words = [_word(rng, length) for length in lengths]
    return f"longest of {' '.join(words)}", words[lengths.index(3)]


def _repeat(rng: random.Random) -> tuple[str, str]:
    word, times = _word(rng, 1) + rng.choice(_CONSONANTS), rng.randint(2, 4)
    return f"repeat {times} times {word}", word * times


_TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "copy": _copy, "reverse": _reverse, "uppercase": _uppercase, "first": _first, "last": _last,
    "next": _next, "add": _add, "count": _count, "longest": _longest, "repeat": _repeat,
}
