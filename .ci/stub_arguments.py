"""Compare the arguments in pytrain/_native.pyi with those that pybind11 wrote into the docstrings.

stubtest finds names that are missing on either side, but cannot see the arguments of a native function.
Here every function and method of the stub must take what the module takes: the same names in the same
order, keyword-only where they are, and optional where they are.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from pytrain import _native

Arguments = tuple[tuple[str, ...], tuple[str, ...], frozenset[str]]
"""Positional names, keyword-only names, and which of all have a default."""


def arguments(function: ast.FunctionDef) -> Arguments:
    """The arguments of a definition, without `self`."""
    given = function.args
    positional = [argument.arg for argument in (*given.posonlyargs, *given.args)]
    optional = positional[len(positional) - len(given.defaults) :]
    keyword = [argument.arg for argument in given.kwonlyargs]
    optional += [name for name, value in zip(keyword, given.kw_defaults, strict=True) if value is not None]
    if positional[:1] == ["self"]:
        positional = positional[1:]
    return tuple(positional), tuple(keyword), frozenset(optional)


def stub_functions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Arguments]]:
    """Dotted name and arguments of every function and method of a stub; one row for each overload."""
    # A submodule cannot be said in the stub of one file: it is a variable of a class that only the stub has.
    submodules = {
        node.annotation.id: node.target.id
        for node in body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.annotation, ast.Name)
        and isinstance(node.target, ast.Name)
    }
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from stub_functions(node.body, f"{prefix}{submodules.get(node.name, node.name)}.")
        elif isinstance(node, ast.FunctionDef) and not any(
            isinstance(decorator, ast.Name) and decorator.id == "property" for decorator in node.decorator_list
        ):
            yield prefix + node.name, arguments(node)


def native_functions(name: str, documentation: str) -> Iterator[Arguments]:
    """Arguments of each overload that a pybind11 docstring lists."""
    last = name.rpartition(".")[2]
    for line in documentation.splitlines():
        found = re.fullmatch(rf"(?:\d+\. )?{last}(\(.*\)) -> .*", line)
        if found is None or found[1] == "(*args, **kwargs)":
            continue
        # Types are not compared, and a default may be any object's repr: only names and signs are left.
        definition = ast.parse(f"def f{simplified(found[1])}: ...").body[0]
        assert isinstance(definition, ast.FunctionDef)
        yield arguments(definition)


def simplified(signature: str) -> str:
    """A signature without types, every default replaced by 0."""
    parts, depth, start = [], 0, 1
    for position, character in enumerate(signature):
        depth += (character in "([{<") - (character in ")]}>")
        if (character == "," and depth == 1) or (character == ")" and depth == 0):
            part = signature[start:position].strip()
            start = position + 1
            if part:
                name = re.match(r"\*{0,2}\w*|/", part)
                assert name is not None
                parts.append(name[0] + ("=0" if re.search(r"(?<![=<>!])=(?!=)", part) else ""))
    return f"({', '.join(parts)})"


def unnamed(given: Arguments) -> Arguments:
    """The same with pybind11's own names (arg0, arg1, ...) for the positional arguments."""
    names = {name: f"arg{number}" for number, name in enumerate(given[0])}
    return tuple(names.values()), given[1], frozenset(names.get(name, name) for name in given[2])


def complaints(stub: Path) -> Iterator[str]:
    """One line for each function that the two sides describe differently."""
    wanted: dict[str, list[Arguments]] = {}
    for name, given in stub_functions(ast.parse(stub.read_text(encoding="utf-8")).body):
        wanted.setdefault(name, []).append(given)
    for name, stubbed in wanted.items():
        value: object = _native
        for part in name.split("."):
            value = getattr(value, part, None)
        actual = list(native_functions(name, getattr(value, "__doc__", None) or ""))
        if not actual and name.rpartition(".")[2].startswith("__"):
            continue  # Python's own, or an enumeration's
        matches = [native in (own, unnamed(own)) for own, native in zip(stubbed, actual, strict=False)]
        if len(actual) != len(stubbed) or not all(matches):
            yield f"{stub}: {name}: the stub says {stubbed}, the module {actual}"


if __name__ == "__main__":
    found = list(complaints(Path("pytrain/_native.pyi")))
    print(*found, sep="\n", end="\n" if found else "")
    sys.exit(bool(found))
