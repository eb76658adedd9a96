"""Prompts, tasks and pre-prompts from files, and their tokens as the dictionary's model is to read them."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.data import Data
from sparse_jax.errors import InputError
from sparse_jax.features.prompt_diff import Suffixes, make_suffixes
from sparse_jax.features.prompts import Prompts, make_prompts
from sparse_jax.features.search_task import Task


def read_text(path: Path, flag: str) -> str:
    """A text file.

    Raises:
        InputError: it cannot be read, or is empty.
    """
    try:
        text = path.read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{flag} {path} cannot be read: {error}") from error
    if not text.strip():
        raise InputError(f"{flag} {path} is empty")
    return text


def read_prompts(path: Path, flag: str) -> list[str]:
    """One prompt a line, empty lines left out; or the field "text" of each line of a .jsonl file.

    Raises:
        InputError: the file cannot be read, or a line has no such field.
    """
    if path.suffix == ".jsonl":
        return [text for (text,) in _read_lines(path, flag, ("text",))]
    return [line for line in read_text(path, flag).splitlines() if line.strip()]


def read_task(path: Path, flag: str = "--task") -> list[tuple[str, str, str]]:
    """(prompt, right answer, wrong answer) of each line.

    Raises:
        InputError: the file cannot be read, a line has not these fields, or its answers are the same.
    """
    lines = _read_lines(path, flag, ("prompt", "right", "wrong"))
    if same := [i for i, (_, right, wrong) in enumerate(lines) if right == wrong]:
        raise InputError(f"{flag} {path}, line {same[0] + 1}: the right and the wrong answer are the same")
    return lines


def _read_lines(path: Path, flag: str, fields: Sequence[str]) -> list[tuple[str, ...]]:
    found = []
    for number, line in enumerate(read_text(path, flag).split("\n"), 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except ValueError as error:
            raise InputError(f"{flag} {path}, line {number} is not JSON: {error}") from error
        values = [content.get(field) if isinstance(content, dict) else None for field in fields]
        if not all(isinstance(value, str) and value for value in values):
            raise InputError(f"{flag} {path}, line {number}: give texts {', '.join(map(repr, fields))}")
        found.append(tuple(values))
    return found


def one_token(data: Data, string: str, flag: str) -> int:
    """The id of a string that is one token.

    Raises:
        InputError: it is several; says which.
    """
    ids = data.tokenizer.encode([string])[0]
    if len(ids) != 1:
        pieces = ", ".join(map(repr, data.tokenizer.token_strings(ids)))
        raise InputError(f"{flag} {string!r} is {len(ids)} tokens ({pieces}): give one, with its space before it")
    return int(ids[0])


def _layout(data: Data) -> dict:
    return {
        "longest": data.lm.config.max_positions,
        "bos_id": data.tokenizer.bos_id if data.flags.bos == "row" else None,
        "skip_positions": data.flags.skip_positions,
        "masked_ids": data.evaluation.masked_ids,
    }


def prompts_of(data: Data, texts: Sequence[str]) -> Prompts:
    """Prompts put together as the text was that the dictionary was trained on."""
    return make_prompts(data.tokenizer.encode(texts), **_layout(data))


def task_of(data: Data, lines: Sequence[tuple[str, str, str]]) -> Task:
    """The task's prompts and its answers' ids.

    Raises:
        InputError: an answer that is not one token.
    """
    prompts, *answers = zip(*lines)
    ids = [np.array([one_token(data, text, "answer") for text in side], np.int32) for side in answers]
    return Task(prompts_of(data, prompts), *ids)


def suffixes_of(data: Data, pre_prompt: str, texts: Sequence[str]) -> Suffixes:
    """The suffixes alone and behind the pre-prompt."""
    encode = data.tokenizer.encode
    return make_suffixes(encode([pre_prompt])[0], encode(texts), **_layout(data))
