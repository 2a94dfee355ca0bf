"""A tokenizer as the keys of a GGUF file.

Two kinds are known: byte-level BPE (`gpt2` there), which needs the name of its way to split text, and BPE as
SentencePiece makes it, with a byte for whatever else (`llama` there), whose merges become scores. A tokenizer
that came from a GGUF file keeps the keys it came with.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from gguf import GGUFValueType, TokenType

from probeprune.engines.gguf_pre_tokenizers import NAMES, TEXT
from probeprune.errors import UsageError
from probeprune.model.gguf_keys import Key, kept_keys

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "\u2581"
"""How SentencePiece writes a space."""

_STRING, _BOOL, _WHOLE = GGUFValueType.STRING, GGUFValueType.BOOL, GGUFValueType.UINT32
_ARRAY = GGUFValueType.ARRAY

_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
"""Special tokens by their names in transformers and, misspelt or not, in GGUF files."""


def tokenizer_keys(tokenizer: Any, vocabulary: int) -> dict[str, Key]:
    """All keys `tokenizer.*` of a file, and those of `general.*` that came with the model.

    Args:
        tokenizer: a fast tokenizer of transformers.
        vocabulary: the rows of the model's embeddings; the list of tokens is filled up to as many.

    Raises:
        UsageError: a tokenizer that llama.cpp does not know, or with more tokens than the model.
    """
    kept = kept_keys(tokenizer)
    found = kept if kept is not None else _made(tokenizer)
    return _filled(found, vocabulary)


def _made(tokenizer: Any) -> dict[str, Key]:
    """The keys of a tokenizer that did not come with any."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UsageError(
            f"the tokenizer is a {type(tokenizer).__name__}, which has no tokenizer.json, and a GGUF file is "
            "made from that; open it with AutoTokenizer."
        )
    state = json.loads(backend.to_str())
    kind = state["model"]["type"]
    if kind == "BPE" and state["model"].get("byte_fallback"):
        keys = _sentencepiece(tokenizer, state)
    elif kind == "BPE" and "ByteLevel" in json.dumps(state.get("pre_tokenizer")):
        keys = _byte_level(tokenizer, state)
    else:
        raise UsageError(
            f"llama.cpp does not know this kind of tokenizer ({kind}); it knows byte-level BPE, and BPE with "
            "byte fallback as SentencePiece makes it."
        )
    return keys | _special(tokenizer)


# -- vocabularies ----------------------------------------------------------------------------------


def _byte_level(tokenizer: Any, state: Mapping[str, Any]) -> dict[str, Key]:
    """Byte-level BPE: tokens in the alphabet of bytes, merges, and how text is split."""
    tokens, types = _tokens(tokenizer)
    merges = [" ".join(part.replace(" ", "\u0120") for part in pair) for pair in _merges(state)]
    return {
        "tokenizer.ggml.model": Key("gpt2", _STRING),
        "tokenizer.ggml.pre": Key(_split_name(tokenizer), _STRING),
        "tokenizer.ggml.tokens": Key(tokens, _ARRAY, _STRING),
        "tokenizer.ggml.token_type": Key(types, _ARRAY, GGUFValueType.INT32),
        "tokenizer.ggml.merges": Key(merges, _ARRAY, _STRING),
    }


def _split_name(tokenizer: Any) -> str:
    """The name of the way a tokenizer splits text. Raises `UsageError` if llama.cpp has none for it."""
    found = hashlib.sha256(str(tokenizer(TEXT)["input_ids"]).encode()).hexdigest()
    if found not in NAMES:
        raise UsageError(
            "llama.cpp has no name for the way this tokenizer splits text "
            f"(its public converter would look for {found[:12]}...), so the file would split it in another "
            "way; export the model with the tokenizer it was published with."
        )
    return NAMES[found]


