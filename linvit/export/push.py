"""`linvit push`: publish a model on the Hugging Face hub, after showing what would be uploaded.

Heavy imports are inside functions to keep `--help` fast.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import Field, field_validator

from linvit.evaluation.options import SourceOptions
from linvit.settings.flags import check_inputs, parse_options

SUMMARY = "publish a model on the Hugging Face hub"
# The owner's and the model's name, as the hub takes them.
_NAME, _LONGEST_NAME = r"\w(?:[\w.-]*\w)?", 96


class PushOptions(SourceOptions):
    """What to publish, and where."""

    source: str = Field(description="run folder, folder with config.json and weights, or checkpoint")
    repository: str = Field(description="OWNER/NAME on the hub; created if it does not exist")
    upload: bool = Field(False, description="upload; without it, only show what would be uploaded")
    private: bool = Field(False, description="create a private repository")
    license: str | None = Field(None, description="licence of the weights for the model card, as cc-by-4.0")
    evaluation: Path | None = Field(
        None, description="results of linvit eval --json for the model card (default: what the training recorded)"
    )
    message: str = Field("Upload a linvit model", description="commit message")

    @field_validator("repository")
    @classmethod
    def _owner_and_name(cls, value: str) -> str:
        is_name = re.fullmatch(f"{_NAME}/{_NAME}", value, re.ASCII) and len(value.partition("/")[2]) <= _LONGEST_NAME
        if not is_name or "--" in value or ".." in value or value.endswith(".git"):
            raise ValueError(
                f"{value!r} is not a name on the hub: give OWNER/NAME, in letters and digits with single . _ - between"
            )
        return value

    @field_validator("license")
    @classmethod
    def _identifier(cls, value: str | None) -> str | None:
        # The card's header is YAML, in which other characters have a meaning.
        if value is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", value):
            raise ValueError(f"{value!r} is not an identifier of a licence, as cc-by-4.0 or other")
        return value


def main(argv: Sequence[str]) -> int:
    """Publish, and return the exit status."""
    options = parse_options(
        PushOptions,
        argv,
        prog="linvit push",
        description="Publish a model and its card on the Hugging Face hub. Without --upload, only list the files.",
        positionals={"source": "SOURCE", "repository": "OWNER/NAME"},
        spellings={"evaluation": ["--eval"], "message": ["--message"], "model": ["-m", "--model"]},
    )
    return push_command(options)


def push_command(options: PushOptions) -> int:
    """Write the files to a temporary folder, list them, and with --upload upload them; returns the exit status.

    Raises ValueError if the source cannot be loaded, and if the hub cannot be reached or refuses.
    """
    from linvit.evaluation.inference import input_spec, open_source
    from linvit.export.card import Origin
    from linvit.export.folder import write_folder
    from linvit.output.terminal import format_bytes, print_line
    from linvit.runtimes.model import is_exported

    check_inputs(("--class-map", options.class_map), ("--eval", options.evaluation))
    if is_exported(options.source):
        raise ValueError(f"{options.source} is an exported model: push the run that it came from")
    classifier = open_source(options)
    origin = Origin(options.repository, options.license, _evaluation(options.evaluation))
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        spec = input_spec(classifier, img_size=options.size)
        write_folder(classifier, folder, spec, origin, precision="float32", is_on_hub=True)
        for file in sorted(folder.iterdir()):
            print_line(f"{file.name}: {format_bytes(file.stat().st_size)}")
        if options.license is None:
            print_line("the model card states no licence; --license names one")
        if options.upload:
            print_line(f"uploaded to {_upload(folder, options)}")
            return 0
    print_line(f"nothing was uploaded; add --upload to write these files to {options.repository} on the hub")
    return 0


def _evaluation(path: Path | None) -> Mapping[str, Any]:
    """The results of one source at one size in a file of `linvit eval --json`; empty without a file."""
    if path is None:
        return {}
    from linvit.model.description import read_json

    found = read_json(path)
    if not isinstance(found.get("top1"), float | int):
        raise ValueError(f"--eval {path} has no results of linvit eval --json of one source at one size")
    return found


def _upload(folder: Path, options: PushOptions) -> str:
    """Upload a folder in one commit, and return its address. Raises ValueError if the hub refuses."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    from linvit.output.files import reason
    from linvit.output.terminal import printable

    api = HfApi()
    try:
        api.create_repo(options.repository, private=options.private or None, exist_ok=True)
        api.upload_folder(repo_id=options.repository, folder_path=folder, commit_message=options.message)
    except OfflineModeIsEnabled as error:
        raise ValueError("the hub cannot be reached, because HF_HUB_OFFLINE is set: unset it") from error
    # The package has its own errors for names, access and the network.
    except Exception as error:
        raise ValueError(
            f"{options.repository} cannot be uploaded ({type(error).__name__}: {printable(reason(error))}); check the "
            "connection, and log in with: hf auth login"
        ) from error
    return f"{api.endpoint}/{options.repository}"
