"""What all settings have in common: frozen, no unknown keys, names that can be file names."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Settings(BaseModel):
    """Base of all settings: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_is_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads `yes` as true, and Python takes true for 1."""
        field = cls.model_fields[info.field_name or ""]
        values = value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(one, bool) for one in values):
            types = _types_in(field.annotation)
            if bool not in types and (int in types or float in types):
                raise ValueError(
                    f"found {str(value).lower()}, expected a number: {info.field_name} is {field.description}"
                )
        return value


def _types_in(annotation: Any) -> set[Any]:
    """The types that an annotation such as tuple[int, ...] | None is made of."""
    return {annotation}.union(*(_types_in(part) for part in get_args(annotation)))
