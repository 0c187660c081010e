"""Named things: by table, by entry point, by import path; and calls whose arguments are checked."""

import math

import pytest

from nntk_dist.errors import ArgumentError, DataError, ModelError
from nntk_dist.registration.callables import call_checked, check_integer, check_integers, import_function
from nntk_dist.registration.registry import Registry

ROOTS = Registry("root", "acme.roots", {"square": "math:sqrt", "broken": "math:no_such_root"})
ENTRY_POINTS = "[acme.roots]\nwhole = math:isqrt\nsquare = math:exp\n"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that registers two roots."""
    metadata = tmp_path / "acme-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(tmp_path)


def test_names_of_the_table_come_first_and_are_not_replaced(package):
    assert list(ROOTS) == ["square", "broken", "whole"]
    assert ROOTS.get("square") is math.sqrt
    assert ROOTS.get("whole") is math.isqrt
    assert ROOTS.get("python:math:cbrt") is math.cbrt
    assert "whole" in ROOTS
    assert "python:math:cbrt" in ROOTS
    assert "cube" not in ROOTS


def test_a_table_cannot_be_changed():
    with pytest.raises(TypeError, match="does not support item assignment"):
        ROOTS.locations["cube"] = "math:cbrt"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("squre", r"root is 'squre'; allowed: square, broken, python:module:name; did you mean 'square'\?"),
        ("broken", r"root 'python:math:no_such_root': 'math' has no 'no_such_root'"),
        ("python:math", r"has the wrong form; write python:module:function"),
        ("python:no_such_module:f", r"cannot import 'no_such_module' \(ModuleNotFoundError: .*PYTHONPATH"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ArgumentError, match=message):
        ROOTS.get(name)


def test_what_is_no_function_is_refused():
    with pytest.raises(ArgumentError, match="root 'python:math:pi' is a float, not a function"):
        import_function("math:pi", what="root")
    with pytest.raises(ArgumentError, match="root pi is a float, not a function"):
        call_checked(math.pi, {}, what="root pi")


def scaled(value, factor=2.0, *, offset):
    if factor == 0:
        raise ModelError("factor is 0; give another")
    return value / factor + offset


def test_offered_arguments_fill_what_is_missing_and_never_replace():
    assert call_checked(scaled, {"value": 6.0}, what="scaling", offered={"offset": 1.0, "unknown": 0}) == 4.0
    assert call_checked(scaled, {"value": 6.0, "offset": 0.0}, what="scaling", offered={"offset": 1.0}) == 3.0
    assert call_checked(dict, {"any": 1}, what="mapping", offered={"other": 2}) == {"any": 1, "other": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"value": 1.0, "offst": 1.0}, r"takes no argument 'offst'; allowed: value, factor, offset; did you mean"),
        ({"value": 1.0}, "scaling needs the argument 'offset', which was not given"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        call_checked(scaled, arguments, what="scaling", failure=DataError)


def test_failures_have_the_type_that_the_caller_names_and_a_cause():
    with pytest.raises(DataError, match=r"scaling failed with \{value: 'six', offset: 1\}: TypeError: ") as caught:
        call_checked(scaled, {"value": "six", "offset": 1}, what="scaling", failure=DataError)
    assert isinstance(caught.value.__cause__, TypeError)
    with pytest.raises(ModelError, match="factor is 0; give another"):
        call_checked(scaled, {"value": 1, "factor": 0, "offset": 1}, what="scaling", failure=DataError)


def test_integers():
    check_integers("widths", (1, 2), minimum=1)
    for value in (0, True, 1.0, "1"):
        with pytest.raises(ArgumentError, match=r"depth is .*; give an integer of at least 1"):
            check_integer("depth", value, minimum=1)
    with pytest.raises(ArgumentError, match=r"widths\[1\] is 0; give an integer of at least 1"):
        check_integers("widths", [3, 0], minimum=1)
    with pytest.raises(ArgumentError, match="widths is 3; give a list of integers of at least 1"):
        check_integers("widths", 3, minimum=1)
