"""The page: one HTML file that needs nothing else. Names come from files, so everything is escaped, and nothing else can run.

Two scripts run, and the page's content policy names them by their hashes: the drawing library and page.js. It allows no
request at all.
"""

import base64
import hashlib
import json
from functools import cache
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from relexio.report import data, words
from relexio.report.chart import Figure
from relexio.report.data import Facts
from relexio.report.theme import COLOURS, config, palettes
from relexio.version import __version__

_TONES = {  # of the verdict: behind white or dark text, never the only sign
    "light": {"good": "#1c7c54", "fair": "#1f6fb2", "weak": "#a15c00", "bad": "#b3362b", "on": "#ffffff"},
    "dark": {"good": "#5fd3a0", "fair": "#62b0ee", "weak": "#f0b35c", "bad": "#ff8d7f", "on": "#101316"},
}
_BADGES = {
    "high": "In weights, predictions beat standing still: sure",
    "moderate": "In weights, predictions beat standing still: fairly sure",
    "low": "In weights, predictions may beat standing still: hardly sure",
    "none": "Do not extrapolate this run",
    "untested": "Not tested",
}
_PATHS = {
    "high": "M4 12.5l5 5L20 6.5",
    "moderate": "M4 12.5l5 5L20 6.5",
    "low": "M4 13c3-5 6-5 8-2s5 3 8-2",
    "none": "M6 6l12 12M18 6L6 18",
    "untested": "M8.5 9a3.5 3.5 0 1 1 5 3.2c-1 .6-1.5 1.2-1.5 2.3M12 18v.5",
    "sign": "M12 4l9 16H3zM12 10v4M12 17v.5",
}
_PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="$policy">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="relexio $version">
<title>$run: relexio report</title>
<style>
$style</style>
</head>
<body>
<header><p>relexio report</p><h1>$run</h1></header>
<main>
$verdict
<dl class="keys">
$keys
</dl>
<noscript><p class="card">The figures are drawn by a script in this page, which is switched off here.</p></noscript>
<div class="figures">
$figures
</div>
$table
</main>
<footer>
<p>$caveat</p>
<p>Store: $store</p>
<p>Made by relexio $version; to make it again:</p>
$command
</footer>
<script type="application/json" id="report">$data</script>
<script>$library</script>
<script>$script</script>
</body>
</html>
""")


def page(facts: Facts, made: list[Figure], run: str, command: str, library: str) -> str:
    """The whole page. ``run`` names the run, ``command`` makes the page again, ``library`` is the JavaScript of vega-embed."""
    script = _resource("page.js")
    scripts = [_script(library), _script(script)]
    policy = (
        f"default-src 'none'; script-src {' '.join(map(_source, scripts))}; style-src 'unsafe-inline'; img-src data:; "
        f"base-uri 'none'; form-action 'none'"
    )
    return _PAGE.substitute(
        policy=policy,
        version=escape(__version__),
        run=escape(run),
        style=_style(),
        verdict=_verdict(facts),
        keys="\n".join(map(_key, words.keys(facts))),
        figures="\n".join(map(_figure, made)),
        table=_table(facts),
        caveat=escape(words.caveat()),
        store=escape(facts.found.store.shown),
        command=_command(command),
        data=_json(_content(facts, made)),
        library=scripts[0],
        script=scripts[1],
    )


def _content(facts: Facts, made: list[Figure]) -> dict[str, Any]:
    drawn = [
        {"name": f.name, "palette": f.palette, "column": f.column, "signals": f.signals, "spec": spec}
        for f in made
        if (spec := f.spec()) is not None
    ]
    return {
        "config": {theme: config(theme) for theme in COLOURS},
        "palettes": palettes(facts.parts),
        "figures": drawn,
    }


@cache
def _resource(name: str) -> str:
    return files("relexio.report").joinpath(name).read_text(encoding="utf-8")


def _json(value: Any) -> str:
    """JSON in a script element: nothing in it can end the element, or begin a comment."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _script(text: str) -> str:
    """JavaScript in a script element. Where it has these at all, they are in strings."""
    return text.replace("</script", "<\\/script").replace("<!--", "<\\!--").replace("\r\n", "\n")


