"""What each key means, made from the descriptions in the classes: `pytrain config` and `pytrain init`."""

import textwrap
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import tomli_w
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pytrain.config.load import SECTIONS, build
from pytrain.config.model import Section
from pytrain.config.problems import inner_section
from pytrain.config.run import DataSection
from pytrain.errors import UserError
from pytrain.presets import PRESETS, find_preset
from pytrain.suggest import close_to

WIDTH = 100

# Where the commented file expects the prepared corpora.
TRAIN, HELDOUT = "data/train", "data/heldout"


@dataclass(frozen=True)
class Key:
    """One key of the configuration, in words."""

    name: str
    kind: str
    default: str | None
    """As TOML or in words; None where the key has to be given."""
    description: str


def all_keys() -> list[Key]:
    """Every key, in the order of the sections; keys inside lists without an index (`data.train.prefix`)."""
    keys = []
    for name, section in SECTIONS.items():
        if name == "model":
            keys.append(
                Key(
                    "model.preset",
                    " | ".join(PRESETS),
                    "none",
                    "A named model; other keys of [model] override its own.",
                )
            )
        keys += _keys_below(name, section)
        if name == "model":
            keys.append(Key("model.dropout", "0", "0", "Accepted for compatibility; there is no dropout."))
    return keys


def explain(name: str | None) -> str:
    """Text about one key, about a section, or (None) about everything.

    Raises:
        UserError: no such key or section.
    """
    keys = all_keys()
    if name is None:
        width = max(len(key.name) for key in keys)
        lines = [f"{key.name:{width}}  {'(required)' if key.default is None else key.default}" for key in keys]
        return "\n".join(
            [*lines, "", "`pytrain config KEY` explains one of them, `pytrain config SECTION` a section."]
        )
    chosen = [key for key in keys if key.name == name] or [key for key in keys if key.name.startswith(f"{name}.")]
    if not chosen:
        known = [key.name for key in keys]
        same_last_part = [known_name for known_name in known if known_name.split(".")[-1] == name]
        guess = f'; did you mean "{same_last_part[0]}"?' if same_last_part else close_to(name, [*known, *SECTIONS])
        raise UserError(f'"{name}" is not a key or section of the configuration{guess}')
    title = [f"[{name}] {_summary(SECTIONS[name])}"] if name in SECTIONS else []
    return "\n\n".join([*title, *map(_paragraph, chosen)])


def commented_toml(preset: str) -> str:
    """A run.toml for a preset in which every key stands with its description; `load` accepts it as it is.

    Raises:
        UserError: no such preset.
    """
    chosen = find_preset(preset)
    steps = int(chosen.recipe["run.steps"])
    written: dict[str, Any] = {
        "run.folder": f"runs/{preset}",
        "model.preset": preset,
        "tokenizer.path": "data/tokenizer.model",
        "checkpoint.every": max(steps // 20, 1),
        "checkpoint.keep_last": 3,
        "evaluation.every": max(steps // 40, 1),
        **chosen.recipe,
    }
    resolved = build(_nested({"data.train": TRAIN, "data.heldout": HELDOUT, **written}))
    lines = [
        *_comment(f"A run of {preset}: {chosen.source}."),
        "# Train with `pytrain train THIS_FILE`; explain a key with `pytrain config KEY`.",
        "# A key behind a # stands at its default: take the # away to change it.",
    ]
    for name, section in SECTIONS.items():
        lines += ["", "", f"[{name}]", *_comment(_summary(section))]
        for key in all_keys():
            table, _, last = key.name.partition(".")
            if table != name or "." in last or key.name in ("data.train", "data.heldout", "model.dropout"):
                continue
            lines += ["", *_comment(key.description)]
            if key.name in written:
                lines.append(_assignment(last, written[key.name]))
            else:
                value = getattr(getattr(resolved, name), last)
                lines.append(f"#{last} =   (not set)" if value is None else f"#{_assignment(last, value)}")
        if name == "data":
            lines += _corpora()
    return "\n".join(lines) + "\n"


def _nested(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    tables: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        table, _, last = name.partition(".")
        tables.setdefault(table, {})[last] = value
    return tables


def _corpora() -> list[str]:
    fields = DataSection.model_fields
    return [
        "",
        *_comment(fields["train"].description or ""),
        "[[data.train]]",
        _assignment("prefix", TRAIN),
        _assignment("weight", 1.0),
        "",
        *_comment(fields["heldout"].description or ""),
        "[[data.heldout]]",
        _assignment("prefix", HELDOUT),
    ]


def _keys_below(prefix: str, section: type[Section]) -> list[Key]:
    keys = []
    for name, field in section.model_fields.items():
        dotted = f"{prefix}.{name}"
        keys.append(Key(dotted, _kind(field.annotation), _default(field), field.description or ""))
        if (inner := inner_section(field.annotation)) is not None:
            keys += _keys_below(dotted, inner)
    return keys


def _kind(annotation: Any) -> str:
    """The type of a key in words, with the values it may have."""
    words = {int: "whole number", float: "number", bool: "true or false", str: "text"}
    if annotation in words:
        return words[annotation]
    arguments = [argument for argument in get_args(annotation) if argument not in (type(None), Ellipsis)]
    if get_origin(annotation) is Literal:
        return " | ".join(str(argument).lower() if argument is True else str(argument) for argument in arguments)
    if get_origin(annotation) is tuple:
        return f"list of: {_kind(arguments[0])}"
    if arguments:
        return _kind(arguments[0])
    return "table"


def _default(field: FieldInfo) -> str | None:
    extra = field.json_schema_extra
    if isinstance(extra, dict) and "default_text" in extra:
        return str(extra["default_text"])
    if field.default is PydanticUndefined:
        return None
    if field.default is None:
        return "none"
    return _toml(field.default)


def _toml(value: Any) -> str:
    if isinstance(value, tuple):  # the library would put each entry on a line of its own
        return f"[{', '.join(map(_toml, value))}]"
    return tomli_w.dumps({"x": value}).removeprefix("x = ").strip()


def _assignment(key: str, value: Any) -> str:
    return f"{key} = {_toml(value)}"


def _summary(section: type[Section]) -> str:
    return (section.__doc__ or "").strip().split("\n\n")[0]


def _paragraph(key: Key) -> str:
    head = f"{key.name}\n"
    default = "has to be given" if key.default is None else f"default {key.default}"
    body = f"{key.description}\n{key.kind}; {default}"
    return head + textwrap.indent("\n".join(textwrap.fill(line, WIDTH - 4) for line in body.split("\n")), "    ")


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, WIDTH - 2)]
