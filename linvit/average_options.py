"""Options of `linvit average`; imports nothing heavy, so that `--help` stays quick."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field


class AverageOptions(BaseModel):
    """Which weights to average, and where to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sources: tuple[str, ...] = Field(
        min_length=1,
        description="one run (the checkpoints that end its epochs), or several runs (the best of each), folders with "
        "config.json and weights, or checkpoints",
    )
    output: Path = Field(description="folder that the average is written to, as local-dir:FOLDER")
    newest: int | None = Field(None, ge=1, description="of one run, so many of its newest checkpoints (default: all)")
    use_ema: bool = Field(False, description="average the moving averages of checkpoints that have one")
