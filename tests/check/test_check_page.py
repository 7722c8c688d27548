"""The HTML page contains all findings, with thumbnails, and escapes every name."""

import os
from pathlib import Path

import pytest
from checks import checked, paths_by_code
from corpus import build_clean, build_corpus


def test_the_page_contains_its_thumbnails(tmp_path: Path) -> None:
    build_corpus(tmp_path / "data")
    report = checked(tmp_path / "data", tmp_path, html_file=tmp_path / "check.html")
    page = (tmp_path / "check.html").read_text()
    assert all(f'id="{code}"' in page for code in report["findings"])
    assert page.count("data:image/jpeg;base64,") > 20
    assert "http" not in page.replace("http-equiv", "")
    assert "<figcaption>train/ant/empty.jpg</figcaption>" in page
    # A decompression bomb is not decoded for its thumbnail either.
    assert "<img" not in page.split('<section id="decompression_bomb">')[1].split("</section>")[0]


def test_names_that_are_not_valid_text_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = build_clean(tmp_path / "data")
    (Path(os.fsdecode(os.fsencode(data) + b"/train/ant/caf\xe9 [bold]<b>\n.jpg"))).write_bytes(b"")
    report = checked(data, tmp_path, html_file=tmp_path / "check.html")
    assert os.fsencode(paths_by_code(report)["empty_file"][0]).endswith(b"caf\xe9 [bold]<b>\n.jpg")
    assert "caf� [bold]<b>�.jpg" in capsys.readouterr().out.replace("\n", "")
    assert "caf� [bold]&lt;b&gt;�.jpg" in (tmp_path / "check.html").read_text()
