"""A report as one HTML page that needs nothing beside it."""

from collections.abc import Sequence
from html import escape
from typing import Any

from linvit.data.check.messages import DecoderMessages
from linvit.data.check.pictures import Pictures
from linvit.data.check.reading import Source
from linvit.data.check.style import STYLE
from linvit.data.check.table import contents, describe_images, printable
from linvit.data.check.tree import Listing

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
