"""A model's own tokenizer behind one small interface: texts to ids, ids to strings fit to be shown."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers
from jaxtyping import Int32

from sparse_jax.errors import InputError

# The key of tokenizer_config.json that says the model was trained on lines encoded one by one.
LINES_KEY = "sparse_jax_lines"


class Backend(Protocol):
    """What a tokenizer must be able to do; ids without any that the tokenizer would put around a text."""

    def encode(self, texts: list[str]) -> list[list[int]]: ...

    def show(self, token_id: int) -> str | None:
        """The token as text, or None where the id is no token."""

    def id_of(self, token: str) -> int | None: ...


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer; make one with `load_tokenizer`.

    separator_id: the id that stands before each document (the end-of-text token, else the begin-of-text token); None
        where the model has neither.
    bos_id: the begin-of-text id; None where the model has none.
    pad_id: the padding id; None where the model has none.
    vocab_size: every id is below it. A model's embedding may have more rows.
    sha256: of the bytes of tokenizer.json, in hex; without that file, of the vocabulary files one after the other.
    by_line: documents are encoded line by line (see `encode_documents`).
    """

    backend: Backend
    separator_id: int | None
    bos_id: int | None
    pad_id: int | None
    vocab_size: int
    sha256: str
    by_line: bool = False

    def encode(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " tokens"]]:
        """The ids of each text, nothing added before or after, nothing cut.

        A text that spells a special token (`<|endoftext|>`) is encoded as the ordinary text it is and never becomes the
        special id, so a separator in a stream is always a real one. `transformers` would give the special id. Added
        tokens that are not marked special (runs of spaces in Pythia's tokenizer) are used as usual.
        """
        return [np.array(ids, np.int32) for ids in self.backend.encode(list(texts))]

    def encode_documents(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " tokens"]]:
        """The ids of each document as the model saw documents in training.

        Most models: the whole text at once. With `by_line`: each line with a newline sign at its end, the last one
        too, encoded alone. The two differ where a line ends in spaces or several empty lines follow each other.
        """
        if not self.by_line:
            return self.encode(texts)
        lines = [[line + "\n" for line in text.split("\n")] for text in texts]
        ids = iter(self.backend.encode([line for document in lines for line in document]))
        return [np.array([token for _ in document for token in next(ids)], np.int32) for document in lines]

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        r"""Each id alone as text, for display.

        A leading space is kept. Bytes that are no character by themselves appear as `\xe2`; an id that is no token
        (a model's padded vocabulary, a target of -1) as `[50300]`. Never raises for an integer.
        """
        return [f"[{i}]" if (text := self.backend.show(i)) is None else text for i in map(int, ids)]


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer in a model's folder: its tokenizer.json, else whatever `transformers.AutoTokenizer` finds there.

    Raises InputError if the folder or a tokenizer in it is missing, or a file cannot be read.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise InputError(f"no folder {str(folder)!r} to load a tokenizer from; give the folder of a Hugging Face model")
    path = folder / "tokenizer.json"
    config = _json(folder / "tokenizer_config.json")
    declared = [config, _json(folder / "config.json"), _json(folder / "special_tokens_map.json")]
    if path.exists():
        backend, digest = _Fast(_from_file(path)), hashlib.sha256(path.read_bytes()).hexdigest()
    else:
        backend, own, digest = _from_transformers(folder)
        declared.append(own)
    size = backend.vocab_size
    bos = _special_id("bos", declared, backend.id_of, size)
    eos = _special_id("eos", declared, backend.id_of, size)
    return Tokenizer(
        backend,
        separator_id=bos if eos is None else eos,
        bos_id=bos,
        pad_id=_special_id("pad", declared, backend.id_of, size),
        vocab_size=size,
        sha256=digest,
        by_line=bool(config.get(LINES_KEY, False)),
    )


# The names that end-of-text goes by in tokenizers whose folder declares none.
_USUAL = {"eos": ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")}


def _special_id(kind: str, declared: list[dict], id_of: Callable[[str], int | None], size: int) -> int | None:
    """The id of the `bos`, `eos` or `pad` token, from the first file that names one the tokenizer has."""
    for config in declared:
        token, ids = config.get(f"{kind}_token"), config.get(f"{kind}_token_id")
        token = token.get("content") if isinstance(token, dict) else token
        found = id_of(token) if isinstance(token, str) else None
        if found is None:
            # Some models end a text in several ways; the first is the end of a document.
            found = ids[0] if isinstance(ids, list) and ids else ids
        if isinstance(found, int) and 0 <= found < size:
            return found
    return next((found for token in _USUAL.get(kind, ()) if (found := id_of(token)) is not None), None)


def _json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where there is no file."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{str(path)!r} cannot be read as JSON ({error}); fetch the model's files again") from error
    if not isinstance(content, dict):
        raise InputError(
            f"{str(path)!r} is a JSON {type(content).__name__}, not an object; fetch the model's files again"
        )
    return content


