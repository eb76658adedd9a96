"""A model's own tokenizer behind one small interface: texts to ids, ids to strings fit to be shown."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers
from jaxtyping import Int32

from sparse_jax.errors import InputError
from sparse_jax.lm.joining import RULES
from sparse_jax.lm.spelling import bytes_of_byte_level, bytes_of_piece

# The key of tokenizer_config.json that says the model was trained on lines encoded one by one.
LINES_KEY = "sparse_jax_lines"


class Backend(Protocol):
    """What a tokenizer must be able to do; ids without any that the tokenizer would put around a text."""

    def encode(self, texts: list[str]) -> list[list[int]]: ...

    def bytes_of(self, token_id: int) -> bytes | None:
        """The UTF-8 that the id stands for, of special tokens their names; None where the id is no token."""

    def id_of(self, token: str) -> int | None: ...

    def is_special(self, token_id: int) -> bool:
        """Whether the id is marked as standing for no text."""

    def added_around(self) -> list[int]:
        """The ids that the tokenizer would put around a text by itself."""


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer; make one with `load_tokenizer`.

    separator_id: the id that stands before each document (the end-of-text token that `joining` names for the model's
        family, else the declared one, else the begin-of-text token); None where the model has none of them.
    bos_id: the begin-of-text id; None where the model has none.
    pad_id: the padding id; None where the model has none.
    vocab_size: every id is below it. A model's embedding may have more rows.
    sha256: of the bytes of tokenizer.json, in hex; without that file, of the vocabulary files one after the other.
    by_line: documents are encoded line by line (see `encode_documents`).
    adds_bos: the tokenizer puts the begin-of-text token before a text by itself. `encode` never does.
    """

    backend: Backend
    separator_id: int | None
    bos_id: int | None
    pad_id: int | None
    vocab_size: int
    sha256: str
    by_line: bool = False
    adds_bos: bool = False

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
        spelled = ((i, self.backend.bytes_of(i)) for i in map(int, ids))
        return [f"[{i}]" if text is None else text.decode("utf-8", errors="backslashreplace") for i, text in spelled]

    def byte_lengths(self) -> Int32[np.ndarray, " vocab_size"]:
        """The UTF-8 bytes that each id stands for, to give losses per byte of text instead of per token.

        Byte-level tokenizers: exact, so that the sum over `encode(text)` is the length of the text (normalised first,
        where the tokenizer does that: Pythia's and Qwen's turn it into NFC). SentencePiece: the sign for a space and a
        single-byte token count one byte; the space that some put before a text is counted as well. Separator,
        begin-of-text, padding and special tokens, and ids that are no token, stand for no text: 0.
        """
        no_text = {self.separator_id, self.bos_id, self.pad_id}
        text = (i not in no_text and not self.backend.is_special(i) for i in range(self.vocab_size))
        return np.array([len(self.backend.bytes_of(i) or b"") if has else 0 for i, has in enumerate(text)], np.int32)


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
    eos = _family_separator(declared[1].get("model_type"), backend)
    if eos is None:
        eos = _special_id("eos", declared, backend.id_of, size)
    return Tokenizer(
        backend,
        separator_id=bos if eos is None else eos,
        bos_id=bos,
        pad_id=_special_id("pad", declared, backend.id_of, size),
        vocab_size=size,
        sha256=digest,
        by_line=bool(config.get(LINES_KEY, False)),
        # Some folders leave it out of tokenizer.json: transformers 4 added it for the entry in the config.
        adds_bos=bos is not None and (bos in backend.added_around() or config.get("add_bos_token") is True),
    )


def _family_separator(model_type: str | None, backend: Backend) -> int | None:
    """The end-of-text id by the family's rule; None where there is no rule or the tokenizer has no such token."""
    rule = RULES.get(model_type)
    ids = (backend.id_of(token) for token in (rule.separators if rule else ()))
    return next((i for i in ids if i is not None and backend.is_special(i)), None)


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
        added = tokenizer.get_added_tokens_decoder()
        self._added = {i: token.content for i, token in added.items()}
        self._special = {i for i, token in added.items() if token.special}
        self._byte_level = "ByteLevel" in repr(tokenizer.decoder)
        # Not the number of tokens: ids may have gaps.
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def bytes_of(self, token_id: int) -> bytes | None:
        if token_id in self._added:
            return self._added[token_id].encode()
        if not 0 <= token_id < self.vocab_size:
            return None
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return None
        return bytes_of_byte_level(token) if self._byte_level else bytes_of_piece(token)

    def id_of(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def added_around(self) -> list[int]:
        return self._tokenizer.encode("").ids


class _Slow:
    """A tokenizer of `transformers` written in Python."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._tokens = {i: token for token, i in tokenizer.get_vocab().items()}
        self._special = set(tokenizer.all_special_ids)
        self.vocab_size = max(self._tokens) + 1

    def encode(self, texts: list[str]) -> list[list[int]]:
        options = {"add_special_tokens": False, "split_special_tokens": True, "truncation": False, "verbose": False}
        return [self._tokenizer(text, **options)["input_ids"] for text in texts]

    def bytes_of(self, token_id: int) -> bytes | None:
        token = self._tokens.get(token_id)
        return None if token is None else bytes_of_piece(token)

    def id_of(self, token: str) -> int | None:
        return next((i for i, known in self._tokens.items() if known == token), None)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def added_around(self) -> list[int]:
        return self._tokenizer("")["input_ids"]
