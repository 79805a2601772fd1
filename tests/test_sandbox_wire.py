"""What the tests' side reads is data, or refused: the grammar of `sandbox_runner.py`, without a sandbox."""

from __future__ import annotations

import builtins
import json
import math
import sys
from collections import deque
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnres.eval import sandbox_runner as runner
from attnres.eval.sandbox_runner import ProtocolError, decode, encode, read_reply

DATA = (type(None), bool, int, float, str, bytes, bytearray, complex, range, Decimal, Fraction)
CONTAINERS = (list, tuple, set, frozenset, deque, dict)

scalars = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.complex_numbers()),
    *(st.integers(-(2**5000), 2**5000), st.decimals(), st.fractions(), st.binary().map(bytearray)),
    st.builds(range, st.integers(), st.integers(), st.integers().filter(bool)),
)
hashable = st.one_of(st.integers(), st.text(), st.tuples(st.integers(), st.text()), st.frozensets(st.integers()))
data = st.recursive(
    scalars | st.sets(hashable) | st.frozensets(hashable),
    lambda inner: st.one_of(
        *(st.lists(inner), st.lists(inner).map(tuple), st.lists(inner).map(deque), st.dictionaries(hashable, inner)),
    ),
    max_leaves=20,
)
NAMES = ["list", "tuple", "set", "frozenset", "deque", "dict", "int", "bytes", "bytearray", "complex", "range"]
NAMES += ["Fraction", "Decimal", "object", "module", "exec", "value", "raised", "exited", "builtins.eval"]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(NAMES),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(st.sampled_from(NAMES), inner).map(list),
        st.dictionaries(st.text(max_size=3), inner, max_size=2),
    ),
    max_leaves=15,
)


lines = st.one_of(
    st.binary(),
    json_values.map(lambda wire: json.dumps(wire).encode()),
    st.tuples(st.just(1), st.sampled_from(NAMES), json_values).map(lambda reply: json.dumps(reply).encode()),
)


def no_objects(value: Any) -> int:
    raise AssertionError(f"{value!r} is data")


