"""Keys of a GGUF file with their types: the tokenizer's and those about where the model comes from.

A model from a GGUF file keeps them beside its weights, in `gguf_keys.json`, so that an export writes them as
they were: much of a tokenizer there cannot be told from the tokenizer that transformers makes of it.
The file names the tokenizer it belongs to, and is used for no other.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGUFReader, GGUFValueType

FILE = "gguf_keys.json"

_KEPT = (
    *("name", "author", "organization", "basename", "finetune", "version", "description", "url", "repo_url"),
    *("license", "license.name", "license.link", "languages", "tags", "source", "base_model", "dataset"),
)
"""What is kept of `general`: not what depends on the weights, such as the file type."""


class Reader(GGUFReader):
    """The reader of the `gguf` package over a plain array: it takes two slices for each token, and one of the
    memory map of numpy, which it reads itself, takes five times as long."""

    @property
    def data(self) -> Any:
        """The bytes of the file, mapped."""
        return self._bytes

    @data.setter
    def data(self, mapped: Any) -> None:
        self._bytes = np.asarray(mapped)


class Key(NamedTuple):
    """The value of one key. Arrays are lists."""

    value: Any
    kind: GGUFValueType
    item: GGUFValueType | None = None
    """The type of an array's items."""


def read_keys(reader: GGUFReader) -> dict[str, Key]:
    """The keys of a file that are worth keeping."""
    found = {}
    for name, field in reader.fields.items():
        room, _, rest = name.partition(".")
        kept = any(rest == k or rest.startswith(f"{k}.") for k in _KEPT)
        if room == "tokenizer" or (room == "general" and kept):
            found[name] = Key(field.contents(), *field.types[:2])
    return found


def write_keys(folder: Path, keys: dict[str, Key], tokenizer: Any) -> None:
    """Write the keys into a folder, for this tokenizer."""
    stored = {name: [k.value, k.kind.name, k.item and k.item.name] for name, k in keys.items()}
    text = json.dumps({"tokenizer": fingerprint(tokenizer), "keys": stored})
    (folder / FILE).write_text(f"{text}\n", encoding="utf-8")


def kept_keys(tokenizer: Any) -> dict[str, Key] | None:
    """The keys beside the file that a tokenizer was opened from; None where there are none for it."""
    try:
        stored = json.loads((_home(tokenizer) / FILE).read_text(encoding="utf-8"))
        if stored["tokenizer"] != fingerprint(tokenizer):
            return None
        return {
            str(name): Key(value, GGUFValueType[kind], GGUFValueType[item] if item else None)
            for name, (value, kind, item) in stored["keys"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def take_along(tokenizer: Any, folder: Path) -> None:
    """Copy the keys that belong to a tokenizer into the folder where it is saved, if there are any."""
    if kept_keys(tokenizer) is not None:
        shutil.copyfile(_home(tokenizer) / FILE, folder / FILE)


def fingerprint(tokenizer: Any) -> str:
    """A hash of what a tokenizer does; padding and truncation, which a call may set, do not count."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for setting in ("padding", "truncation"):
        state.pop(setting, None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    text = json.dumps([state, special, tokenizer.chat_template], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _home(tokenizer: Any) -> Path:
    return Path(str(tokenizer.name_or_path))
