"""JSON from files that may be broken or hostile: refused before it can fill the memory."""

import json
from collections.abc import Callable
from typing import Any

#: Tables (``{``) in the largest file: a tensor is one in a header and in the tensor table, and models have some 400,000.
_TABLES = 500_000
#: Keys, members and lists beside those of tensors: an index names every tensor, metadata has texts with such signs.
_MORE = 600_000
#: For each table at most, by the sign that goes with each. A tensor has four keys, two lists, and a few sizes.
_EACH = {b":": 4, b",": 16, b"[": 2}


def loads(data: bytes, hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of a JSON text in UTF-8; ``hook`` is used as ``object_pairs_hook`` is.

    Signs are counted first, which is fast, because objects take far more memory than their bytes: a key of twelve bytes
    takes three hundred. Raises ValueError for text that is not JSON, is nested too deeply, or has more entries than any
    model.
    """
    tables = data.count(b"{")
    if tables > _TABLES or any(data.count(sign) > each * tables + _MORE for sign, each in _EACH.items()):
        raise ValueError("it has more entries than any model")
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=hook)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
