"""pydantic's errors in the words of a configuration file."""

from collections.abc import Mapping
from typing import Any

from pydantic_core import ErrorDetails

from pytrain.config.checks import Problem
from pytrain.config.model import Section
from pytrain.suggest import closest

Location = tuple[int | str, ...]

# Keys that the loader takes out of [model] before it is validated.
LOADER_KEYS = ("preset", "dropout")

_KINDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text in quotes",
    "tuple_type": "a list",
    "model_type": "a table",
}
_BOUNDS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


def field_problem(location: Location, entry: ErrorDetails) -> Problem:
    """The sentence for one field's error of any kind but an unknown key."""
    key = ".".join(str(part) for part in location)
    kind, value, context = entry["type"], entry["input"], entry.get("ctx", {})
    if kind == "missing":
        sentence = f"is missing; `pytrain config {key_to_explain(location)}` says what it is"
        if len(location) == 1:
            sentence = "is a missing section"
    elif kind == "literal_error":
        sentence = _not_allowed(value, str(context["expected"]))
    elif kind in _KINDS:
        sentence = f"must be {_KINDS[kind]}, not {_shown(value)}{_corrected(kind, value)}"
    elif kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        sentence = f"must be {words} {context[bound]}, not {_shown(value)}"
    elif kind in ("too_short", "string_too_short"):
        sentence = "is empty"
    elif kind == "value_error":
        sentence = str(context["error"])
    else:
        sentence = f"is wrong: {entry['msg']}"
    return Problem(key, f"{key} {sentence}")


def key_to_explain(location: Location) -> str:
    """The dotted key without list indices, as `pytrain config` takes it."""
    return ".".join(str(part) for part in location if not isinstance(part, int))


def unknown_key(location: Location, sections: Mapping[str, type[Section]]) -> Problem:
    """The sentence for a key that is not known, with the likeliest one that is."""
    key = ".".join(str(part) for part in location)
    if len(location) == 1:
        sentence = f"[{key}] is not a section"
        guess = closest(key, sections)
        if guess is None and (owner := _section_with(key, sections)):
            return Problem(key, f'"{key}" is not a section; did you mean {owner}.{key}?')
        return Problem(
            key, sentence + (f"; did you mean [{guess}]?" if guess else f"; there are {', '.join(sections)}")
        )
    *path, name = location
    known = _keys_of(path, sections)
    guess = closest(str(name), known)
    owner = _section_with(str(name), sections)
    if guess is not None:
        advice = f"did you mean {'.'.join(map(str, path))}.{guess}?"
    elif owner is not None:
        advice = f"did you mean {owner}.{name}?"
    else:
        advice = f"there are {', '.join(known)}"
    return Problem(key, f"{key} is not a key; {advice}")


def _keys_of(path: list[int | str], sections: Mapping[str, type[Section]]) -> list[str]:
    """Names of the keys of the table at `path`."""
    section: Any = sections[str(path[0])]
    for part in path[1:]:
        if not isinstance(part, int):
            section = inner_section(section.model_fields[part].annotation)
    return [*section.model_fields, *(LOADER_KEYS if path == ["model"] else ())]


def inner_section(annotation: Any) -> type[Section] | None:
    """The section inside `tuple[Section, ...]` or `Section | None`, if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if (found := inner_section(argument)) is not None:
            return found
    return None


def _section_with(name: str, sections: Mapping[str, type[Section]]) -> str | None:
    """The only section that has a key of this name."""
    owners = [section for section in sections if name in sections[section].model_fields]
    return owners[0] if len(owners) == 1 else None


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, tuple):
        return "a list"
    return f"{value}"


def _corrected(kind: str, value: Any) -> str:
    """How the value would have to be written, where that is plain."""
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if kind in ("int_type", "float_type") and isinstance(value, str):
        try:
            number = int(value) if kind == "int_type" else float(value)
        except ValueError:
            return ""
        return f"; write {number} without quotes"
    if kind == "bool_type" and str(value).lower() in ("true", "false"):
        return f"; write {str(value).lower()} without quotes"
    if kind == "string_type" and not isinstance(value, Mapping | tuple):
        return f'; write "{_shown(value)}"'
    return ""


def _not_allowed(value: Any, expected: str) -> str:
    """`expected` is pydantic's list: 'a', 'b' or 'c'."""
    allowed = [part.strip("'") for part in expected.replace(" or ", ", ").split(", ")]
    shown = ", ".join(f'"{word}"' if "'" in expected else word.lower() for word in allowed)
    guess = closest(str(value), allowed) if isinstance(value, str) else None
    advice = f'; did you mean "{guess}"?' if guess else ""
    return f"must be {'one of ' if len(allowed) > 1 else ''}{shown}, not {_shown(value)}{advice}"
