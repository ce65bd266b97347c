"""Sizes and steps as text: parsing what the user writes, and formatting what the program prints."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from typing import Any
from urllib.parse import unquote

from relexio.errors import RequestError

_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 1 << 10,
    "MI": 1 << 20,
    "GI": 1 << 30,
    "TI": 1 << 40,
}


def parse_size(text: str) -> int:
    """Bytes of ``2GB``, ``512MiB``, ``1.5G`` or ``1000000``. Raises RequestError with the accepted forms."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*(?:([KMGT]I?)B?|B?)\s*", text.upper())
    if not match or float(match[1]) <= 0:
        raise RequestError(f"{text!r} is not a size; write 2GB, 512MiB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def parse_duration(text: str) -> float:
    """Seconds of ``90s``, ``30m``, ``2h`` or ``90``. Raises RequestError with the accepted forms."""
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([smh]?)\s*", text.lower())
    if not match:
        raise RequestError(f"{text!r} is not a duration; write 90s, 30m or 2h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def show(count: float) -> str:
    """Bytes for people: ``1.5 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.5 else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


#: What stands in place of what is left out.
HIDDEN = "***"
_SCHEME = re.compile(r"[A-Za-z][\w+.:-]*:/{1,3}")  # one slash is left of two where a URL was taken for a path
_ADDRESS = re.compile(_SCHEME.pattern + r"\S*[^\s:;,.)'\"]")
_SHORT = 4  # characters; a shorter password is only known by its place


def shown(address: str) -> str:
    """An address without user, password and query, where it has them; a path as it is."""
    login, query = _secrets(address)
    text = address.replace(f"{login}@", f"{HIDDEN}@", 1) if login else address
    return text.replace(f"?{query}", f"?{HIDDEN}") if query else text


def stem(address: str) -> str:
    """The last name of an address, without ``.zarr``: what files about a trajectory are called."""
    name = shown(address).rstrip("/").rpartition("/")[2]
    return name.removeprefix(f"{HIDDEN}@").removesuffix(".zarr")


def without_secrets(text: str, address: str = "") -> str:
    """A text without the secrets that ``shown`` hides, of every address in it and of ``address`` wherever it occurs."""
    login, query = _secrets(address)
    password = login.partition(":")[2]
    for secret in (query, login, password if len(password) >= _SHORT else ""):
        for form in {secret, unquote(secret)} - {""}:
            text = text.replace(form, HIDDEN)
    return _ADDRESS.sub(lambda match: shown(match[0]), text)


def html_table(rows: Iterable[tuple[str, str]]) -> str:
    """Names and values as a small table for notebooks: everything escaped (names come from files), no secrets."""
    cells = [tuple(escape(without_secrets(text)) for text in row) for row in rows]
    lines = (f'<tr><th scope="row">{name}</th><td>{value}</td></tr>' for name, value in cells)
    return f"<table>{''.join(lines)}</table>"


def _secrets(address: str) -> tuple[str, str]:
    """Login and query of a URL, each empty where there is none.

    A secret key may hold slashes, which belong into no login, so all up to the last @ counts. A user alone is no secret
    but in ``https://token@host``; in ``abfs://container@account/`` it says where the data is.
    """
    scheme = _SCHEME.match(address)
    if scheme is None:
        return "", ""
    rest, _, query = address[scheme.end() :].partition("?")
    login, _, _ = rest.rpartition("@")
    host = rest.partition("/")[0]
    with_login = "@" in host or re.search(r":(?!\d*$)", host)  # else an @ in a path, perhaps behind a port
    secret = ":" in login or scheme[0].lower().startswith("http")
    return login if with_login and secret else "", query


def describe_steps(steps: tuple[int, ...]) -> str:
    """Steps in a few words: all of them if few, else the ends and the number."""
    if len(steps) <= 6:
        return ("steps " if len(steps) != 1 else "step ") + ", ".join(map(str, steps))
    return f"{len(steps)} steps, {steps[0]} to {steps[-1]}"


@dataclass(frozen=True)
class Selection:
    """Which steps the user wants: inclusive ranges, as ``1:75``, ``5:``, ``10:300:10``, ``1,2,5`` or a mix."""

    text: str
    parts: tuple[range, ...]

    def __contains__(self, step: int) -> bool:
        return any(step in part for part in self.parts)

    @property
    def named(self) -> list[int]:
        """The steps that are named one by one, and so must exist."""
        return [part[0] for part in self.parts if len(part) == 1]


def parse_steps(text: str) -> Selection:
    """Parse a step expression. Raises RequestError with the accepted forms."""
    parts = []
    for piece in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,15})(?::(\d{0,15})(?::(\d{1,15}))?)?\s*", piece)
        if not match:
            raise RequestError(f"{text!r} is not a list of steps; write 1:75, 10:300:10 or 1,2,5")
        first, last, stride = match.groups()
        stop = int(first) if last is None else int(last or 10**15)
        if int(stride or 1) == 0 or stop < int(first):
            raise RequestError(f"{piece!r} holds no step; write FIRST:LAST or FIRST:LAST:STRIDE, both ends included")
        parts.append(range(int(first), stop + 1, int(stride or 1)))
    return Selection(text, tuple(parts))


def digits(text: str) -> tuple[Any, ...]:
    """A sort key that puts ``shard-2`` before ``shard-10``."""
    return tuple(int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text))
