"""Every fault of the catalogue has its tests, or says why not; marks and list say the same."""

import ast
import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.suites import ALL

REPOSITORY = Path(__file__).parents[2]
FAULTS: dict[str, dict[str, Any]] = tomllib.loads(
    (REPOSITORY / "tests/faults.toml").read_text(encoding="utf-8")
)
# The catalogue's letters in its order, each with its highest number.
HIGHEST = {
    "H": 18,
    "O": 17,
    "K": 20,
    "C": 16,
    "P": 19,
    "S": 22,
    "L": 7,
    "D": 3,
    "T": 3,
    "M": 2,
    "B": 4,
    "Q": 5,
    "R": 4,
    "X": 3,
}
TOTAL = 143
SUBJECTS = {"order API", "relay", "mail engine", "operators", "three brokers"}
FOLDERS = ("tests", "order_service/tests", "mail_service/tests")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def trees() -> dict[str, ast.Module]:
    """Parse every file that could hold a test or a marker."""
    return {
        path.relative_to(REPOSITORY).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for folder in FOLDERS
        for path in (REPOSITORY / folder).rglob("*.py")
    }


def functions(body: Iterable[ast.stmt], within: str) -> Iterator[tuple[str, Function]]:
    """Give the test functions, those in classes too, by their pytest ids."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from functions(node.body, f"{within}::{node.name}")
        elif isinstance(node, Function) and node.name.startswith("test_"):
            yield f"{within}::{node.name}", node


def is_marker(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and ast.unparse(node).endswith("mark.fault")


def marked_with(function: Function) -> list[list[str]]:
    """Return the ids of each of its fault markers."""
    return [
        [ast.literal_eval(argument) for argument in decorator.args]
        for decorator in function.decorator_list
        if isinstance(decorator, ast.Call) and is_marker(decorator.func)
    ]


TREES = trees()
TESTS = {
    test: marked_with(function)
    for path, tree in TREES.items()
    if Path(path).name.startswith("test_")
    for test, function in functions(tree.body, path)
}
LISTED = {
    (fault, test.partition("[")[0])
    for fault, entry in FAULTS.items()
    for test in entry.get("tests", ())
}
MARKED = {(fault, test) for test, marks in TESTS.items() for ids in marks for fault in ids}


def is_run(test: str) -> bool:
    """Say whether the file of a test lies in the folder of a suite."""
    return any(Path(test.partition("::")[0]).is_relative_to(suite.folder) for suite in ALL)


def test_every_fault_is_there_in_order() -> None:
    """The ids are the catalogue's: no gap, none invented, none out of its place."""
    expected = [f"F-{letter}{n}" for letter, last in HIGHEST.items() for n in range(1, last + 1)]
    assert list(FAULTS) == expected
    assert len(FAULTS) == TOTAL


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_says_what_comes_of_it_and_who_checks_that(fault: str) -> None:
    """Beside `what` it has one of `tests`, `none` and `later`, and neither is empty."""
    entry = dict(FAULTS[fault])
    assert entry.pop("what").strip()
    ((kind, value),) = entry.items()
    assert kind in {"tests", "none", "later"}
    if kind == "tests":
        assert value
        assert len(set(value)) == len(value)
    else:
        assert value.strip()
    if kind == "later":
        assert value.partition(":")[0] in SUBJECTS


def test_every_test_named_is_run() -> None:
    """It is in the file that is said, and the file in the folder of a suite."""
    named = {test for _, test in LISTED}
    assert sorted(named - set(TESTS)) == []
    assert [test for test in sorted(named) if not is_run(test)] == []


def test_every_test_told_of_exists() -> None:
    """What `none` and `later` say of a test or its file outlives no renaming."""
    known = {test.rpartition("::")[2] for test in TESTS} | {Path(path).stem for path in TREES}
    texts = [entry.get("none", entry.get("later", "")) for entry in FAULTS.values()]
    assert sorted(set(re.findall(r"\btest_\w+", " ".join(texts))) - known) == []


def test_every_test_named_carries_the_marker() -> None:
    """Whoever reads a test that is listed sees which fault it is there for."""
    assert sorted(LISTED - MARKED) == []


def test_every_marker_is_in_the_list() -> None:
    """A test that says it is directed at a fault is listed under it."""
    assert sorted(MARKED - LISTED) == []


@pytest.mark.parametrize("path", sorted(TREES))
def test_a_marker_stands_over_a_test_and_names_a_fault(path: str) -> None:
    """Anywhere else, or empty, it would count for nothing."""
    found = sum(map(is_marker, ast.walk(TREES[path])))
    counted = [
        ids for test, marks in TESTS.items() if test.startswith(f"{path}::") for ids in marks
    ]
    assert all(counted)
    assert len(counted) == found
