"""The rooms of the package: which may import which, and who may touch what is private.

The source is read, not run. Type-checking imports count: a reader follows them too.
"""

import ast
import functools
from collections import defaultdict
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_lnscale"

# Lowest first: a room imports from itself and from the rooms before it.
ROOMS = ("core", "measuring", "checkpoints", "evaluation", "pruning", "diagnosis", "training", "hooks", "serving",
         "integrations", "commands")  # fmt: skip
# Packages whose private names are touched in hooks/ alone, where each has its reason.
OTHERS = ("transformers", "peft", "trl", "accelerate", "datasets")
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent.name != "startup")


@functools.cache
def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def own_names():
    """What the package defines, or sets on an object."""
    return {
        node.attr if isinstance(node, ast.Attribute) else node.name
        for path in FILES
        for node in ast.walk(tree_of(path))
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        or (isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store))
    }


def module_of(path):
    parts = ("hf_lnscale", *path.relative_to(PACKAGE).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def room_of(module):
    return module[1] if len(module) > 1 and (PACKAGE / module[1]).is_dir() else None


def imports_of(path):
    """(module, name) of everything that a file imports, absolute, wherever in the file the import stands."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path)[:-1]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((tuple(alias.name.split(".")), None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            for alias in node.names:
                inner = PACKAGE.joinpath(*module[1:], alias.name)
                is_module = module[0] == "hf_lnscale" and (inner.with_suffix(".py").is_file() or inner.is_dir())
                yield ((*module, alias.name), None) if is_module else (module, alias.name)


def shown(path):
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.slow
def test_imports_run_downward():
    wrong = []
    for path in FILES:
        here = room_of(module_of(path))
        for module, _ in imports_of(path):
            there = room_of(module) if module[0] == "hf_lnscale" else None
            if here and there and ROOMS.index(there) > ROOMS.index(here):
                wrong.append(f"{shown(path)} imports {'.'.join(module)}")
    assert wrong == []


def test_no_circle():
    graph = defaultdict(set)
    names = {module_of(path) for path in FILES}
    for path in FILES:
        for module, name in imports_of(path):
            target = (*module, name) if (*module, name) in names else module
            if target in names and target != module_of(path):
                graph[module_of(path)].add(target)
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join(".".join(one) for one in [*path[path.index(module) :], module])
        if module not in done:
            path.append(module)
            for target in sorted(graph[module]):
                visit(target)
            done.add(path.pop())

    for module in sorted(names):
        visit(module)


@pytest.mark.slow
def test_no_private_name_crosses_a_file():
    wrong = [
        f"{shown(path)}: {'.'.join(module)}.{name}"
        for path in FILES
        for module, name in imports_of(path)
        if module[0] == "hf_lnscale" and name and name.startswith("_") and name not in ("__version__",)
    ]
    assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=shown)
def test_private_parts_of_other_libraries_are_touched_in_hooks_alone(path):
    if room_of(module_of(path)) == "hooks":
        return
    wrong = [
        f"{'.'.join(module)}.{name}"
        for module, name in imports_of(path)
        if module[0] in OTHERS and any(part.startswith("_") for part in (*module[1:], name or ""))
    ]
    tree = tree_of(path)
    fields = {
        node.target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    # Tensors and children of a torch module, and documented names of the standard library.
    known = own_names() | fields | {"_parameters", "_modules", "_buffers", "_getframe", "_exit", "_asdict", "_replace"}
    wrong += [
        f"line {node.lineno}: .{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and node.attr not in known
        and not (isinstance(node.value, ast.Name) and node.value.id == "self")  # what a subclass inherits
    ]
    assert wrong == []


def test_only_the_record_reads_and_writes_our_keys():
    """`vars(config)[...]` or a literal key of ours anywhere else would be a second reader of config.json."""
    keys = {"ln_scaling_folded", "dropped_layers", "_ln_scaling_on_disk"}
    wrong = [
        f"{shown(path)}, line {node.lineno}: {node.value!r}"
        for path in FILES
        if shown(path) != "core/record.py"
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Constant) and node.value in keys
    ]
    assert wrong == []


def test_no_file_has_a_name_that_says_nothing():
    # commands/run.py is the verb `hf-lnscale run`.
    names = [path.stem for path in FILES if path.name != "__init__.py" and room_of(module_of(path)) != "commands"]
    assert {"run", "report", "data", "utils", "helpers", "misc", "common"}.isdisjoint(names)
