"""JSON of the vocabulary, both ways: dataclasses of ``isthmus.spec`` to canonical text, and text back to them, checked.

One value has one text (sorted keys, declared floats as floats, shortest digits that read back the same number), so
files can be compared and hashed. What is read is checked against the declared types, and every error names the place.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")


def to_json(obj: Any) -> str:
    """Canonical JSON of a dataclass made of dataclasses, tuples, dicts with text keys, text, numbers, bools and None.

    Fields declared ``object`` hold any plain JSON value. Raises ``ValueError`` naming the field whose value is not of
    the declared type, or is a number that JSON has no text for (nan, inf).
    """
    if not dataclasses.is_dataclass(obj) or isinstance(obj, type):
        raise ValueError(f"to_json: got {type(obj).__name__}, wanted an instance of a dataclass such as Profile")
    plain = _dump(type(obj), obj, type(obj).__name__)
    return json.dumps(plain, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def from_json(cls: type[T], text: str) -> T:
    """The ``cls`` that ``to_json`` wrote as ``text``. Fields with a default may be missing, but not ``schema_version``.

    Raises ``ValueError`` naming the place when the text is not JSON, was written by another version (``schema_version``
    is checked before anything else of its object), has unknown fields, lacks some, or holds a value of another type.
    """
    try:
        plain = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{cls.__name__}: the text is not JSON ({error}): was the file cut short?") from error
    return _load(cls, plain, cls.__name__)


@functools.cache
def _field_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _dump(declared: Any, value: Any, place: str) -> Any:
    """``value`` as plain JSON data, by its declared type."""
    if dataclasses.is_dataclass(declared):
        if type(value) is not declared:
            raise _mismatch(declared, value, place)
        types_by_name = _field_types(typing.cast(type, declared))
        return {
            name: _dump(field_type, getattr(value, name), f"{place}.{name}")
            for name, field_type in types_by_name.items()
        }
    origin, arguments = typing.get_origin(declared), typing.get_args(declared)
    if origin is tuple:
        return [_dump(*item) for item in _tuple_items(declared, arguments, value, tuple, place)]
    if origin is dict:
        return {key: _dump(arguments[1], item, f"{place}[{key!r}]") for key, item in _items(declared, value, place)}
    if origin in (typing.Union, types.UnionType):
        return _first_that_fits(_dump, declared, arguments, value, place)
    if declared is object:
        return _plain_json(value, place)
    return _scalar(declared, value, place)


def _load(declared: Any, value: Any, place: str) -> Any:
    """The inverse of ``_dump``."""
    if dataclasses.is_dataclass(declared):
        return _load_dataclass(typing.cast(type, declared), value, place)
    origin, arguments = typing.get_origin(declared), typing.get_args(declared)
    if origin is tuple:
        return tuple(_load(*item) for item in _tuple_items(declared, arguments, value, list, place))
    if origin is dict:
        return {key: _load(arguments[1], item, f"{place}[{key!r}]") for key, item in _items(declared, value, place)}
    if origin in (typing.Union, types.UnionType):
        return _first_that_fits(_load, declared, arguments, value, place)
    if declared is object:
        return _plain_json(value, place)
    return _scalar(declared, value, place)


def _load_dataclass(cls: type, value: Any, place: str) -> Any:
    if not isinstance(value, dict):
        raise _mismatch(cls, value, place)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if "schema_version" in fields:
        _check_version(value.get("schema_version"), fields["schema_version"].default, place)
    if unknown := sorted(value.keys() - fields.keys()):
        raise ValueError(f"{place}: unknown fields {', '.join(unknown)}; wanted only {', '.join(sorted(fields))}")
    required = {name for name, field in fields.items() if not _has_default(field)}
    if missing := sorted(required - value.keys()):
        raise ValueError(f"{place}: missing fields {', '.join(missing)}: write the file again or add them")
    types_by_name = _field_types(cls)
    return cls(**{name: _load(types_by_name[name], item, f"{place}.{name}") for name, item in value.items()})


def _check_version(got: Any, wanted: Any, place: str) -> None:
    if got != wanted or isinstance(got, bool):
        raise ValueError(
            f"{place}.schema_version: got {got!r}, wanted {wanted}: the file was written by another version of "
            "isthmus; write it again with this one, or read it with that one"
        )


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _tuple_items(
    declared: Any, arguments: tuple[Any, ...], value: Any, sequence: type, place: str
) -> list[tuple[Any, Any, str]]:
    """(declared type, value, place) of each element of ``value``, a ``tuple[X, ...]`` or a ``tuple[X, Y, Z]``."""
    if not isinstance(value, sequence):
        raise _mismatch(declared, value, place)
    elements = typing.cast("list[Any] | tuple[Any, ...]", value)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        element_types: tuple[Any, ...] = (arguments[0],) * len(elements)
    elif len(arguments) == len(elements):
        element_types = arguments
    else:
        raise ValueError(f"{place}: got {len(elements)} elements, wanted {len(arguments)} ({_name(declared)})")
    return [
        (element_type, element, f"{place}[{number}]")
        for number, (element_type, element) in enumerate(zip(element_types, elements, strict=True))
    ]


def _items(declared: Any, value: Any, place: str) -> list[tuple[str, Any]]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise _mismatch(declared, value, place)
    return list(value.items())


def _first_that_fits(convert: Any, declared: Any, arguments: tuple[Any, ...], value: Any, place: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    alternatives = [alternative for alternative in arguments if alternative is not type(None)]
    if len(alternatives) == 1:  # the usual ``X | None``: X's own error says more
        return convert(alternatives[0], value, place)
    for alternative in alternatives:
        try:
            return convert(alternative, value, place)
        except ValueError:
            continue
    raise _mismatch(declared, value, place)


def _scalar(declared: Any, value: Any, place: str) -> Any:
    if typing.get_origin(declared) is typing.Literal:
        if value in typing.get_args(declared):
            return value
    elif declared is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return _finite(float(value), place)
    elif declared in (int, str, bool) and type(value) is declared:
        return value
    raise _mismatch(declared, value, place)


def _plain_json(value: Any, place: str) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return _finite(value, place)
    if isinstance(value, list | tuple):
        return [_plain_json(item, f"{place}[{number}]") for number, item in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain_json(item, f"{place}[{key!r}]") for key, item in value.items()}
    raise ValueError(
        f"{place}: got {type(value).__name__}, wanted plain JSON (text, numbers, lists, dicts with text keys)"
    )


def _finite(value: float, place: str) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{place}: got {value}, wanted a finite number: JSON has no text for it")
    return value


def _mismatch(declared: Any, value: Any, place: str) -> ValueError:
    return ValueError(f"{place}: got {value!r:.80} ({type(value).__name__}), wanted {_name(declared)}")


def _name(declared: Any) -> str:
    return declared.__name__ if isinstance(declared, type) and not typing.get_args(declared) else str(declared)
