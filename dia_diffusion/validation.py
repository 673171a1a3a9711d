"""What recipes, options and protocols share: the strict base model, and one-line messages from pydantic errors.

`Strict` is the base of every typed model. `describe_error` turns a ValidationError into "`train.batch_size` must be 1
or more, got 0"; `nearest` finds the valid key closest to a mistyped one. A field validator raises ValueError with what
the value must be ("a multiple of 3"); a validator of several fields raises InputError with the whole line.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from dia_diffusion.errors import InputError

Model = TypeVar("Model", bound=BaseModel)


class Strict(BaseModel):
    """A frozen model: no type conversion, no inf or nan, no unknown keys; a field's docstring is its help."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def with_floats(value: Any) -> Any:
    """Converts text such as "1e-4" to a float: YAML 1.1 reads numbers without a point before the e as text."""
    if isinstance(value, dict):
        return {key: with_floats(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [with_floats(inner) for inner in value]
    is_number = isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value)
    return float(value) if is_number else value


# Types of a recipe's values. Whole numbers fit into 64 bits in JSON records.
Positive = Annotated[int, Field(ge=1, lt=2**63)]
NonNegative = Annotated[int, Field(ge=0, lt=2**63)]
Float = Annotated[float, BeforeValidator(with_floats)]
PositiveFloat = Annotated[Float, Field(gt=0)]
NonNegativeFloat = Annotated[Float, Field(ge=0)]
Fraction = Annotated[Float, Field(ge=0, lt=1)]
Attention = Annotated[str | None, AfterValidator(lambda name: name or "none")]
Arguments = Annotated[dict[str, Any], BeforeValidator(with_floats)]


MUST_BE = {
    "greater_than_equal": "{ge} or more",
    "greater_than": "above {gt}",
    "less_than_equal": "{le} or less",
    "less_than": "below {lt}",
    "multiple_of": "a multiple of {multiple_of}",
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_unicode": "Unicode text",
    "path_type": "a path",
    "none_required": "null",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "string_too_short": "text of {min_length} or more characters",
    "too_short": "a list of {min_length} or more",
    "too_long": "a list of {max_length} or fewer",
}
"""Type of a pydantic error -> what the value must be."""


def describe_error(
    error: ValidationError, model: type[BaseModel], spell: Callable[[Sequence[str]], str] = ".".join
) -> str:
    """One line for the first of a model's validation errors.

    Args:
        spell: joins a key's parts; by default as recipes do, "train.batch_size".
    """
    errors = [(_key(details["loc"], model), details) for details in error.errors(include_url=False)]
    key, first = errors[0]
    if first["type"] in ("extra_forbidden", "invalid_key"):
        unknown = spell([*key, str(first["loc"][-1])])
        valid = nearest(unknown, (spell(path) for path, _ in fields_of(model)))
        return f"unknown key `{unknown}`; did you mean `{valid}`?"
    if first["type"] == "missing":
        return f"`{spell(key)}` is missing"
    if isinstance(cause := first.get("ctx", {}).get("error"), InputError):
        return str(cause)
    # Each type of a union reports its own error.
    expected = dict.fromkeys(_must_be(details) for other, details in errors if other == key)
    each = "each of " if any(isinstance(part, int) for part in first["loc"][len(key) :]) else ""
    return f"{each}`{spell(key)}` must be {' or '.join(expected)}, got {shown(first['input'])}"


def validate(model: type[Model], values: Any, where: str = "") -> Model:
    """Validates the values of a file or a recipe. Raises InputError with a message that begins with `where`."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{where}{describe_error(error, model)}") from None


def nearest(name: str, names: Iterable[str]) -> str:
    """The name closest to a mistyped one."""
    return difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)[0]


def shown(value: Any) -> str:
    """A value for error messages: text in quotes, None as YAML's null."""
    return "null" if value is None else repr(value) if isinstance(value, str) else str(value)


def fields_of(model: type[BaseModel]) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """The path and field of each key of a model and its nested models, in order."""
    for name, field in model.model_fields.items():
        section = model_in(field.annotation)
        if section is None:
            yield (field.alias or name,), field
        else:
            yield from (((field.alias or name, *path), inner) for path, inner in fields_of(section))


def model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that a field holds, or None."""
    candidates = (annotation, *get_args(annotation))
    return next((kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _key(location: Sequence[str | int], model: type[BaseModel] | None) -> tuple[str, ...]:
    """The key of an error: the field names in its location, without indices and types of a union."""
    key: list[str] = []
    for part in location:
        if model is not None and isinstance(part, int):
            continue  # an item of a list of models
        fields = {} if model is None else {field.alias or name: field for name, field in model.model_fields.items()}
        if part not in fields:
            break
        key.append(str(part))
        model = model_in(fields[str(part)].annotation)
    return tuple(key)


def _must_be(details: Any) -> str:
    context = details.get("ctx", {})
    if details["type"] == "literal_error":
        return f"one of {context['expected'].replace(' or ', ', ')}".replace("'", "")
    if details["type"] == "value_error":
        return str(context["error"])
    return MUST_BE.get(details["type"], details["msg"]).format(**context)
