"""From a TOML file and overrides to a validated `RunConfig`, and back."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from pytrain.config.checks import MODEL_CHECKS, RUN_CHECKS, Check, Problem, find_problems
from pytrain.config.model import ModelConfig, Section, flat_values
from pytrain.config.problems import field_problem, unknown_key
from pytrain.config.run import RunConfig
from pytrain.errors import UserError
from pytrain.presets import PRESETS, find_preset
from pytrain.suggest import close_to

SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in RunConfig.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run from a TOML file (or from the `run.toml` of a run folder).

    Args:
        path: the file.
        overrides: `section.key=value` each; the value is TOML, and what is not TOML is text.

    Raises:
        UserError: with every problem of the file and the overrides, one line each.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "run.toml"
    data = read_toml(path)
    origins = {}
    for override in overrides:
        origins[_apply_override(data, override)] = f"--set {override}"
    return build(data, str(path), origins)


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; a `UserError` names the file (and line) that cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; `pytrain init --preset NAME` writes a run.toml to start from"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None


def build(
    data: Mapping[str, Any], source: str = "configuration", origins: Mapping[str, str] | None = None
) -> RunConfig:
    """Validate the tables of a run.

    Args:
        data: section -> table, as a TOML parser gives them.
        source: name of the file, for messages.
        origins: dotted key -> name of where its value comes from, for keys not from `source`.
    """
    tables: dict[str, Any] = {name: {} for name in SECTIONS} | {name: _frozen(table) for name, table in data.items()}
    problems: list[Problem] = []
    if isinstance(tables["model"], dict):
        tables["model"], problems = _expand_model(tables["model"])
    try:
        config = RunConfig.model_validate(tables)
    except ValidationError as error:
        problems += _all_problems(error, tables, RUN_CHECKS, _unknown_preset(problems))
    if problems:
        raise _as_error(problems, source, origins or {})
    return config


def build_model(data: Mapping[str, Any], source: str = "configuration") -> ModelConfig:
    """Validate the keys of a model alone (`preset` allowed); problems as in `build`."""
    table, problems = _expand_model(_frozen(data))
    try:
        model = ModelConfig.model_validate(table)
    except ValidationError as error:
        problems += _all_problems(error, {"model": table}, MODEL_CHECKS, _unknown_preset(problems), ("model",))
    if problems:
        raise _as_error(problems, source, {})
    return model


def model_preset(name: str, **overrides: str | int | float | bool) -> ModelConfig:
    """The model of a preset with some of its keys overridden: `model_preset("gpt2-tiny", layers=3)`.

    Raises:
        UserError: no such preset, an unknown key, or a shape that cannot be; one line for each.
    """
    return build_model({**find_preset(name).model, **overrides}, f"preset {name}")


def resolved_toml(config: RunConfig) -> str:
    """The whole configuration as TOML, defaults and presets written out; `load` gives an equal one back."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def _frozen(value: Any) -> Any:
    """Lists as tuples, all the way down: the configuration is immutable, and its types are strict."""
    if isinstance(value, Mapping):
        return {key: _frozen(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_frozen(entry) for entry in value)
    return value


def _expand_model(table: dict[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Replace `preset` by the keys it stands for, under those given, and take out a `dropout` of zero."""
    problems = []
    table = dict(table)
    dropout = table.pop("dropout", 0)
    if isinstance(dropout, bool) or dropout != 0:
        problems.append(
            Problem(
                "model.dropout",
                f"model.dropout is {dropout!r}, and only 0 is possible: everything random is "
                f"counter-based, so that a run repeats on any grid, and there is no dropout; remove it",
            )
        )
    preset = table.pop("preset", None)
    if isinstance(preset, str) and preset in PRESETS:
        table = {**PRESETS[preset].model, **table}
    elif preset is not None:
        advice = close_to(str(preset), PRESETS) or f"; there are {', '.join(PRESETS)}"
        sentence = f"model.preset {_shown(preset)} is not known{advice}"
        problems.append(Problem("model.preset", sentence))
    return table, problems


def _unknown_preset(problems: list[Problem]) -> bool:
    return any(problem.key == "model.preset" for problem in problems)


def _shown(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _apply_override(data: dict[str, Any], override: str) -> str:
    """Set one key in the tables; gives the dotted key back."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise UserError(f"--set {override} is not of the form section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    table: Any = data
    for depth, part in enumerate(parts[:-1], 1):
        table = _list_entry(table, part, override) if isinstance(table, list) else table.setdefault(part, {})
        if not isinstance(table, dict | list):
            raise UserError(f"--set {override}: {'.'.join(parts[:depth])} is a value, not a table")
    if isinstance(table, list):
        _list_entry(table, parts[-1], override)
        table[int(parts[-1])] = value
    else:
        table[parts[-1]] = value
    return ".".join(parts)


def _list_entry(entries: list[Any], index: str, override: str) -> Any:
    if not index.isdecimal() or int(index) >= len(entries):
        raise UserError(f"--set {override}: the list has {len(entries)} entries, counted from 0; there is no {index}")
    return entries[int(index)]


def _all_problems(
    error: ValidationError,
    tables: Mapping[str, Any],
    checks: tuple[Check, ...],
    unknown_preset: bool,
    prefix: tuple[str, ...] = (),
) -> list[Problem]:
    """All that is wrong with the tables: each field's own error, then the rules over the right ones.

    Under an unknown preset, keys missing from the model are no errors of their own.
    """
    problems, failing = [], set()
    for entry in error.errors(include_url=False):
        if entry["type"] in ("checks", "default_factory_not_called"):
            continue  # the first are found again below, the second only follow from another error
        location = prefix + entry["loc"]
        failing.add(".".join(str(part) for part in location[:2]))
        if entry["type"] == "extra_forbidden":
            problems.append(unknown_key(location, SECTIONS))
        elif not (entry["type"] == "missing" and location[0] == "model" and unknown_preset):
            problems.append(field_problem(location, entry))
    return problems + find_problems(checks, _known_values(tables, failing))


def _known_values(tables: Mapping[str, Any], failing: set[str]) -> dict[str, Any]:
    """The values that can be relied on, though some keys of `tables` fail: valid ones, and defaults."""
    values: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        table = tables.get(name)
        if not isinstance(table, dict):
            continue
        try:
            values.update(flat_values(name, section.model_validate(table)))
            continue
        except ValidationError:
            own: dict[str, Any] = {}
        for key, field in section.model_fields.items():
            if f"{name}.{key}" in failing:
                continue
            if key in table:
                own[key] = table[key]
            elif not field.is_required():
                try:
                    own[key] = field.get_default(call_default_factory=True, validated_data=own)
                except KeyError:
                    continue  # follows from a key that fails
        values.update({f"{name}.{key}": value for key, value in own.items()})
    return values


def _as_error(problems: list[Problem], source: str, origins: Mapping[str, str]) -> UserError:
    """One error for all problems, in the order of the sections; a single one is a single sentence."""

    def origin(problem: Problem) -> str | None:
        return next((text for key, text in origins.items() if f"{problem.key}.".startswith(f"{key}.")), None)

    order = {name: index for index, name in enumerate(SECTIONS)}
    problems = sorted(problems, key=lambda problem: order.get(problem.key.split(".")[0], -1))
    if len(problems) == 1:
        return UserError(f"{origin(problems[0]) or source}: {problems[0].sentence}")
    lines = [f"{source} has {len(problems)} problems:"]
    for problem in problems:
        place = origin(problem)
        lines.append(f"  {place}: {problem.sentence}" if place else f"  {problem.sentence}")
    return UserError("\n".join(lines))
