"""The plan of the house, read from the sources: imports point down, and nothing asserts."""

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lori_manager

ROOT = Path(lori_manager.__file__).parent
PACKAGE = "lori_manager"
# From the top; a module imports from its own row or from those below.
ROWS = (
    ("__main__",),
    ("cli",),
    ("workspace",),
    (
        "blaming",
        "differing",
        "forecasting",
        "gating",
        "kind_comparison",
        "benching",
        "suggesting",
        "jobs",
    ),
    ("remerging",),
    ("image_intake",),
    ("teaching", "combining", "transfer", "moving", "intake", "integrity", "doctor", "sampling"),
    ("trials", "rehearsal", "probing"),
    ("merge_inputs",),
    ("answering",),
    ("evaluation", "projecting", "placing", "replaying"),
    ("avoiding", "changes", "by_base"),
    ("context",),
    ("reporting",),
    ("auditing",),
    ("repair", "routed"),
    ("layerwise", "iteris", "soups", "grams", "calibrating"),
    ("classification", "scoring", "diffusion"),
    ("consolidation", "distillation", "blockwise", "routing"),
    ("training",),
    ("stages",),
    ("gradients", "generation", "harness", "feature_norms", "checkpoints"),
    ("graphs",),
    ("labelling",),
    ("forward",),
    ("adapters",),
    ("models", "packing", "acceleration", "metering"),
    ("tasks",),
    ("store",),
    ("comparing", "placement", "settings_file"),
    ("merging", "metrics"),
    ("engine",),
    ("kinds",),
    ("base_files", "architectures"),
    ("pipelines",),
    (
        "config",
        "records",
        "refs",
        "registry",
        "sandbox",
        "ranks",
        "extras",
        "plain",
        "rates",
        "quieting",
    ),
    ("foreign", "errors"),
)
LEVEL = {part: len(ROWS) - i for i, row in enumerate(ROWS) for part in row}
# Part -> what no module of it may import, at its top or inside a function.
FOREIGN = {
    "store": {"torch", "transformers", "peft", "accelerate", "safetensors"},
    "engine": {"peft", "transformers", "sqlalchemy", "alembic", "accelerate"},
    "merging": {"peft", "transformers", "sqlalchemy", "alembic", "accelerate"},
    "metrics": {"torch", "peft", "transformers", "sqlalchemy", "alembic", "accelerate"},
}
PEFT = "adapters"
# Imported at the top of a module, these make every command slow to start.
HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "safetensors"}
LIGHT_PARTS = {
    "__main__", "cli", "workspace", "forecasting", "gating", "teaching", "combining", "transfer",
    "kind_comparison", "benching", "suggesting", "jobs", "probing", "rates", "placement", "placing",
    "settings_file", "intake", "integrity", "doctor", "evaluation", "projecting", "avoiding",
    "replaying", "merge_inputs", "context", "kinds", "auditing", "blaming", "differing",
    "remerging", "answering", "changes", "comparing", "plain", "reporting", "models", "store",
    "config", "architectures", "records", "refs", "registry", "sandbox", "ranks", "extras",
    "by_base", "errors", "image_intake", "sampling", "pipelines", "base_files", "foreign", "moving",
}  # fmt: skip