def _from_file(path: Path) -> tokenizers.Tokenizer:
    # The library raises a bare Exception for a file that it cannot read.
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        raise InputError(f"{str(path)!r} is not a tokenizer ({error}); fetch the model's files again") from error


def _from_transformers(folder: Path) -> tuple["_Fast | _Slow", dict[str, int | None], str]:
    """A tokenizer without tokenizer.json, its special ids, and a digest of its vocabulary."""
    # Slow to import, and few models need it.
    from transformers import AutoTokenizer

    absent = f"no tokenizer in {str(folder)!r}: it has no tokenizer.json, and transformers.AutoTokenizer"
    try:
        found = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(f"{absent} finds none ({reason}); put the model's tokenizer files there") from error
    vocabulary = found.get_vocab()
    # Without its files a tokenizer is made all the same, of nothing but its special tokens.
    if len(vocabulary) <= len(found.added_tokens_decoder):
        raise InputError(f"{absent} makes an empty one of what is there; put the model's tokenizer files there")
    ids = {f"{kind}_token_id": getattr(found, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    fast = isinstance(getattr(found, "backend_tokenizer", None), tokenizers.Tokenizer)
    return (
        (_Fast(found.backend_tokenizer) if fast else _Slow(found)),
        ids,
        _digest(folder, found.vocab_files_names, vocabulary),
    )


def _digest(folder: Path, files: dict[str, str], vocabulary: dict[str, int]) -> str:
    """Of the vocabulary files, which hold the merges too; of the vocabulary where the tokenizer has no file."""
    paths = [path for name in sorted(set(files.values())) if (path := folder / name).exists()]
    content = [path.read_bytes() for path in paths] or [json.dumps(sorted(vocabulary.items())).encode()]
    return hashlib.sha256(b"".join(content)).hexdigest()


class _Fast:
    """A tokenizer of the `tokenizers` library."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        # A file may ask for all texts to be cut or padded to one length.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self._added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
        self._byte_level = "ByteLevel" in repr(tokenizer.decoder)
        # Not the number of tokens: ids may have gaps.
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def show(self, token_id: int) -> str | None:
        if token_id in self._added:
            return self._added[token_id]
        if not 0 <= token_id < self.vocab_size:
            return None
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return None
        return _from_byte_level(token) if self._byte_level else _from_pieces(token)

    def id_of(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)


class _Slow:
    """A tokenizer of `transformers` written in Python."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._tokens = {i: token for token, i in tokenizer.get_vocab().items()}
        self.vocab_size = max(self._tokens) + 1

    def encode(self, texts: list[str]) -> list[list[int]]:
        options = {"add_special_tokens": False, "split_special_tokens": True, "truncation": False, "verbose": False}
        return [self._tokenizer(text, **options)["input_ids"] for text in texts]

    def show(self, token_id: int) -> str | None:
        token = self._tokens.get(token_id)
        return None if token is None else _from_pieces(token)

    def id_of(self, token: str) -> int | None:
        return next((i for i, known in self._tokens.items() if known == token), None)


def _byte_of_sign() -> dict[str, int]:
    """The byte that each sign of a byte-level token stands for: printable bytes stand for themselves.

    Source: Radford et al., Language Models are Unsupervised Multitask Learners (GPT-2), `bytes_to_unicode` of its code.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_SIGN = _byte_of_sign()


def _from_byte_level(token: str) -> str:
    if not all(sign in _BYTE_OF_SIGN for sign in token):
        return token
    return bytes(_BYTE_OF_SIGN[sign] for sign in token).decode("utf-8", errors="backslashreplace")


def _from_pieces(token: str) -> str:
    """SentencePiece's sign for a space, and its single bytes (`<0xE2>`); any other token as it is spelled."""
    if byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token):
        return bytes([int(byte[1], 16)]).decode("utf-8", errors="backslashreplace")
    return token.replace("\u2581", " ")
