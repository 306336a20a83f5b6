"""Is this JSON a dashboard as Grafana knows it? Unknown fields and wrong types are refused.

The schema is grafana-foundation-sdk's: a page is read into its classes and written again. What is
lost on the way is a field that Grafana does not know; what its classes hold is compared with their
annotations. Not for taste: see ``lint``.
"""

from __future__ import annotations

import enum
import json
import types
import typing
from collections.abc import Iterator
from typing import Any

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models import dashboard as models

from dashboards.build import Json


def problems(page: Json) -> list[str]:
    """What is wrong with a dashboard, each as "where: what"; empty if it is one."""
    register_default_plugins()
    return list(_read(models.Dashboard, page, "dashboard"))


def _read(wanted: Any, given: Json, where: str) -> Iterator[str]:
    try:
        model = wanted.from_json(given)
        again = json.loads(json.dumps(model, cls=JSONEncoder))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        yield f"{where}: cannot be read: {type(error).__name__}: {error}"
        return
    yield from _lost(given, again, where)
    yield from _fields(model, where)


def _lost(given: Any, again: Any, where: str) -> Iterator[str]:
    if isinstance(given, dict) and isinstance(again, dict):
        for key, value in given.items():
            if key not in again:
                if value is not None:  # the classes leave an absent value out
                    yield f"{where}.{key}: unknown field"
            else:
                yield from _lost(value, again[key], f"{where}.{key}")
    elif isinstance(given, list) and isinstance(again, list):
        for index, (one, other) in enumerate(zip(given, again, strict=False)):
            yield from _lost(one, other, f"{where}[{index}]")
    elif isinstance(given, dict | list) or isinstance(again, dict | list):
        yield f"{where}: {given!r} is no {type(again).__name__}"


def _mistyped(value: Any, wanted: Any, where: str) -> Iterator[str]:
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted in (Any, object):
        # a panel's own options: the panel's plugin has said which class they have
        if hasattr(value, "to_json"):
            yield from _fields(value, where)
    elif origin in (typing.Union, types.UnionType):
        found = [list(_mistyped(value, one, where)) for one in arguments]
        if all(found):
            meant = (one for one, of in zip(found, arguments, strict=True) if _near(value, of))
            yield from next(meant, [f"{where}: {value!r} is no {wanted}"])
    elif origin is typing.Literal:
        if value not in arguments:
            yield f"{where}: {value!r} is none of {', '.join(map(repr, arguments))}"
    elif origin in (list, dict):
        if not isinstance(value, origin):
            yield f"{where}: {value!r} is no {origin.__name__}"
        elif origin is list:
            for index, one in enumerate(value):
                yield from _mistyped(one, arguments[0], f"{where}[{index}]")
        else:
            for key, one in value.items():
                yield from _mistyped(one, arguments[1], f"{where}.{key}")
    elif isinstance(value, dict) and hasattr(wanted, "from_json"):
        yield from _read(wanted, value, where)  # left as it was by the class around it
    elif not _is(value, wanted):
        yield f"{where}: {value!r} is no {getattr(wanted, '__name__', wanted)}"
    elif hasattr(value, "to_json"):
        yield from _fields(value, where)


def _fields(value: Any, where: str) -> Iterator[str]:
    for name, wanted in typing.get_type_hints(type(value)).items():
        if hasattr(value, name):
            yield from _mistyped(getattr(value, name), wanted, f"{where}.{name}")


def _near(value: Any, wanted: Any) -> bool:
    """Whether a value was meant to be of this type, so that its own problems are worth telling."""
    plain = typing.get_origin(wanted) or wanted
    return isinstance(plain, type) and isinstance(value, plain)


def _is(value: Any, wanted: Any) -> bool:
    if isinstance(value, bool):
        return wanted is bool
    if wanted is float:
        return isinstance(value, int | float)
    if isinstance(wanted, type) and issubclass(wanted, enum.Enum):
        return value in {member.value for member in wanted}
    return isinstance(value, wanted)
