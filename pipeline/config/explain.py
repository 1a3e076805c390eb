"""Values in, settings out; every fault is explained in two lines: the key, what was found, and what is valid there."""

from __future__ import annotations

from typing import Any, get_origin

from pydantic import BaseModel, ValidationError

from duet.cache.errors import UserError, did_you_mean

KINDS = ("AdaptedModel", "DataSettings", "DocumentSettings")  # the classes of a field that may hold several


def merged(common: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`own` on top of `common`, group by group: what a group does not name stays; null switches a whole group off."""
    result = dict(common)
    for key, value in own.items():
        both_groups = isinstance(value, dict) and isinstance(common.get(key), dict)
        result[key] = merged(common[key], value) if both_groups else value
    return result


def validated(model: type[BaseModel], raw: dict[str, Any], where: str) -> Any:
    """Build settings from plain data; the first fault becomes a two-line UserError."""
    try:
        return model(**raw)
    except ValidationError as error:
        raise UserError(*_explain(model, error, where)) from None
    except TypeError as error:  # keys that are not strings
        raise UserError(f"{where}: {error}", "keys must be words") from None


def _explain(model: type[BaseModel], error: ValidationError, where: str) -> tuple[str, str]:
    errors = error.errors(include_url=False)
    # Of a group where a name would do as well, what is wrong in the group.
    first = next((e for e in errors if not (e["type"] == "string_type" and isinstance(e["input"], dict))), errors[0])
    full = [part for part in first["loc"] if part not in ("[key]", "str")]  # with the classes of one of several kinds
    loc = [part for part in full if part not in KINDS]
    key = ".".join(map(str, loc))
    if first["type"] == "extra_forbidden":
        valid = _valid_keys(model, full[:-1])
        near = _elsewhere(model, loc)
        hint = f"did you mean {near[0]}? " if near else did_you_mean(str(loc[-1]), valid, cutoff=0.5)
        return f"{where}: unknown key {key}", f"{hint}valid here: {', '.join(valid)}"
    if first["type"] == "missing":
        return f"{where}: {key} is missing", _describe(model, full)
    at = f"{where}: {key}" if key else where
    if first["type"] == "value_error":  # of our own validators, which say "what: hint"
        what, _, hint = str(first.get("ctx", {})["error"]).partition(": ")
        return f"{at}: {what}", hint or _describe(model, full)
    found = "" if isinstance(first["input"], dict) else f", found {first['input']!r}"
    quotes = ""
    if first["type"] == "string_type" and isinstance(first["input"], bool | int | float):
        quotes = 'YAML reads it as another kind of value: write it in quotes, "…"; '
    return f"{at}: {first['msg']}{found}", f"{quotes}{_describe(model, full)}"


def _node(model: type[BaseModel], loc: list[Any]) -> Any:
    """The settings class at `loc`, or None where that is not a settings class."""
    node: Any = model
    choices: list[type[BaseModel]] = []  # the classes that the last field may hold
    free_key = False  # the next part is a key or index that the user chose
    for part in loc:
        if part in KINDS:
            node = next((one for one in choices if one.__name__ == part), node)
            continue
        if free_key or node is None:
            free_key = False
            continue
        field = node.model_fields.get(str(part))
        free_key = field is not None and get_origin(field.annotation) in (dict, tuple)
        choices = _settings_in(field.annotation) if field else []
        node = choices[0] if choices else None
    return node


def _settings_in(annotation: Any) -> list[type[BaseModel]]:
    """The settings classes within an annotation such as tuple[X, ...] or dict[str, X | Y]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [one for part in getattr(annotation, "__args__", ()) for one in _settings_in(part)]


def _elsewhere(model: type[BaseModel], loc: list[Any]) -> list[str]:
    """Where a key that stands outside every group would be right."""
    groups = {name: _node(model, [name]) for name in model.model_fields} if len(loc) == 1 else {}
    return [f"{name}.{loc[0]}" for name, group in groups.items() if group and loc[0] in group.model_fields]


def _valid_keys(model: type[BaseModel], loc: list[Any]) -> list[str]:
    node = _node(model, loc)
    return list(node.model_fields) if node else []


def _describe(model: type[BaseModel], loc: list[Any]) -> str:
    node = _node(model, loc[:-1])
    field = node.model_fields.get(str(loc[-1])) if node and loc else None
    return f"{loc[-1]} is {field.description}" if field else "see the comments in configs/lab.yaml"
