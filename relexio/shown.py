"""What may be seen of an address: no password, no signature.

An address can carry both (``https://user:password@host/run.zarr?signature=...``). It is used as it is, and shown,
written and logged without them: what is printed is pasted into issues, and reports and tables are passed on.
"""

import re
from urllib.parse import unquote

#: What stands in place of what is left out.
HIDDEN = "***"
_SCHEME = re.compile(r"[A-Za-z][\w+.:-]*:/{1,3}")  # one slash is left of two where a URL was taken for a path
_ADDRESS = re.compile(_SCHEME.pattern + r"\S*[^\s:;,.)'\"]")
_SHORT = 4  # characters; a shorter password is only known by its place


def shown(address: str) -> str:
    """An address without user, password and query, where it has them; a path as it is."""
    login, query = _secrets(address)
    found = address.replace(f"{login}@", f"{HIDDEN}@", 1) if login else address
    return found.replace(f"?{query}", f"?{HIDDEN}") if query else found


def stem(address: str) -> str:
    """The last name of an address, without ``.zarr``: what files about a trajectory are called."""
    name = shown(address).rstrip("/").rpartition("/")[2]
    return name.removeprefix(f"{HIDDEN}@").removesuffix(".zarr")


def without_secrets(text: str, address: str = "") -> str:
    """A text without what ``shown`` leaves out of every address in it; and without that of ``address``, wherever it is."""
    login, query = _secrets(address)
    password = login.partition(":")[2]
    for secret in (query, login, password if len(password) >= _SHORT else ""):
        for found in {secret, unquote(secret)} - {""}:
            text = text.replace(found, HIDDEN)
    return _ADDRESS.sub(lambda match: shown(match[0]), text)


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
