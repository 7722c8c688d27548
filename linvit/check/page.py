"""The report as one self-contained HTML page with thumbnails."""

from collections.abc import Sequence
from typing import Any

from linvit.check.inspect import DecoderMessages
from linvit.check.listing import ImageEntry, Listing
from linvit.check.reader import Source
from linvit.check.report import describe_images, describe_splits, describe_verdict
from linvit.data.decode import UnreadableImage, decode_image
from linvit.output.page import image_uri, render

# Cases shown per finding, and images shown per case.
_CASES = 8
_IMAGES_PER_CASE = 4
# A split with more classes shows only the largest and smallest of them.
_CLASSES = 40


def render_page(report: dict[str, Any], listing: Listing, source: Source) -> str:
    """The HTML page of a report, with thumbnails of the first cases of each finding."""
    bombs = report["findings"].get("decompression_bomb", {"cases": []})["cases"]
    thumbnails = _Thumbnails(listing.images, source, exclude={case["path"] for case in bombs})
    with DecoderMessages():
        findings = [_finding(code, entry, thumbnails) for code, entry in report["findings"].items()]
    return render(
        "linvit.check",
        "page.html.j2",
        report=report,
        verdict=describe_verdict(report),
        summary=[describe_splits(report), *describe_images(report)],
        findings=findings,
        charts=_charts(report),
    )


class _Thumbnails:
    """Reads images of a listing again and encodes them as small JPEGs.

    Args:
        exclude: paths of images that must not be decoded.
    """

    def __init__(self, images: Sequence[ImageEntry], source: Source, *, exclude: set[str]) -> None:
        self._index = {image.path: index for index, image in enumerate(images) if image.path not in exclude}
        self._source = source

    def data_uri(self, path: str) -> str | None:
        """The image as a `data:` URI, or None if it cannot be shown."""
        if path not in self._index:
            return None
        try:
            image = decode_image(self._source.read(self._index[path], path), name=path)
        except UnreadableImage:
            return None
        return image_uri(image)


def _finding(code: str, entry: dict[str, Any], thumbnails: _Thumbnails) -> dict[str, Any]:
    cases = [_case(case, thumbnails) for case in entry["cases"][:_CASES]]
    return {
        "code": code,
        "severity": entry["severity"],
        "count": entry["count"],
        "what": entry["what"],
        "uses": _uses(entry),
        "cases": cases,
        "num_more": entry["count"] - len(cases),
    }


def _uses(entry: dict[str, Any]) -> list[tuple[str, str]]:
    """Effect of the finding on each command; commands with the same effect share a row."""
    names: dict[str, list[str]] = {}
    for name in ("training", "evaluation", "prediction"):
        names.setdefault(entry[name], []).append(name)
    return [*((", ".join(alike), text) for text, alike in names.items()), ("fix", entry["mend"])]


def _case(case: dict[str, Any], thumbnails: _Thumbnails) -> dict[str, Any]:
    paths = [case["path"], *case["others"]]
    shown = paths[:_IMAGES_PER_CASE]
    return {
        "figures": [{"path": path, "uri": thumbnails.data_uri(path)} for path in shown],
        "num_more": len(paths) - len(shown),
        "detail": case["detail"],
    }


def _charts(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Bar charts of the class counts and image sizes of each split."""
    charts = []
    for split, entry in report["splits"].items():
        name = split or "images"
        classes = sorted(entry["classes"].items(), key=lambda item: -item[1])
        if classes:
            title = f"{name}: images per class"
            if len(classes) > _CLASSES:
                half = _CLASSES // 2
                title += f" (the {half} largest and smallest of {len(classes):,})"
                classes = [*classes[:half], *classes[-half:]]
            charts.append(_bars(title, classes))
        sizes = entry["sizes"]
        if sizes:
            sides = [(f"from {edge:g} px", count) for edge, count in sizes["shorter_side_histogram"] if count]
            aspects = [(f"from {edge:g}", count) for edge, count in sizes["aspect_histogram"] if count]
            charts += [_bars(f"{name}: shorter side", sides), _bars(f"{name}: width / height", aspects)]
    return charts


def _bars(title: str, rows: Sequence[tuple[str, int]]) -> dict[str, Any]:
    most = max(count for _, count in rows) or 1
    return {"title": title, "rows": [(label, count, 100 * count / most) for label, count in rows]}
