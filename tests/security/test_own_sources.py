"""What the package's own sources may not do, and what it may be installed with."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

import lori_manager

ROOT = Path(lori_manager.__file__).parent
REPOSITORY = Path(__file__).parents[2]
SOURCES = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in ROOT.rglob("*.py")
}
MIGRATIONS = {
    f"migrations/{path.name}": path.read_text("utf-8")
    for path in (REPOSITORY / "migrations").rglob("*.py")
}
# Calls and names that run, or may run, what is in a file or a text.
CALLS = {"eval", "exec", "compile", "__import__", "execfile", "breakpoint"}
ATTRIBUTES = {
    "os": {"system", "popen", "spawnl", "spawnv", "execv", "execve", "execvp", "startfile"},
    "torch": {"load"},
    "np": {"load", "fromfile", "loadtxt"},
    "numpy": {"load", "fromfile", "loadtxt"},
    "yaml": {"load", "full_load", "unsafe_load", "load_all"},
    "tempfile": {"mktemp"},
    "subprocess": {"getoutput", "getstatusoutput", "call", "check_output"},
}
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "pty", "code",
           "xml.etree.ElementTree", "telnetlib", "ftplib"}  # fmt: skip
# File -> what it may do all the same; docs/security.md says why.
ALLOWED = {
    "sandbox/inside.py": {"exec", "compile"},  # programs of a model, confined before
    "tasks/own.py": {"exec", "compile"},  # the user's own scorer
}


def names_of_their_own(tree):
    """Uses of a parameter or a variable that has such a name: `eval` is a split, too."""
    found = set()
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            arguments = function.args
            given = {a.arg for a in (*arguments.args, *arguments.kwonlyargs)}
            given |= {
                n.id for n in ast.walk(function)
                if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
            }  # fmt: skip
            inside = (n for n in ast.walk(function) if isinstance(n, ast.Name))
            found.update(n for n in inside if n.id in given)
    return found


def found_in(tree):
    own = names_of_their_own(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in CALLS and node not in own:
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in ATTRIBUTES.get(node.value.id, ()):
                yield f"{node.value.id}.{node.attr}", node.lineno
        elif isinstance(node, ast.Import):
            yield from ((a.name, node.lineno) for a in node.names if a.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            yield node.module, node.lineno
        elif isinstance(node, ast.keyword) and node.arg in ("shell", "allow_pickle"):
            if ast.unparse(node.value) != "False":
                yield f"{node.arg}=", node.value.lineno
        elif isinstance(node, ast.keyword) and ast.unparse(node) == "trust_remote_code=True":
            yield "trust_remote_code=True", node.value.lineno


def test_nothing_in_the_package_runs_what_a_file_says():
    wrong = [
        f"{name}, line {line}: {what}"
        for name, text in (SOURCES | MIGRATIONS).items()
        for what, line in found_in(ast.parse(text))
        if what not in ALLOWED.get(name, ())
    ]
    assert not wrong


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from pickle import loads", "eval('1')", "run = exec", "torch.load(f)",
     "yaml.load(f)", "os.system('x')", "f(shell=True)", "np.load(f, allow_pickle=True)",
     "m.from_pretrained(x, trust_remote_code=True)"],
)  # fmt: skip
def test_the_look_at_the_sources_sees_what_it_is_for(line):
    assert list(found_in(ast.parse(line)))


def test_every_model_is_loaded_with_a_word_on_remote_code_and_on_pickles():
    for name, text in SOURCES.items():
        for node in ast.walk(ast.parse(text)):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if not called or node.func.attr not in ("from_pretrained", "from_config"):
                continue
            given = {keyword.arg for keyword in node.keywords}
            if name == "models.py":
                assert "trust_remote_code" in given, f"{name}, line {node.lineno}"
            else:  # diffusers' classes by name run no code of a folder
                assert name in ("pipelines.py", "diffusion/pipeline.py", "diffusion/images.py")


def test_every_exception_from_ruffs_security_rules_is_explained():
    told = (REPOSITORY / "docs" / "security.md").read_text("utf-8")
    config = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["tool"]["ruff"]
    assert "S" in config["lint"]["select"]
    ignored = {
        rule for rule in config["lint"]["ignore"] if rule.startswith("S") and rule[1].isdigit()
    }
    for name, text in SOURCES.items():
        for codes in re.findall(r"# (?:ruff: )?noqa: ([A-Z0-9, ]+)", text):
            for code in re.findall(r"\bS\d{3}\b", codes):
                assert f"| `{code}` | `{name}`" in told, f"{code} in {name}"
    for code in ignored:
        assert f"| `{code}` |" in told


def dependencies():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    return sorted({*project["dependencies"], *extras})


@pytest.mark.parametrize("line", dependencies())
def test_every_dependency_has_both_bounds(line):
    assert re.fullmatch(r"[A-Za-z0-9_.\[\]-]+>=[0-9][0-9.]*,<[0-9][0-9.]*", line), line


# Package -> the first version without a hole that a workspace could be attacked through.
MENDED = {"jinja2": (3, 1, 6), "filelock": (3, 20, 3), "pillow": (11, 3), "ray": (2, 52),
          "pyarrow": (18,), "transformers": (5, 17), "torch": (2, 11)}  # fmt: skip


@pytest.mark.parametrize("package", MENDED)
def test_no_range_reaches_down_to_a_known_hole(package):
    lines = [line for line in dependencies() if re.split(r"[\[>]", line)[0] == package]
    assert lines
    for line in lines:
        lowest = tuple(int(n) for n in re.search(r">=([0-9.]+)", line)[1].split("."))
        assert lowest >= MENDED[package], line
