"""Side files of two checkpoints of a run: what differs in what a model is asked and answers, and which a prediction has."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from relexio.checkpoints.files import is_tensors
from relexio.checkpoints.record import CheckpointRecord
from relexio.checkpoints.write import CARD, PROVENANCE, OutputFile, output_files, without_clashes
from relexio.dtypes import Table

#: A template in a file of its own counts for more than one in the tokenizer's configuration.
TEMPLATE = "chat_template.jinja"
TOKENIZER = "tokenizer_config.json"
#: Keys of configurations in which every trainer's copy differs, and no answer does.
_IGNORED = {
    "_name_or_path", "_from_model_config", "architectures", "dtype", "pad_token_id", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip
_CONFIG = "config.json"
_CONFIGS = (_CONFIG, "generation_config.json")
_TOKENS = ("bos_token", "eos_token", "add_bos_token", "add_eos_token")
_MOST = 1 << 20  # bytes of a file that is looked into
#: Side files of a training step that say nothing of the model, or that a prediction has of its own.
_NOT_CARRIED = {CARD, PROVENANCE, "trainer_state.json"}
#: The side files that are compared.
COMPARED = (TEMPLATE, TOKENIZER, *_CONFIGS)


def differences(base: Mapping[str, bytes], step: Mapping[str, bytes]) -> list[str]:
    """What differs, in words, of the files of COMPARED that both have; of a key, its value where both have one.

    (A key that only one has mostly comes with another version of a library.)
    """
    return list(_differences(base, step))


def _differences(base: Mapping[str, bytes], step: Mapping[str, bytes]) -> Iterator[str]:
    if (TEMPLATE in step or TOKENIZER in step) and template(base) != template(step):
        yield "the chat template"
    yield from _named(TOKENIZER, base, step, lambda key: key in _TOKENS)
    for name in _CONFIGS:
        yield from _named(name, base, step, lambda key: key not in _IGNORED)


def _named(
    name: str, base: Mapping[str, bytes], step: Mapping[str, bytes], counts: Callable[[str], bool]
) -> Iterator[str]:
    ours, theirs = _json(base.get(name)), _json(step.get(name))
    keys = [
        key for key in sorted(ours.keys() & theirs.keys()) if counts(key) and _plain(ours[key]) != _plain(theirs[key])
    ]
    if keys:
        yield f"{name} ({', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''})"


def template(files: Mapping[str, bytes]) -> Any:
    """The chat template of a checkpoint, from whichever of TEMPLATE and TOKENIZER has it; None without one."""
    text = _json(files.get(TOKENIZER)).get("chat_template")
    if TEMPLATE in files:
        text = files[TEMPLATE].decode("utf-8", "replace")
    return text.removesuffix("\n") if isinstance(text, str) else text  # as Jinja does


def _plain(value: Any) -> Any:
    """A token by its text, whether or not its properties stand beside it."""
    return value["content"] if isinstance(value, dict) and "content" in value else value


def _json(data: bytes | None) -> dict[str, Any]:
    """The object in a file; an empty one of what is none, or too long to be looked into."""
    try:
        value = json.loads(data) if data is not None and len(data) <= _MOST else {}
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def carried(
    base: CheckpointRecord, last: CheckpointRecord, table: Table, read: Callable[[str], bytes], shown: str
) -> tuple[dict[str, str], list[str]]:
    """The arrays of the files that lie beside a prediction's weights, by name; and the names of those that cannot lie there.

    They are those of the ``last`` observed step, and what only the base has. None can lie in a directory with the name of a
    file that the prediction has of its own. ``read`` and ``shown`` are as for ``output_files``.
    """
    wanted = {**last.side, **lacking(base, last, read)}
    wanted = {name: array for name, array in wanted.items() if name not in _NOT_CARRIED and not is_tensors(name)}
    files_of = partial(output_files, table=table, read=read, shown=shown)
    if _CONFIG in base.side and _tensors(files_of(last)) != _tensors(files_of(base)):
        wanted[_CONFIG] = base.side[_CONFIG]  # it says whether the head is tied, and so which tensors the files hold
    own = [CARD, PROVENANCE, *(file.name for file in files_of(base)), *(base.beside.keys() - base.side.keys())]
    names = without_clashes(sorted(wanted, key=lambda name: name.count("/")), own)  # a file rather than a directory
    return replace(base, side={n: wanted[n] for n in names}).beside, [n for n in wanted if n not in names]


def _tensors(files: list[OutputFile]) -> list[str]:
    return sorted(name for file in files for name, _ in file.places)


def lacking(base: CheckpointRecord, record: CheckpointRecord, read: Callable[[str], bytes]) -> dict[str, str]:
    """The arrays of those of the base's side files that a step lacks, by name; none that hold tensors.

    Where the step's tokenizer has its chat template in its configuration, a file with the base's would displace it.
    """
    lacks = {name: array for name, array in base.side.items() if name not in record.side and not is_tensors(name)}
    looks = TEMPLATE in lacks and TOKENIZER in record.side
    if looks and template({TOKENIZER: read(record.side[TOKENIZER])}) is not None:
        del lacks[TEMPLATE]
    return lacks
