"""Options of `linvit check`; imports nothing heavy, so that `--help` stays quick."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator

from linvit.check.faults import FAULTS
from linvit.settings.fields import unknown


class CheckOptions(BaseModel):
    """Which images to check, and how strictly."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data_dir: Path = Field(
        description="folder of images: DATA/SPLIT/CLASS/IMAGE with splits of any name, DATA/CLASS/IMAGE, or DATA/IMAGE"
    )
    allow: tuple[str, ...] = Field((), description="faults that are told as notes and do not fail the check")
    near_duplicates: bool = Field(True, description="look for the same picture in other bytes, too")
    max_pixels: int = Field(
        178_956_970,
        gt=0,
        description="images of more pixels are told, not decoded (default: Pillow's limit, 179 million)",
    )
    workers: int | None = Field(
        None, ge=0, description="processes that read images; 0 reads in the main one (default: one per usable core)"
    )
    json_file: Path | None = Field(None, description="file for everything that was found")
    html_file: Path | None = Field(None, description="file for a page with pictures of what was found")

    @field_validator("allow")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in FAULTS:
                raise ValueError(unknown("fault", name, FAULTS))
        return names
