"""How complex Python functions are. Plain functions that know nothing about tasks.

Complexity is McCabe's cyclomatic number: 1, plus one for each place where control can take another way.
Source: T. J. McCabe, "A Complexity Measure", IEEE Transactions on Software Engineering, SE-2(4), 1976.
"""

from __future__ import annotations

import ast
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

#: Folders with code of others, or without source.
LEFT_OUT = frozenset({"site-packages", "dist-packages", "__pycache__"})

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BRANCHES = (
    ast.If,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.ExceptHandler,
    ast.IfExp,
    ast.Assert,
    ast.comprehension,
    ast.match_case,
)


@dataclass(frozen=True)
class Function:
    """One function: its dotted name within the file, where it begins, how long and how complex it is."""

    name: str
    line: int
    lines: int
    complexity: int


@dataclass(frozen=True)
class Measured:
    """One file."""

    lines: int
    functions: list[Function]


def python_files(top: Path) -> list[Path]:
    """Return the Python files below `top`, sorted; `top` may be one file."""
    if top.is_file():
        return [top]
    found = []
    for folder, subfolders, names in os.walk(top):
        subfolders[:] = [name for name in subfolders if name not in LEFT_OUT]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(found)


def measure(path: Path) -> Measured:
    """Return what there is in one file.

    Raises:
      OSError: it cannot be read.
      SyntaxError, ValueError, RecursionError, MemoryError: it cannot be parsed (the last two: nested too
      deeply).
    """
    source = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes and the like are not what we look for
        tree = ast.parse(source, filename=str(path))
    return Measured(lines=source.count(b"\n"), functions=list(_functions(tree, "")))


def _functions(node: ast.AST, prefix: str) -> Iterator[Function]:
    """Yield each function below `node`, methods and inner functions included."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*FUNCTIONS, ast.ClassDef)):
            name = f"{prefix}{child.name}"
            if not isinstance(child, ast.ClassDef):
                lines = (child.end_lineno or child.lineno) - child.lineno + 1
                yield Function(name=name, line=child.lineno, lines=lines, complexity=1 + _branches(child))
            yield from _functions(child, f"{name}.")
        else:
            yield from _functions(child, prefix)


def _branches(node: ast.AST) -> int:
    """Count the branches below `node`; an inner function's count for itself."""
    total = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FUNCTIONS):
            continue
        if isinstance(child, BRANCHES):
            total += 1 + (len(child.ifs) if isinstance(child, ast.comprehension) else 0)
        elif isinstance(child, ast.BoolOp):
            total += len(child.values) - 1
        total += _branches(child)
    return total
