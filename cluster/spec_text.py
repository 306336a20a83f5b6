"""From a spec's text to plain data, and from pydantic's complaints to text a person can act on.

Pure functions; they know nothing about what a spec means. The models are in ``spec.py``.
"""

import difflib
from collections.abc import Iterable, Iterator
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

# Below these keys names are free (Ray labels hold dots), so the rest of a path is one key.
FREE_MAPS = ("labels", "custom")


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice; PyYAML would silently keep the last one."""

    def construct_mapping(self, node, deep=False):
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"key {key!r} was given already in line {seen[key]}",
                    node.start_mark,
                )
            if isinstance(key, str):
                seen[key] = line
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Parse one YAML document. Raises ``ValueError`` with the line and the reason."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}{getattr(error, 'problem', None) or error}") from None


def split_key(dotted: str) -> list[str]:
    """``attention.labels.ray.io/zone`` -> ``[attention, labels, ray.io/zone]``."""
    parts = dotted.split(".")
    for index, part in enumerate(parts[:-1]):
        if part in FREE_MAPS:
            return [*parts[: index + 1], ".".join(parts[index + 1 :])]
    return parts


def parse_override(text: str) -> tuple[list[str], Any]:
    """``a.b=c`` -> (``[a, b]``, c read as YAML). Raises ``ValueError``."""
    key, equals, value = text.partition("=")
    parts = split_key(key.strip())
    if not equals or not all(parts):
        raise ValueError("expected key=value with a dotted key, such as ffn.count=3")
    try:
        return parts, parse_yaml(value)
    except ValueError as error:
        raise ValueError(f"the value is not YAML: {error}") from None


def with_override(data: dict[str, Any], key: list[str], value: Any) -> dict[str, Any]:
    """A copy of ``data`` in which ``key`` is ``value``. Raises ``ValueError``.

    Mappings that lie on the way are copied or created; ``data`` is left as it was.
    """
    head, *rest = key
    if not rest:
        return {**data, head: value}
    below = data.get(head)
    if below is None:
        below = {}
    if not isinstance(below, dict):
        raise ValueError(f"{head} is {show(below)}, which holds no key {rest[0]!r}")
    return {**data, head: with_override(below, rest, value)}


def explain(error: ValidationError, model: type[BaseModel], overrides: Iterable[str] = ()) -> str:
    """All of pydantic's complaints, one short paragraph each, with the path and the value given.

    Args:
        overrides: the ``key=value`` texts that were applied, named where they are to blame.
    """
    by_key = {text.partition("=")[0].strip(): text for text in overrides}
    return "\n".join(
        _explain_one(problem, model, by_key) for problem in error.errors(include_url=False)
    )


def show(value: Any) -> str:
    """A value as a user would have written it, cut to one short line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _explain_one(problem: Any, model: type[BaseModel], by_key: dict[str, str]) -> str:
    location = [str(part) for part in problem["loc"] if part != "[key]"]
    path = ".".join(location)
    given = problem.get("input")
    head = path or "(top level)"
    if problem["type"] != "missing" and not isinstance(given, (dict, BaseModel)):
        head += f" = {show(given)}"
    blame = next((text for key, text in by_key.items() if _related(key, path)), None)
    if blame:
        head += f"   (from --set {blame})"
    return f"  {head}\n      {_expected(problem, model, location)}"


def _related(key: str, path: str) -> bool:
    """Whether an override of ``key`` may have caused a problem found at ``path``."""
    return key == path or path.startswith(key + ".") or key.startswith(path + ".")


def _expected(problem: Any, model: type[BaseModel], location: list[str]) -> str:
    context = problem.get("ctx", {})
    match problem["type"]:
        case "extra_forbidden":
            return _unknown_key(model, location)
        case "missing":
            return "is required and missing"
        case "int_type" | "int_from_float":
            return "expected a whole number"
        case "float_type":
            return "expected a number"
        case "string_type":
            return "expected text"
        case "bool_type":
            return "expected true or false"
        case "dict_type" | "model_type" | "model_attributes_type":
            return "expected a mapping of keys to values"
        case "greater_than_equal":
            return f"expected {context['ge']} or more"
        case "greater_than":
            return f"expected more than {context['gt']}"
        case "less_than_equal":
            return f"expected {context['le']} or less"
        case "less_than":
            return f"expected less than {context['lt']}"
        case "literal_error":
            return f"expected one of {context['expected']}"
        case "value_error":
            return str(context["error"])
    return problem["msg"]


def _unknown_key(model: type[BaseModel], location: list[str]) -> str:
    *parents, key = location
    here = _model_at(model, parents)
    if here is None:
        return "unknown key"
    keys = list(here.model_fields)
    # The same name in another section is a better guess than a similar one in this section.
    guesses = [path for path in _paths(model) if path.rpartition(".")[2] == key] or [
        ".".join([*parents, near]) for near in difflib.get_close_matches(key, keys, n=1)
    ]
    hint = f"; did you mean {' or '.join(guesses)}?" if guesses else "."
    return f"unknown key{hint} The keys here are: {', '.join(keys)}"


def _model_at(model: type[BaseModel], location: list[str]) -> type[BaseModel] | None:
    for part in location:
        field = model.model_fields.get(part)
        below = _inner_model(field.annotation) if field else None
        if below is None:
            return None
        model = below
    return model


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        below = _inner_model(field.annotation)
        if below is not None:
            yield from _paths(below, f"{prefix}{name}.")
