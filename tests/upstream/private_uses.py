"""Which names of other libraries our code uses although no documentation promises them, found in its syntax trees.

Private is a name that starts with one underscore and that the file does not define itself; what is imported from a
private module; and whatever is imported from the inner modules of DeepSpeed, PEFT and transformers.
"""

import ast
import functools
import importlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_INNER = ("deepspeed.", "peft.", "transformers.")
_BY_NAME = ("getattr", "setattr", "hasattr", "delattr")
# vLLM's names: the plugin refuses every version but the one that tests/serving runs
_FENCED = {"comol_ds/export/vllm_plugin.py"}
# documented in spite of the underscore
_PUBLIC = {"_exit"}


@functools.cache
def private_uses() -> dict[str, set[str]]:
    """Name -> the files of ours that use it."""
    uses: dict[str, set[str]] = defaultdict(set)
    for file, tree in _trees().items():
        for used in uses_of(tree) if file not in _FENCED else ():
            uses[used].add(file)
    return dict(uses)


def files_with(name: str) -> list[str]:
    """The files of ours in which a name stands as a word, private or not."""
    return [file for file, words in _words().items() if name in words]


def resolve(dotted: str) -> Any:
    """The object of a dotted name.

    Raises:
        ImportError, AttributeError: it does not exist.
    """
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ImportError(f"no module named {parts[0]}")


@functools.cache
def _trees() -> dict[str, ast.Module]:
    paths = [path for folder in ("comol_ds", "launch") for path in sorted((ROOT / folder).rglob("*.py"))]
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


@functools.cache
def _words() -> dict[str, set[Any]]:
    fields = ("attr", "id", "name", "arg", "value")
    return {
        file: {
            word for node in ast.walk(tree) for field in fields if isinstance(word := getattr(node, field, None), str)
        }
        for file, tree in _trees().items()
    }


def uses_of(tree: ast.Module) -> Iterator[str]:
    """The private names of other libraries that one file uses."""
    own = set(_defined(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            if node.attr not in own or _is_super(node.value):
                yield node.attr
        elif isinstance(node, ast.keyword) and node.arg and _is_private(node.arg) and node.arg not in own:
            yield node.arg
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _BY_NAME:
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            if isinstance(name, str) and _is_private(name) and name not in own:
                yield name
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("comol_ds"):
            hidden = node.module.startswith(_INNER) or any(map(_is_private, node.module.split(".")))
            yield from (alias.name for alias in node.names if hidden or _is_private(alias.name))
    yield from _overridden(tree)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_" and name not in _PUBLIC


def _is_super(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def _defined(tree: ast.AST) -> Iterator[str]:
    """Functions, classes, fields, and attributes of self."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                yield from _stored(target)


def _stored(target: ast.expr) -> Iterator[str]:
    for node in ast.walk(target):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
            yield node.attr


def _overridden(tree: ast.Module) -> Iterator[str]:
    """What our classes define, or set on self, that a class of another library has under the same private name."""
    imported = dict(_imports(tree))
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef):
            continue
        private = {name for name in _defined(node) if _is_private(name)}
        for base in map(ast.unparse, node.bases if private else []):
            first, dot, rest = base.partition(".")
            origin = imported.get(first, "comol_ds")
            if not origin.startswith("comol_ds"):
                yield from private & _names_of(resolve(origin + dot + rest))


def _names_of(cls: type) -> set[str]:
    """Attributes of a class, and those of its objects that it declares."""
    return set(dir(cls)).union(*(vars(base).get("__annotations__", ()) for base in cls.__mro__))


def _imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Name in the file -> what it stands for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield (alias.asname, alias.name) if alias.asname else (alias.name.partition(".")[0],) * 2