@cache
def sources():
    """Module name -> its syntax tree and text."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = [PACKAGE, *path.relative_to(ROOT).with_suffix("").parts]
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text("utf-8")
        found[name] = (ast.parse(text), text)
    return found


def imports(tree, modules, module=PACKAGE):
    """(line, imported name) of every import, wherever in the file it stands.

    `from package import module` names the module; relative imports are made absolute.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                source = ".".join([*module.split(".")[: -node.level], *filter(None, [source])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield node.lineno, inner if inner in modules else source


def part(module):
    """The row's word for a module of the package; the package itself is ''."""
    return [*module.split("."), ""][1]


def edges():
    """(importer, line, imported) of all imports inside the package."""
    modules = sources()
    for module, (tree, _) in modules.items():
        for line, name in imports(tree, modules, module):
            if name.split(".")[0] == PACKAGE:
                yield module, line, name


def at_import(tree):
    """Statements that run when the module is imported."""
    todo = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo.extend(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            todo.extend(n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt))


def test_every_part_of_the_package_has_its_place_in_the_plan():
    assert len(sources()) > 50
    parts = {part(module) for module in sources()} - {""}
    assert parts - LEVEL.keys() == set(), "say in ROWS where the new part stands"
    assert LEVEL.keys() - parts == set(), "ROWS names what is no longer there"


def test_imports_point_down():
    upward = [
        f"{module}, line {line}: {name}"
        for module, line, name in edges()
        if module != PACKAGE and part(name) and LEVEL[part(name)] > LEVEL[part(module)]
    ]
    assert not upward


def test_there_is_no_import_cycle():
    graph = {module: set() for module in sources()}
    for module, _, name in edges():
        if name in graph and module != PACKAGE:
            graph[module].add(name)
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as e:
        pytest.fail(" -> ".join(e.args[1]))
    assert len(order) == len(graph)


def test_there_is_no_cycle_between_the_parts_of_the_house():
    graph = {name: set() for name in LEVEL}
    for module, _, name in edges():
        if module != PACKAGE and part(name) and part(name) != part(module):
            graph[part(module)].add(part(name))
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        pytest.fail(" -> ".join(e.args[1]))


def test_nothing_inside_imports_from_the_package_itself_but_its_version():
    modules = sources()
    own = [
        f"{module}, line {node.lineno}"
        for module, (tree, _) in modules.items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Import) and any(a.name == PACKAGE for a in node.names))
        or (
            isinstance(node, ast.ImportFrom)
            and node.module == PACKAGE
            and any(
                f"{PACKAGE}.{a.name}" not in modules and a.name != "__version__" for a in node.names
            )
        )
    ]
    assert not own


def test_every_import_inside_the_package_names_a_module_that_is_there():
    lost = [f"{m}, line {line}: {n}" for m, line, n in edges() if n not in sources()]
    assert not lost


def test_imports_are_absolute():
    relative = [
        f"{module}, line {node.lineno}"
        for module, (tree, _) in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not relative


@pytest.mark.parametrize("name", FOREIGN)
def test_parts_stay_clear_of_the_libraries_that_are_not_theirs(name):
    modules = sources()
    foreign = [
        f"{module}, line {line}: {imported}"
        for module, (tree, _) in modules.items()
        if part(module) == name
        for line, imported in imports(tree, modules)
        if imported.split(".")[0] in FOREIGN[name]
    ]
    assert not foreign


def test_only_the_adapters_import_peft():
    modules = sources()
    others = [
        f"{module}, line {line}"
        for module, (tree, _) in modules.items()
        if part(module) != PEFT
        for line, imported in imports(tree, modules)
        if imported.split(".")[0] == "peft"
    ]
    assert not others


def test_what_a_command_imports_at_its_start_imports_nothing_heavy():
    modules = sources()
    heavy = [
        f"{module}, line {node.lineno}: {name}"
        for module, (tree, _) in modules.items()
        if part(module) in LIGHT_PARTS
        for node in at_import(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for _, name in imports(node, modules)
        if name.split(".")[0] in HEAVY
    ]
    assert not heavy


def test_no_statement_asserts():
    found = []
    for module, (tree, text) in sources().items():
        lines = text.splitlines()
        found += [
            f"{module}, line {node.lineno}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Assert) and "# noqa" not in lines[node.lineno - 1]
        ]
    assert not found


def test_the_reader_of_imports_sees_them_wherever_they_stand():
    tree = ast.parse(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from lori_manager.cli import app\n"
        "def f():\n    import peft.tuners\n    from lori_manager import models, __version__\n"
        "from . import config\nfrom .store import files\n"
    )
    assert sorted(imports(tree, sources(), "lori_manager.records")) == [
        (1, "typing"),
        (3, "lori_manager.cli.app"),
        (5, "peft.tuners"),
        (6, "lori_manager"),
        (6, "lori_manager.models"),
        (7, "lori_manager.config"),
        (8, "lori_manager.store.files"),
    ]
    names = [ast.unparse(n) for n in at_import(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    assert not any("peft" in n or "cli" in n for n in names)
