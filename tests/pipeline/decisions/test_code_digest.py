"""The digest of a user's code: it notices instructions and constants, not comments, and no process matters."""

import os
import subprocess
import sys
import types

import pytest

from pipeline.decisions.code_digest import code_digest
from tests.pipeline.tools import ROOT

TEXT = """
import math
from dataclasses import dataclass

LIMIT = 3
NAMES = ["a", "b"]

def helper(x, power=2):
    return {"a", "b", "c", "d"} & {x} or math.sqrt(x ** power)

@dataclass(frozen=True)
class Solver:
    tolerance: float = 1e-6

    @property
    def needs(self):
        return LIMIT

    @staticmethod
    def of(x):
        return [helper(each) for each in x]

    def solve(self, kernel):
        return lambda y: kernel + y
"""


def digest(text):
    module = types.ModuleType("own_solvers")
    sys.modules["own_solvers"] = module
    try:
        exec(text, vars(module))
        return code_digest(module.Solver)
    finally:
        del sys.modules["own_solvers"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("LIMIT = 3", "LIMIT = 4"),
        ('["a", "b"]', '["a", "c"]'),
        ("power=2", "power=3"),
        ("math.sqrt", "math.cbrt"),
        ("1e-6", "1e-7"),
        ("return LIMIT", "return len(NAMES)"),
        ("[helper(each)", "[helper(-each)"),
        ("kernel + y", "kernel - y"),
        ("class Solver:", "class Solver(dict):"),
    ],
)
def test_changed_code_is_noticed(old, new):
    assert TEXT.count(old) == 1
    assert digest(TEXT.replace(old, new)) != digest(TEXT)


@pytest.mark.parametrize(("old", "new"), [("LIMIT = 3", "# why\n\nLIMIT = 3"), ("import math", "import os, math")])
def test_comments_and_imports_are_not(old, new):
    assert digest(TEXT.replace(old, new)) == digest(TEXT)


def test_other_processes_find_the_same(tmp_path):
    (tmp_path / "own_solvers.py").write_text(TEXT)
    program = (
        "import own_solvers; from pipeline.decisions.code_digest import code_digest as d; print(d(own_solvers.Solver))"
    )
    found = set()
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
        command = [sys.executable, "-c", program]
        found.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip())
    assert found == {digest(TEXT)}
