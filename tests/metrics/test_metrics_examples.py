"""The examples in the docstrings run, and metrics import nothing but numpy and Python's own."""

import ast
import doctest
import importlib
import pkgutil
import sys
from pathlib import Path

import pytest

import lori_manager.metrics as package

MODULES = [m.name for m in pkgutil.iter_modules(package.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_are_true(name):
    result = doctest.testmod(importlib.import_module(f"{package.__name__}.{name}"))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_metrics_need_only_numpy_and_one_another(name):
    tree = ast.parse((Path(package.__path__[0]) / f"{name}.py").read_text())
    imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    imported |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    own = {m for m in imported if m.startswith("lori_manager.")}
    others = {m for m in own if not m.startswith("lori_manager.metrics.")}
    assert others <= {"lori_manager.extras"}  # what a library is asked for with
    roots = {m.partition(".")[0] for m in imported - own}
    assert roots - sys.stdlib_module_names <= {"numpy"}
