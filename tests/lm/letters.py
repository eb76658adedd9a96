"""A tokenizer with one id a letter, and documents made of letters: packing that can be worked out by hand."""

from pathlib import Path

import tokenizers
from tokenizers import models, pre_tokenizers

from sparse_jax.lm.documents import Document
from sparse_jax.lm.tokenizer import Tokenizer, load_tokenizer

SEPARATOR, PAD, BOS = 0, 1, 2
# "a" is 3, "b" is 4, ...
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def letter_tokenizer(folder: Path) -> Tokenizer:
    """One id for each letter standing alone; its files are written to `folder`."""
    vocabulary = {token: i for i, token in enumerate(["<eos>", "<pad>", "<bos>", *LETTERS])}
    made = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="z"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<eos>", "pad_token": "<pad>", "bos_token": "<bos>"}')
    return load_tokenizer(folder)


def texts(*contents: str) -> list[Document]:
    """Documents t#1, t#2, ... of these contents."""
    return [Document(f"t#{i}", content) for i, content in enumerate(contents, 1)]
