"""Side files of two checkpoints of a run, looked into as far as it matters to what a model is asked and answers."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

#: A template in a file of its own counts for more than one in the tokenizer's configuration.
TEMPLATE = "chat_template.jinja"
TOKENIZER = "tokenizer_config.json"
#: Keys of configurations in which every trainer's copy differs, and no answer does.
_IGNORED = {
    "_name_or_path", "_from_model_config", "architectures", "dtype", "pad_token_id", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip
_CONFIGS = ("config.json", "generation_config.json")
_TOKENS = ("bos_token", "eos_token", "add_bos_token", "add_eos_token")
_MOST = 1 << 20  # bytes of a file that is looked into
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
