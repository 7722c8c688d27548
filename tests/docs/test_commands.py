"""The commands and the Python of README.md and docs/ run, in their order, on tiny data; `sandbox.py` prepares it."""

import contextlib
import glob
import importlib.util
import io
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sandbox
from doc_blocks import PAGES, Block, blocks_of, linvit_arguments, pipelines_of

from linvit import cli

# Programs other than linvit that a page may use.
TOOLS = ("cat", "cp", "cut", "find", "head", "jq", "ls", "mkdir", "sort", "tail", "wc")
# Words in a command that need a library of an extra.
EXTRAS = {
    ".onnx": "onnxruntime",
    "openvino": "openvino",
    "--lora": "peft",
    "parquet": "pyarrow",
    "linvit data elpv": "elpv_dataset",
}


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sandbox.build(tmp_path_factory.mktemp("docs"))


def runnable(page: Path) -> list[Block]:
    return [block for block in blocks_of(page) if block.reason is None and block.language in ("bash", "python")]


@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=lambda page: page.name)
def test_the_page_runs(page: Path, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(template, tmp_path / "docs", symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names: dict[str, Any] = {"__name__": page.stem}
    for block in runnable(page):
        place = f"{page.name}, line {block.line}"
        if block.language == "python":
            exec(compile(block.text, place, "exec"), names)
            continue
        for pipeline in pipelines_of(block.text):
            if needs := missing_extras(pipeline):
                pytest.skip(f"{place}: needs {', '.join(needs)}")
            run_pipeline(pipeline, place)


def missing_extras(pipeline: list[list[str]]) -> list[str]:
    words = " ".join(word for command in pipeline for word in command)
    return [name for part, name in EXTRAS.items() if part in words and importlib.util.find_spec(name) is None]


def run_pipeline(pipeline: list[list[str]], place: str) -> None:
    """Run commands whose outputs are each other's inputs; fails unless each exits with 0."""
    stream = ""
    for words in pipeline:
        target = None
        if ">" in words:
            target = Path(words[words.index(">") + 1])
            words = words[: words.index(">")]
        stream = run_command(words, stream, place)
        if target is not None:
            target.write_text(stream)


def run_command(words: list[str], stdin: str, place: str) -> str:
    """Run one command and return what it prints."""
    arguments = linvit_arguments(words)
    if arguments is not None:
        return run_linvit(sandbox.shrink(arguments) if arguments else [], stdin, place)
    if words[0] == "python" and words[1].startswith(("examples/", "benchmarks/")):
        return run_script(words[1:])
    if words[:2] == ["python", "-c"]:
        exec(compile(words[2], place, "exec"), {})
        return ""
    if words[0] == "cd":
        os.chdir(words[1])
        return ""
    assert words[0] in TOOLS, f"{place}: mark the block as not run, or teach this test {words[0]!r}"
    if words[0] == "jq" and shutil.which("jq") is None:  # not on every machine
        return stdin
    expanded = [path for word in words for path in (sorted(glob.glob(word)) if "/" in word else []) or [word]]
    return subprocess.run(expanded, input=stdin, capture_output=True, text=True, check=True).stdout


def run_linvit(arguments: list[str], stdin: str, place: str) -> str:
    printed, errors = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors):
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        patch.setattr(sys, "stdout", printed)
        try:
            status = cli.main(arguments)
        except SystemExit as stop:
            status = stop.code
    assert status == 0, f"{place}: linvit {' '.join(arguments)} ends with {status}: {errors.getvalue()}"
    return printed.buffer.getvalue().decode()


def run_script(words: list[str]) -> str:
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", words)
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as stop:
            if stop.code:
                raise AssertionError(f"{words} ends with {stop.code}") from stop
    return printed.getvalue()
