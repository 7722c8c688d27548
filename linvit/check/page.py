"""How the HTML page looks.

Images as small pictures inside an HTML page.

A report as one HTML page that needs nothing beside it.
"""

import base64
from collections.abc import Sequence
from html import escape
from typing import Any

import cv2

from linvit.check.inspect import DecoderMessages
from linvit.check.listing import ImageEntry, Listing
from linvit.check.report import contents, describe_images, printable
from linvit.check.run import Source
from linvit.data.decode import UnreadableImage, decode_image

STYLE = """\
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --red: #c62828; --green: #2e7d32; --blue: #1565c0; }
@media (prefers-color-scheme: dark) { :root { --red: #ef7070; --green: #7bc67e; --blue: #6fb1f5; } }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0; }
main { max-width: 1100px; margin: 0 auto; padding: 1rem 1.5rem; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 .3rem; }
h3 { font-size: .95rem; margin: 0 0 .3rem; }
p { margin: .2rem 0; }
section { border: 1px solid var(--line); border-radius: 8px; padding: 1rem; margin: 1rem 0; }
.summary { border-left: 5px solid var(--line); background: var(--soft); padding: .7rem 1rem;
  margin-bottom: 1rem; overflow-wrap: anywhere; }
.summary.bad { border-color: var(--red); }
.summary.good { border-color: var(--green); }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-weight: 600; }
th, td { padding: .15rem .6rem .15rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
a { color: inherit; }
.fault, .note { border-radius: 4px; padding: 0 .4em; font-size: .8rem; font-weight: 600; color: var(--red);
  border: 1px solid; }
.note { color: var(--blue); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .8rem; margin: .4rem 0 .8rem; }
dt { opacity: .65; }
dd { margin: 0; }
.cases { display: flex; flex-wrap: wrap; gap: .8rem; }
.case { background: var(--soft); border-radius: 6px; padding: .5rem; font-size: .8rem; max-width: 100%; }
.figures { display: flex; flex-wrap: wrap; gap: .5rem; }
figure { margin: 0; width: min-content; min-width: 180px; }
figcaption, .case p { overflow-wrap: anywhere; }
.case p { max-width: 30rem; opacity: .75; }
img { display: block; max-width: 180px; min-width: 96px; image-rendering: pixelated; margin-bottom: .2rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 1.5rem; }
.charts td:first-child { white-space: nowrap; max-width: 9rem; overflow: hidden; text-overflow: ellipsis; }
.charts td { border: 0; padding-top: 0; padding-bottom: 0; }
.bar { width: 60%; }
.bar div { background: var(--blue); height: .8em; margin-top: .35em; border-radius: 2px; min-width: 1px; }
footer { opacity: .65; font-size: .85rem; }
"""


_SIDE = 180


class Pictures:
    """Reads the images of a listing again, to show them.

    Args:
        avoid: paths of images that are not to be decoded.
    """

    def __init__(self, images: Sequence[ImageEntry], source: Source, *, avoid: set[str]) -> None:
        self._index = {image.path: index for index, image in enumerate(images) if image.path not in avoid}
        self._source = source

    def data_uri(self, path: str) -> str | None:
        """The image at most 180 pixels a side, or None where it cannot be shown."""
        if path not in self._index:
            return None
        try:
            image = decode_image(self._source.read(self._index[path], path), name=path)
        except UnreadableImage:
            return None
        height, width = image.shape[:2]
        scale = min(1.0, _SIDE / max(height, width))
        size = max(1, round(width * scale)), max(1, round(height * scale))
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        data = cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])[1]
        return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()


_EXAMPLES = 8
_OF_GROUP = 4
_CLASSES = 40


def render_page(report: dict[str, Any], listing: Listing, source: Source) -> str:
    """The page, with pictures of the first cases of every finding."""
    bombs = report["findings"].get("decompression_bomb", {"cases": []})["cases"]
    pictures = Pictures(listing.images, source, avoid={case["path"] for case in bombs})
    title = f"linvit check {_text(report['data'])}"
    with DecoderMessages():
        sections = [_section(code, entry, pictures) for code, entry in report["findings"].items()]
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title><style>{STYLE}</style></head><body><main>",
            f"<h1>{title}</h1>",
            _summary(report),
            _contents(report["findings"]),
            *sections,
            _charts(report),
            f"<footer>linvit {_text(report['versions']['linvit'])}, {report['seconds']:.1f} s, "
            f"{report['images_per_second']:,.0f} images a second</footer>",
            "</main></body></html>\n",
        ]
    )


