"""What all sections of a config share."""

from __future__ import annotations

import re
import typing
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

PositiveInt = Annotated[int, Field(gt=0, lt=2**63)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**63)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """Base of every section: frozen, a misspelt key is an error, and so is a number that is none."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_boolean(cls, value: Any, info: ValidationInfo) -> Any:
        """Where a number is wanted, for which pydantic takes true as 1."""
        kinds = _kinds(cls.model_fields[info.field_name].annotation) if info.field_name else set()
        if kinds & {int, float} and bool not in kinds and _holds_boolean(value):
            raise ValueError("a number is expected; YAML reads true, yes, on, false, no and off as booleans")
        return value

    @field_validator("*")
    @classmethod
    def _is_a_name(cls, value: Any) -> Any:
        if isinstance(value, Path):
            try:
                found = value.__fspath__().encode()
            except UnicodeEncodeError:
                found = b"\0"
            if b"\0" in found:
                raise ValueError("no file has such a name")
            if found.startswith(b"~"):  # on another node, or for another user, it would be another folder
                raise ValueError("~ is not expanded in a config: write the whole path, or $HOME in a shell")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """All types that an annotation names."""
    parts = typing.get_args(annotation)
    return set().union(*map(_kinds, parts)) if parts else {annotation}


def _holds_boolean(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(map(_holds_boolean, value)))


def _name(name: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(
            "such a name has small letters, digits and underscores, and begins with a letter: captions_2"
        )
    return name


Name = Annotated[str, AfterValidator(_name)]
"""Of a source or an encoder."""
