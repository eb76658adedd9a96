"""The real tokenizers of GPT-2 and Pythia give the ids that transformers gives, with one difference made on purpose."""

import functools
import hashlib
import random
import unicodedata
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from sparse_jax.lm.documents import documents
from sparse_jax.lm.tokenizer import load_tokenizer
from tests.lm.real_tokenizers import END_OF_TEXT, HARD, real_tokenizer

ROOT = Path(__file__).parents[2]
SPECIAL = ("<|endoftext|>", "<|padding|>")


@pytest.fixture(params=["gpt2", "neox"])
def real(request, shared, tmp_path):
    """A folder of the hub, our tokenizer of it, and transformers'."""
    folder = real_tokenizer(shared, tmp_path, request.param)
    return request.param, load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


def reference_ids(reference, texts: list[str]) -> list[list[int]]:
    return reference(texts, add_special_tokens=False, verbose=False)["input_ids"]


def lines(source: str, count: int) -> list[str]:
    """The first lines of each document of an embedded text, each cut where it gets long."""
    by_document = [document.text.split("\n") for document in documents(source)]
    each = -(-count // len(by_document))
    return [line[:160] for document in by_document for line in document[:each]][:count]


def code(count: int) -> list[str]:
    """Lines of this repository's source."""
    files = sorted((ROOT / "sparse_jax").rglob("*.py")) + sorted((ROOT / "tests").rglob("*.py"))
    return [line for file in files for line in file.read_text(encoding="utf8").split("\n")][:count]


def pieced(count: int) -> list[str]:
    """Pieces of the hard texts, cut anywhere (inside emoji and composed signs too), in every normal form."""
    draw = random.Random(0)

    def piece() -> str:
        text = draw.choice(HARD)
        start = draw.randrange(len(text) + 1)
        return text[start : start + draw.randrange(60)]

    forms = (str, *(lambda text, form=form: unicodedata.normalize(form, text) for form in ("NFC", "NFD", "NFKC")))
    return [draw.choice(forms)("".join(piece() for _ in range(draw.randrange(1, 5)))) for _ in range(count)]


@functools.cache
def mixed_lines() -> list[str]:
    """10,000 lines, none of which spells a special token."""
    natural = [*HARD, *lines("austen", 2500), *lines("state-of-the-union", 2000), *code(2500)]
    made = pieced(10_000 - len(natural) + sum(any(token in line for token in SPECIAL) for line in natural))
    mixed = [line for line in (*natural, *made) if not any(token in line for token in SPECIAL)]
    assert len(mixed) == 10_000
    return mixed


def test_ids_are_those_of_transformers_on_ten_thousand_lines(real):
    _, tokenizer, reference = real
    mixed = mixed_lines()
    for line, ours, theirs in zip(mixed, tokenizer.encode(mixed), reference_ids(reference, mixed), strict=True):
        assert ours.tolist() == theirs, repr(line)


def test_ids_are_those_of_transformers_on_whole_documents(real):
    name, tokenizer, reference = real
    assert tokenizer.vocab_size == {"gpt2": 50257, "neox": 50277}[name]
    assert (tokenizer.separator_id, tokenizer.bos_id) == (END_OF_TEXT[name],) * 2
    assert not tokenizer.by_line
    texts = [next(documents("austen")).text, "\n".join(HARD), "".join(HARD) * 5, ""]
    for ours, theirs in zip(tokenizer.encode_documents(texts), reference_ids(reference, texts), strict=True):
        assert ours.tolist() == theirs
    assert all(isinstance(text, str) for text in tokenizer.token_strings(range(tokenizer.vocab_size + 50)))


@pytest.mark.parametrize(
    "spelled", ["<|endoftext|>", "a<|endoftext|>b", "  <|endoftext|>\n", "x <|endoftext|><|endoftext|>"]
)
def test_a_spelled_special_token_is_text_to_us_and_the_special_id_to_transformers(real, spelled):
    """The one place where our ids are not those of transformers, on purpose: a separator is never made by a text."""
    name, tokenizer, reference = real
    end = END_OF_TEXT[name]
    (theirs,) = reference_ids(reference, [spelled])
    assert theirs.count(end) == spelled.count("<|endoftext|>")
    (ours,) = tokenizer.encode([spelled])
    assert end not in ours
    assert "".join(tokenizer.token_strings(ours)) == spelled
    assert tokenizer.byte_lengths()[ours].sum() == len(spelled)


def test_gpt2_by_hand(shared, tmp_path):
    tokenizer = load_tokenizer(real_tokenizer(shared, tmp_path, "gpt2"))
    (ids,) = tokenizer.encode(["Hello world\n\n\nfoo"])
    assert list(ids) == [15496, 995, 628, 198, 21943]
    assert tokenizer.token_strings(ids) == ["Hello", " world", "\n\n", "\n", "foo"]
    # Without tokenizer.json the digest is that of the vocabulary files, merges first.
    files = [shared / "tokenizers" / "gpt2" / file for file in ("merges.txt", "vocab.json")]
    assert tokenizer.sha256 == hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