def _summary(report: dict[str, Any]) -> str:
    faults = report["num_faults"]
    words = f"{faults:,} fault{'s' if faults != 1 else ''}" if faults else "no faults"
    lines = [contents(report), *describe_images(report)]
    if report["layout"] in ("splits", "lists"):
        lines.append(f"training {'refuses: ' if report['training'] != 'would start' else ''}{report['training']}")
    rows = "".join(f"<p>{_text(line)}</p>" for line in lines)
    return f'<div class="summary {"bad" if faults else "good"}"><strong>{words}</strong>{rows}</div>'


def _contents(findings: dict[str, Any]) -> str:
    if not findings:
        return ""
    rows = "".join(
        f'<tr><td><a href="#{code}">{code}</a></td><td>{_badge(entry)}</td>'
        f'<td class="number">{entry["count"]:,}</td><td>{escape(entry["what"])}</td></tr>'
        for code, entry in findings.items()
    )
    return f"<table><tr><th>finding</th><th></th><th>count</th><th>what it is</th></tr>{rows}</table>"


def _section(code: str, entry: dict[str, Any], pictures: Pictures) -> str:
    uses = "".join(f"<dt>{names}</dt><dd>{escape(text)}</dd>" for text, names in _uses(entry).items())
    cases = entry["cases"][:_EXAMPLES]
    more = entry["count"] - len(cases)
    rest = f"<p>and {more:,} more: --json FILE has them all</p>" if more else ""
    return (
        f'<section id="{code}"><h2>{code} {_badge(entry)} '
        f"{entry['count']:,}</h2><p>{escape(entry['what'])}</p><dl>{uses}</dl>"
        f'<div class="cases">{"".join(_case(case, pictures) for case in cases)}</div>{rest}</section>'
    )


def _badge(entry: dict[str, Any]) -> str:
    return f'<span class="{entry["severity"]}">{entry["severity"]}</span>'


def _uses(entry: dict[str, Any]) -> dict[str, str]:
    """Who does what with it, named together where they do the same."""
    names: dict[str, str] = {}
    for name in ("training", "evaluation", "prediction", "mend"):
        text = entry[name]
        names[text] = f"{names[text]}, {name}" if text in names else name
    return names


def _case(case: dict[str, Any], pictures: Pictures) -> str:
    paths = [case["path"], *case["others"]]
    shown = "".join(_figure(path, pictures) for path in paths[:_OF_GROUP])
    more = f"<p>and {len(paths) - _OF_GROUP:,} more</p>" if len(paths) > _OF_GROUP else ""
    detail = f"<p>{_text(case['detail'])}</p>" if case["detail"] else ""
    return f'<div class="case"><div class="figures">{shown}</div>{more}{detail}</div>'


def _figure(path: str, pictures: Pictures) -> str:
    uri = pictures.data_uri(path)
    picture = f'<img src="{uri}" alt="">' if uri else ""
    return f"<figure>{picture}<figcaption>{_text(path)}</figcaption></figure>"


def _charts(report: dict[str, Any]) -> str:
    charts = []
    for split, entry in report["splits"].items():
        name = _text(split) or "images"
        classes = sorted(entry["classes"].items(), key=lambda item: -item[1])
        if classes:
            shown = f"{name}: images of each class"
            if len(classes) > _CLASSES:
                half = _CLASSES // 2
                classes = [*classes[:half], *classes[-half:]]
                shown += f" (the {half} largest and smallest of {len(entry['classes']):,})"
            charts.append(_bars(shown, [(_text(label), count) for label, count in classes]))
        sizes = entry["sizes"]
        if sizes:
            sides = [(f"from {edge:g} px", count) for edge, count in sizes["shorter_side_histogram"] if count]
            aspects = [(f"from {edge:g}", count) for edge, count in sizes["aspect_histogram"] if count]
            charts += [_bars(f"{name}: shorter side", sides), _bars(f"{name}: width / height", aspects)]
    return f'<section><h2>classes and sizes</h2><div class="charts">{"".join(charts)}</div></section>'


def _bars(title: str, rows: Sequence[tuple[str, int]]) -> str:
    most = max(count for _, count in rows) or 1
    bars = "".join(
        f'<tr><td>{label}</td><td class="number">{count:,}</td>'
        f'<td class="bar"><div style="width:{100 * count / most:.1f}%"></div></td></tr>'
        for label, count in rows
    )
    return f"<div><h3>{title}</h3><table>{bars}</table></div>"


def _text(text: str) -> str:
    return escape(printable(text))
