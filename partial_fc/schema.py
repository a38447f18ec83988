"""Schemas of pydantic for files that someone else may have made, and errors that say file, field, got and wanted."""

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from partial_fc.files import one_line, shortened

_SHOWN = 3  # problems of one file

Schema = TypeVar("Schema", bound="Document")


class Document(BaseModel):
    """The fields that are read; others are left alone. Numbers are finite, and no text stands for a number."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)


def fits(schema: type[Schema], values: Any, name: object) -> Schema:
    """`values` as `schema` has them. Raises ValueError: `name`, then each field that is wrong, got and wanted."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        first = [_problem(one) for one in problems[:_SHOWN]]
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(f"{name}: {'; '.join(first)}{more}") from None


def _problem(problem: Any) -> str:
    field = ".".join(one_line(part, 40) if isinstance(part, str) else str(part) for part in problem["loc"]) or "it"
    if problem["type"] == "missing":
        return f"{field} is missing"
    wanted = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return f"{field}: got {shortened(problem['input'])}, wanted {wanted}"