def _source(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _style() -> str:
    both = {
        theme: " ".join(f"--{name}: {colour};" for name, colour in {**COLOURS[theme], **_TONES[theme]}.items())
        for theme in COLOURS
    }
    return _resource("page.css").replace("@LIGHT@", both["light"]).replace("@DARK@", both["dark"])


def _icon(name: str) -> str:
    return (
        f'<svg viewBox="0 0 24 24" fill="none" stroke="currentColor" stroke-width="2.6" stroke-linecap="round" '
        f'stroke-linejoin="round" aria-hidden="true"><path d="{_PATHS[name]}"/></svg>'
    )


def _verdict(facts: Facts) -> str:
    told = words.verdict(facts)
    lines = [f'<section class="verdict {told.sure}" aria-label="Verdict">']
    lines.append(f'<p class="badge">{_icon(told.sure)}{escape(_BADGES[told.sure])}</p>')
    lines.append(f'<p class="lead">{escape(told.sentences[0])}</p>')
    lines += [f"<p>{escape(text)}</p>" for text in told.sentences[1:]]
    lines += [f'<p class="sign">{_icon("sign")}Not one line: {escape(text)}.</p>' for text in told.signs]
    lines.append(f'<p class="caveat">{escape(words.caveat())}</p>')
    lines += [_command(told.command)] if told.command else []
    return "\n".join([*lines, "</section>"])


def _command(text: str) -> str:
    """A command line that wraps before an option, not inside one."""
    first, *options = text.split(" -")
    return f"<pre>{escape(first)}{''.join(f' <span>-{escape(option)}</span>' for option in options)}</pre>"


def _key(key: words.Key) -> str:
    bar = ""
    if key.run is not None and key.walk is not None:
        bar = (
            f'<div class="bar" aria-hidden="true"><i style="width:{100 * min(max(key.run, 0), 1):.1f}%"></i>'
            f'<b style="left:{100 * min(max(key.walk, 0), 1):.1f}%"></b></div>'
        )
    return (
        f'<div class="card"><dt>{escape(key.name)}</dt><dd class="value">{escape(key.value)}</dd>'
        f'<dd class="why">{bar}{escape(key.why)}</dd></div>'
    )


def _figure(figure: Figure) -> str:
    wide = " wide" if figure.wide else ""
    chart = f'\n<div class="chart" id="{figure.name}"></div>' if figure.chart is not None else ""
    head = f'<h2>{escape(figure.title)}</h2>\n<p class="how">{escape(figure.how)}</p>'
    return f'<figure class="card{wide}">\n{head}{chart}\n</figure>'


_COLUMNS = (
    ("tensor", "tensor", ""), ("part", "part", ""), ("layer", "layer", ""), ("changed", "changed", ".1%"),
    ("share", "of the energy", ".2%"), ("kept", "energy kept", ".3f"), ("r2", "r²", ".3f"),
)  # fmt: skip


def _table(facts: Facts) -> str:
    rows, count = data.tensors(facts.found), len(facts.found.tensors)
    said = (
        f"All {count:,} tensors that moved"
        if len(rows) == count
        else f"The {len(rows):,} most energetic of {count:,} tensors"
    )
    heads = "".join(f'<th scope="col"><button type="button">{title}</button></th>' for _, title, _ in _COLUMNS)
    body = "\n".join(f"<tr>{''.join(_cell(row[name], form) for name, _, form in _COLUMNS)}</tr>" for row in rows)
    return (
        f'<details class="card"><summary>{said}</summary>\n<div class="scroll"><table class="sortable">\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div></details>"
    )


def _cell(value: Any, form: str) -> str:
    if value is None:
        return '<td data-value="-1">–</td>'
    if not form:
        return f"<td>{escape(str(value))}</td>"
    return f'<td data-value="{value:.6g}">{value:{form}}</td>'
