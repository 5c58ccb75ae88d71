"""What all sections of a config share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

PositiveInt = Annotated[int, Field(gt=0, lt=2**63)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**63)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """Base of every section: frozen, a misspelt key is an error, and so is a number that is none."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

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
        return value


def _name(name: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(
            "such a name has small letters, digits and underscores, and begins with a letter: captions_2"
        )
    return name


Name = Annotated[str, AfterValidator(_name)]
"""Of a source or an encoder."""