def _sentencepiece(tokenizer: Any, state: Mapping[str, Any]) -> dict[str, Key]:
    """BPE of SentencePiece: the engine merges the two neighbours whose token has the best score, so a token
    scores by the first merge that makes it."""
    tokens, types = _tokens(tokenizer)
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_merges(state)):
        ranks.setdefault(left + right, rank)
    normal = (TokenType.NORMAL, TokenType.UNKNOWN)
    scores = [
        -float(ranks[token]) if token in ranks and kind in normal else 0.0
        for token, kind in zip(tokens, types, strict=True)
    ]
    for index, token in enumerate(tokens):
        if types[index] == TokenType.NORMAL and _BYTE.fullmatch(token):
            types[index] = TokenType.BYTE
        elif token == state["model"].get("unk_token"):
            types[index] = TokenType.UNKNOWN
        elif types[index] == TokenType.NORMAL and len(token) > 1 and token not in ranks:
            scores[index] = -1e6  # no merge makes it
    return {
        "tokenizer.ggml.model": Key("llama", _STRING),
        "tokenizer.ggml.pre": Key("default", _STRING),
        "tokenizer.ggml.tokens": Key(tokens, _ARRAY, _STRING),
        "tokenizer.ggml.scores": Key(scores, _ARRAY, GGUFValueType.FLOAT32),
        "tokenizer.ggml.token_type": Key([int(t) for t in types], _ARRAY, GGUFValueType.INT32),
        "tokenizer.ggml.add_space_prefix": Key(_adds_space(state), _BOOL),
    }


def _adds_space(state: Mapping[str, Any]) -> bool:
    """Whether a space is put in front of a text."""
    front, splitting = json.dumps(state.get("normalizer")), state.get("pre_tokenizer") or {}
    parts = splitting.get("pretokenizers", [splitting])
    schemes = [part.get("prepend_scheme") for part in parts if part.get("type") == "Metaspace"]
    return '"Prepend"' in front or any(scheme in ("first", "always") for scheme in schemes)


def _merges(state: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges, best first; older files write each as one text."""
    pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in state["model"]["merges"]]
    return [(left, right) for left, right in pairs]


def _tokens(tokenizer: Any) -> tuple[list[str], list[int]]:
    """Every token by id, and its type. Ids without a token get a name that no text contains."""
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens: list[str] = []
    types: list[int] = []
    for number in range(max(by_id) + 1):
        token, kind = by_id.get(number), TokenType.NORMAL
        if token is None:
            token, kind = f"[PAD{number}]", TokenType.UNUSED
        elif number in added:
            token = _as_decoded(tokenizer, token, added[number])
            special = added[number].special or _looks_special(token)
            kind = TokenType.CONTROL if special else TokenType.USER_DEFINED
            if not special:
                token = token.replace(_SPACE, " ")
        tokens.append(token)
        types.append(int(kind))
    return tokens, types


def _as_decoded(tokenizer: Any, token: str, added: Any) -> str:
    """An added token as the engine looks for it in a text: without what normalisation would change."""
    if added.normalized:
        return token
    decoded: str = tokenizer.decode(tokenizer.encode(token, add_special_tokens=False))
    return decoded


def _looks_special(token: str) -> bool:
    """Whether a token that is not marked special is one: some models forget to."""
    ends = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
    return token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        token.startswith(a) and token.endswith(b) for a, b in ends
    )


# -- special tokens --------------------------------------------------------------------------------


def _special(tokenizer: Any) -> dict[str, Key]:
    """Ids of special tokens, which of them are added to a text, and the chat template."""
    keys = {
        f"tokenizer.ggml.{theirs}_token_id": Key(number, _WHOLE)
        for ours, theirs in _ROLES.items()
        if (number := getattr(tokenizer, f"{ours}_token_id", None)) is not None
    }
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    first = len(whole) > len(bare) and whole[0] == tokenizer.bos_token_id
    last = len(whole) > len(bare) and whole[-1] == tokenizer.eos_token_id
    keys["tokenizer.ggml.add_bos_token"] = Key(first, _BOOL)
    if last:
        keys["tokenizer.ggml.add_eos_token"] = Key(True, _BOOL)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        keys["tokenizer.chat_template"] = Key(template, _STRING)
    return keys


def _filled(keys: dict[str, Key], vocabulary: int) -> dict[str, Key]:
    """The keys with as many tokens as the model has embeddings. Raises `UsageError` for more."""
    tokens = list(keys["tokenizer.ggml.tokens"].value)
    missing = vocabulary - len(tokens)
    if missing < 0:
        raise UsageError(
            f"the tokenizer has {len(tokens)} tokens and the model {vocabulary} embeddings; give the model's "
            "own tokenizer."
        )
    if not missing:
        return keys
    fill: dict[str, list[Any]] = {
        "tokens": [f"[PAD{number}]" for number in range(len(tokens), vocabulary)],
        "token_type": [int(TokenType.UNUSED)] * missing,
        "scores": [-1000.0] * missing,
    }
    filled = dict(keys)
    for name, values in fill.items():
        key = keys.get(f"tokenizer.ggml.{name}")
        if key is not None:
            filled[f"tokenizer.ggml.{name}"] = key._replace(value=list(key.value) + values)
    return filled
