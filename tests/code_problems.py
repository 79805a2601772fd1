"""Problems in the schemas of HumanEval and MBPP, written for the tests of the sandbox."""

from __future__ import annotations

import pytest

from attnres.eval.sandbox import SandboxUnavailableError, backend

GOOD = "def f(x):\n    return 7 * x + 3\n"
TESTS = """
def check(candidate):
    for x in (1, 20, 300):
        assert candidate(x) == 7 * x + 3
    assert len([candidate(x) for x in range(3)]) == 3

check(f)
"""


def require_sandbox() -> None:
    """Skips a test where there is no sandbox."""
    try:
        backend()
    except SandboxUnavailableError as error:
        pytest.skip(str(error))


def _human_eval(number: int, signature: str, solution: str, broken: str, *asserts: str) -> dict[str, str]:
    test = "\n\nMETADATA = {'author': 'attnres'}\n\n\ndef check(candidate):\n"
    return {
        "task_id": f"Sample/{number}",
        "prompt": f'{signature}\n    """Does what its tests ask for."""\n',
        "canonical_solution": solution,
        "broken_solution": broken,
        "test": test + "".join(f"    {line}\n" for line in asserts),
        "entry_point": signature.rpartition("def ")[2].partition("(")[0],
    }


HUMAN_EVAL = [
    _human_eval(
        0,
        "def double(x):",
        "    return 2 * x\n",
        "    return 2 + x\n",
        "assert candidate(2) == 4",
        "assert candidate(5) == 10",
    ),
    _human_eval(
        1,
        "from typing import List\n\n\ndef above(numbers: List[float], least: float) -> List[float]:",
        "    return [number for number in numbers if number > least]\n",
        "    return [number for number in numbers if number >= least]\n",
        "assert candidate([1.0, 2.0, 3.5], 2.0) == [3.5]",
        "assert candidate([], 0.0) == []",
    ),
    _human_eval(
        2,
        "import math\n\n\ndef hypotenuse(a, b):",
        "    return math.sqrt(a * a + b * b)\n",
        "    return a + b\n",
        "assert abs(candidate(3, 4) - 5.0) < 1e-6",
        "assert math.isclose(candidate(5, 12), 13)",
    ),
    _human_eval(
        3,
        "def evaluate(terms, x):\n    return sum(c * x**i for i, c in enumerate(terms))\n\n\ndef root(terms):",
        "    low, high = -100.0, 100.0\n"
        "    while high - low > 1e-10:\n"
        "        middle = (low + high) / 2\n"
        "        same = evaluate(terms, low) * evaluate(terms, middle) > 0\n"
        "        low, high = (middle, high) if same else (low, middle)\n"
        "    return low\n",
        "    return 0.0\n",
        "import copy, random",
        "rng = random.Random(42)",
        "for _ in range(20):",
        "    coefficients = [rng.randint(-10, 10), rng.randint(1, 10)]",
        "    assert abs(evaluate(coefficients, candidate(copy.deepcopy(coefficients)))) < 1e-4",
    ),
    _human_eval(
        4,
        "def minmax(numbers):",
        "    return (min(numbers), max(numbers)) if numbers else None\n",
        "    return [min(numbers), max(numbers)] if numbers else None\n",
        "assert candidate([3, 1, 2]) == (1, 3)",
        "assert candidate([]) is None",
    ),
    _human_eval(
        5,
        "def positive(number):",
        "    if number < 0:\n        raise ValueError('negative')\n    return True\n",
        "    return number >= 0\n",
        "try:",
        "    candidate(-1)",
        "except ValueError as error:",
        "    assert str(error) == 'negative'",
        "else:",
        "    assert False",
    ),
    _human_eval(
        6,
        "def countdown(number):",
        "    while number:\n        yield number\n        number -= 1\n",
        "    yield number\n",
        "assert tuple(candidate(3)) == (3, 2, 1)",
        "assert list(map(str, candidate(2))) == ['2', '1']",
    ),
    _human_eval(
        7,
        "def thirds(values):",
        "    return values[:2] + values[2:][::-1]\n",
        "    return values\n",
        "assert tuple(candidate([1, 2, 3, 4])) == tuple(thirds([1, 2, 3, 4])) == (1, 2, 4, 3)",
    ),
    _human_eval(
        8,
        "def letters(text):",
        "    from collections import Counter\n\n    return Counter(text)\n",
        "    return {}\n",
        "assert candidate('aab') == {'a': 2, 'b': 1}",
        "assert candidate('') == {}, 'nothing'",
    ),
    _human_eval(
        9,
        "def chatty(text):",
        "    print('thinking about', text)\n    return text[::-1]\n",
        "    print(text[::-1])\n",
        "assert candidate('abc') == 'cba'",
        "assert all(candidate(text) == text for text in ('', 'a', 'aba'))",
    ),
    _human_eval(
        10,
        "def power(base, exponent=2, *, modulus=None):",
        "    return pow(base, exponent, modulus)\n",
        "    return base**exponent\n",
        "assert candidate(3) == 9",
        "assert candidate(3, exponent=4, modulus=5) == 1",
        "assert candidate(7, 9000) == 7 ** 9000",
    ),
    _human_eval(
        11,
        "def mixed(values):",
        "    return [value for value in values if type(value) is int]\n",
        "    return [value for value in values if isinstance(value, int)]\n",
        "assert candidate([4, {}, [], 23.2, 9, 'x', None, True, (1,), {2}, b'3', 1j]) == [4, 9]",
    ),
]

MBPP = [
    {
        "task_id": 1,
        "code": "def shared(first, second):\r\n  return tuple(sorted(set(first) & set(second)))",
        "broken": "def shared(first, second):\r\n  return ()",
        "test_list": ["assert shared((3, 4, 5, 6),(5, 7, 4, 10)) == (4, 5)", "assert shared((1, 2), (3, 4)) == ()"],
    },
    {  # named like a builtin
        "task_id": 2,
        "code": "def sum(a, b):\r\n  return len([n for n in range(1, min(a, b) + 1) if a % n == b % n == 0])",
        "broken": "def sum(a, b):\r\n  return a + b",
        "test_list": ["assert sum(10,15) == 2", "assert (sum(4,8)) == 3"],
    },
    {  # a class of the candidate's
        "task_id": 3,
        "code": "class Pair(object):\n  def __init__(self, a, b):\n    self.a = a\n    self.b = b\n"
        "def total(pairs):\n  return sum(pair.a * pair.b for pair in pairs)",
        "broken": "class Pair(object):\n  def __init__(self, a, b):\n    pass\ndef total(pairs):\n  return 0",
        "test_list": ["assert total([Pair(1, 2), Pair(3, 4)]) == 14", "assert Pair(5, 6).b == 6"],
    },
    {
        "task_id": 4,
        "code": "import cmath\ndef phase(a, b):\n  return cmath.phase(complex(a, b))",
        "broken": "import cmath\ndef phase(a, b):\n  return float('nan')",
        "test_list": ["assert phase(-1,-0.0) == -3.141592653589793", "assert phase(0,1j.imag)==1.5707963267948966"],
    },
]
