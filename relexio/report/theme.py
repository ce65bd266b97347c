"""Colours and type of the figures, light and dark, as Vega-Lite configurations. Hues are told apart by colour-blind eyes too."""

from typing import Any

from relexio.errors import RequestError
from relexio.methods import METHODS

#: What the page and the figures share: background, card, text, secondary text, lines, accent; and the tones of the verdict,
#: behind white or dark text (``on``), never the only sign.
COLOURS = {
    "light": {
        "page": "#f6f7f9", "card": "#ffffff", "ink": "#1a1d21", "soft": "#59616b", "line": "#dfe3e8", "accent": "#1f6fb2",
        "good": "#1c7c54", "fair": "#1f6fb2", "weak": "#a15c00", "bad": "#b3362b", "on": "#ffffff",
    },
    "dark": {
        "page": "#101316", "card": "#191d21", "ink": "#eceff2", "soft": "#a3acb6", "line": "#31373e", "accent": "#62b0ee",
        "good": "#5fd3a0", "fair": "#62b0ee", "weak": "#f0b35c", "bad": "#ff8d7f", "on": "#101316",
    },
}  # fmt: skip
#: The parts of a model in the order in which figures have them, from below to above, each in light and dark.
#: Attention is blue to green, the MLP yellow to red, what is outside the layers violet and grey.
PART_COLOURS = {
    "embedding": ("#8e44ad", "#c792e8"),
    "qkv": ("#2f5fa8", "#7aa7f0"),
    "q": ("#1f4e9c", "#6f9df2"),
    "k": ("#2f8fd0", "#6cc5f7"),
    "v": ("#12908e", "#4fd1cf"),
    "o": ("#4f9d3a", "#9bdc7f"),
    "gate": ("#c98a00", "#f5c84c"),
    "up": ("#e0701a", "#ff9d57"),
    "down": ("#c0392b", "#ff7d6e"),
    "norm": ("#b0508f", "#f095d0"),
    "head": ("#7a6a58", "#cdbda8"),
    "other": ("#7d868f", "#9aa3ad"),
}
_METHODS = (  # as many as are told apart; the methods that extrapolate take the first ones
    ("#1f6fb2", "#62b0ee"), ("#d9730d", "#ffa057"), ("#12908e", "#4fd1cf"), ("#b0508f", "#f095d0"),
    ("#a07b00", "#f5c84c"), ("#6d5bd0", "#b3a6ff"), ("#6b7680", "#aab3bc"), ("#4f9d3a", "#9bdc7f"),
    ("#b3202c", "#ff6b6b"), ("#5b3a1e", "#b98a5e"), ("#1b2a6b", "#4f6dff"), ("#c800c8", "#e05cff"),
)  # fmt: skip


def palettes(parts: list[str]) -> dict[str, dict[str, list[str]]]:
    """The colours of a figure's categories by palette and theme, in the order of its domain.

    Raises RequestError for more methods than there are colours.
    """
    methods = sum(method.extrapolates for method in METHODS.values())
    if methods > len(_METHODS):
        raise RequestError(
            f"a report has colours for {len(_METHODS)} methods, and {methods} extrapolate: add to _METHODS in {__file__}"
        )
    of_parts = [both for part, both in PART_COLOURS.items() if part in parts]
    themes = list(enumerate(COLOURS))
    return {
        "parts": {theme: [COLOURS[theme]["ink"], *(both[index] for both in of_parts)] for index, theme in themes},
        "methods": {theme: [both[index] for both in _METHODS[:methods]] for index, theme in themes},
        "pair": {theme: [COLOURS[theme]["accent"], COLOURS[theme]["soft"]] for theme in COLOURS},
    }


def config(theme: str, font: str = "system-ui, sans-serif", category: list[str] | None = None) -> dict[str, Any]:
    """The Vega-Lite configuration of a theme, ``light`` or ``dark``."""
    c = COLOURS[theme]
    diverging = ["#b3541e", c["card"], "#2468a8"] if theme == "light" else ["#b5602a", "#23282d", "#2f74b8"]
    return {
        "font": font,
        "background": c["card"],
        "view": {"stroke": None},
        "axis": {
            "labelColor": c["soft"], "titleColor": c["soft"], "domainColor": c["line"], "tickColor": c["line"],
            "gridColor": c["line"], "gridOpacity": 0.7, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal",
            "labelFlush": False, "titlePadding": 8,
        },
        "axisX": {"grid": False},
        "axisY": {"domain": False, "ticks": False, "labelPadding": 6},
        "axisBand": {"grid": False, "labelAngle": 0, "ticks": False},
        "title": {
            "anchor": "start", "frame": "group", "color": c["soft"], "fontSize": 12, "fontWeight": "normal", "offset": 10,
            "subtitleColor": c["soft"], "subtitleFontSize": 12, "subtitlePadding": 6,
        },
        "legend": {
            "orient": "top", "direction": "horizontal", "labelColor": c["ink"], "titleColor": c["soft"], "labelFontSize": 12,
            "labelLimit": 320, "symbolStrokeWidth": 2, "symbolSize": 90, "offset": 8, "columnPadding": 16, "rowPadding": 4,
            "symbolOpacity": 1,
        },
        "line": {"strokeCap": "round", "strokeJoin": "round", "strokeWidth": 2},
        "rect": {"stroke": None},
        "text": {"color": c["ink"], "fontSize": 12},
        "style": {
            "zero": {"color": c["ink"], "strokeWidth": 1.5},
            "ruled": {"color": c["soft"], "strokeDash": [4, 4], "strokeWidth": 1},
            "note": {"color": c["soft"], "fontSize": 12},
            "value": {"color": c["ink"], "fontSize": 11},
        },
        "range": {
            "category": category or palettes([])["methods"][theme],
            "heatmap": {"scheme": "viridis"},
            "ramp": {"scheme": "viridis"},
            "diverging": diverging,
        },
    }  # fmt: skip