def same(one: Any, other: Any) -> bool:
    """Equal in type and content; NaN equals itself."""
    if type(one) is not type(other):
        return False
    if isinstance(one, (list, tuple, deque)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return repr(one) == repr(other) or one == other


def made_of_data(value: Any) -> bool:
    if type(value) in CONTAINERS:
        inner = [part for pair in value.items() for part in pair] if isinstance(value, dict) else value
        return all(map(made_of_data, inner))
    return type(value) in DATA or type(value) is Stand


class Stand:
    """For an object of the candidate's."""


@given(data)
@settings(max_examples=300, deadline=None)
def test_data_arrives_as_it_was(value: Any) -> None:
    sent = json.loads(json.dumps(encode(value, no_objects)))
    assert same(decode(sent, no_objects), value)


@given(json_values)
@settings(max_examples=500, deadline=None)
def test_whatever_is_sent_is_data_or_refused(wire: Any) -> None:
    try:
        value = decode(wire, lambda number: Stand())
    except ProtocolError:
        return
    assert made_of_data(value)


@given(lines)
@settings(max_examples=500, deadline=None)
def test_whatever_is_answered_is_an_answer_or_refused(line: bytes) -> None:
    try:
        kind, content = read_reply(line, 1, lambda number: Stand())
    except ProtocolError:
        return
    if kind == "raised":
        assert type(content) in runner.EXCEPTIONS.values()
    else:
        assert kind in ("value", "exited")
        assert made_of_data(content)


def test_a_name_is_an_exception_or_refused() -> None:
    for name in {
        *dir(builtins),
        *sys.stdlib_module_names,
        *vars(runner),
        *dir(object),
        "builtins.exec",
        "os.system",
        "",
    }:
        line = json.dumps([1, "raised", [name, "x"]]).encode()
        if name in runner.EXCEPTIONS:
            kind, error = read_reply(line, 1, no_objects)
            assert (kind, type(error), error.args) == ("raised", getattr(builtins, name), ("x",))
            assert isinstance(error, Exception)
        else:
            with pytest.raises(ProtocolError):
                read_reply(line, 1, no_objects)


def test_exceptions_are_those_made_of_one_argument() -> None:
    assert len(runner.EXCEPTIONS) > 50
    for kind in runner.EXCEPTIONS.values():
        for content in ("x", 1, None, ("a", 1), [1], {"a": 1}, 2.5, b"x"):
            assert kind(content).args == (content,)


NESTED: Any = "x"
for _ in range(runner.MOST_DEPTH):
    NESTED = ["list", [NESTED]]
SIZES: list[tuple[Any, bool]] = [
    (NESTED, True),
    (["list", [NESTED]], False),
    (["tuple", [["list", [NESTED]]]], False),
    (["dict", [["k", NESTED]]], False),
    (["int", "f" * runner.MOST_HEX_DIGITS], True),
    (["int", "f" * (runner.MOST_HEX_DIGITS + 1)], False),
    (["int", "-" + "f" * runner.MOST_HEX_DIGITS], False),
    (["Decimal", f"1e{runner.MOST_DECIMAL_DIGITS}"], True),
    (["Decimal", f"1e{runner.MOST_DECIMAL_DIGITS + 1}"], False),
    (["Decimal", f"1e-{runner.MOST_DECIMAL_DIGITS + 1}"], False),
    (["Decimal", "1" * (runner.MOST_DECIMAL_DIGITS + 1)], False),
    (["Decimal", "1e99999999999999999999"], False),
    (["Decimal", "-Infinity"], True),
    (["Decimal", "sNaN"], True),
    (["set", [["Decimal", "sNaN"]]], False),
    (["Fraction", [["int", "f" * (runner.MOST_HEX_DIGITS + 1)], 1]], False),
    (["Fraction", [1, 1.5]], False),
    (["complex", [1, 1]], False),
    (["complex", [1.0, math.inf]], True),
    (["range", [0, ["int", "f" * 1000], 1]], True),
    (["object", 2**70], True),
    (["list", [1], 2], False),
    (["list"], False),
    ([], False),
    ([["list"], []], False),
    (["dict", [[1]]], False),
    (["dict", [[["list", []], 1]]], False),
    (["bytes", "0g"], False),
    (["int", "0x"], False),
]


@pytest.mark.parametrize(("wire", "fits"), SIZES)
def test_sizes_and_shapes(wire: Any, fits: bool) -> None:
    if fits:
        assert made_of_data(decode(wire, lambda number: Stand()))
    else:
        with pytest.raises(ProtocolError):
            decode(wire, lambda number: Stand())


@pytest.mark.parametrize(
    "name",
    ["__array__", "__array_interface__", "__array_struct__", "__array_priority__", "__array_ufunc__", "__dlpack__",
     "__fspath__", "__index__", "__float__", "__deepcopy__", "__copy__", "__await__", "__enter__", "__set_name__",
     "__length_hint__", "__torch_function__", "__dataframe__", "__html__"],
)  # fmt: skip
def test_libraries_of_the_tests_do_not_take_orders(name: str) -> None:
    asked: list[Any] = []

    class Other:
        def ask(self, *request: Any) -> str:
            asked.append(request)
            return "answer"

    stand_in = runner.Remote(Other(), 0)  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match=name):
        getattr(stand_in, name)
    assert asked == []
    assert stand_in.attribute == stand_in.__name__ == "answer"


@pytest.mark.parametrize("digits", [4301, 10**5, 12 * 10**6])
def test_digits_in_a_line(digits: int) -> None:
    with pytest.raises(ProtocolError):
        read_reply(b'[1, "value", ' + b"7" * digits + b"]", 1, no_objects)


def test_subclasses_arrive_as_what_they_derive_from() -> None:
    class Mine:
        __eq__ = __lt__ = __gt__ = lambda *_: True  # type: ignore[assignment]
        __hash__ = None  # type: ignore[assignment]
        __str__ = __repr__ = lambda _: "other"

    for value in (5, 2**70, 2.5, "x", b"x", (1,), [1], {1}, {1: 2}, frozenset({1}), bytearray(b"x"), deque([1]), 1j,
                  Decimal(3), Fraction(1, 2)):  # fmt: skip
        kind = type("Sub", (Mine, type(value)), {"__hash__": type(value).__hash__})
        arrived = decode(json.loads(json.dumps(encode(kind(value), no_objects))), no_objects)
        assert same(arrived, value)
