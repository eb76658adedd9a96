"""Ids of texts and strings of ids, on tokenizers made here by hand, on the embedded one, and on real ones."""

import hashlib
import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from sparse_jax.errors import InputError
from sparse_jax.lm import embedded
from sparse_jax.lm.tokenizer import load_tokenizer

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level(merges=(), special=("<|endoftext|>", "<|padding|>")):
    """A byte-level BPE: the special tokens, the 256 bytes in the order of their signs, one token for each merge."""
    pieces = [*special, *BYTES, *("".join(pair) for pair in merges)]
    vocabulary = {token: i for i, token in enumerate(pieces)}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(special))
    return made


def save(folder, made, **configs):
    """A model's folder with this tokenizer.json and, for each keyword, a JSON file of that name."""
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    for name, content in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


EOS = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "pad_token": "<|padding|>"}


@pytest.fixture
def small(tmp_path):
    """Merges "th" (id 258) and "the" (id 259); 2 + the place of its sign is the id of a byte."""
    return load_tokenizer(save(tmp_path / "small", byte_level([("t", "h"), ("th", "e")]), tokenizer_config=EOS))


@pytest.fixture(scope="module")
def neox():
    return load_tokenizer(embedded.MODELS["novel-neox"])


def test_ids_by_hand(small):
    a, h = 2 + BYTES.index("a"), 2 + BYTES.index("h")
    ids = small.encode(["the tha", "", "h"])
    assert [list(i) for i in ids] == [[259, 2 + BYTES.index("Ġ"), 258, a], [], [h]]
    assert all(i.dtype == np.int32 and i.ndim == 1 for i in ids)
    assert small.encode([]) == []


def test_fields_by_hand(small, tmp_path):
    assert (small.separator_id, small.bos_id, small.pad_id, small.vocab_size) == (0, 0, 1, 260)
    assert not small.by_line
    assert small.sha256 == hashlib.sha256((tmp_path / "small" / "tokenizer.json").read_bytes()).hexdigest()


def test_spelled_special_tokens_stay_ordinary_text(small, neox):
    for tokenizer in (small, neox):
        (ids,) = tokenizer.encode(["a<|endoftext|>b <|padding|>"])
        assert not set(ids) & {0, 1}
        assert "".join(tokenizer.token_strings(ids)) == "a<|endoftext|>b <|padding|>"


def test_nothing_is_added_cut_or_padded(tmp_path):
    made = byte_level()
    made.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    made.enable_truncation(3)
    made.enable_padding(length=5, pad_id=1)
    tokenizer = load_tokenizer(save(tmp_path / "model", made))
    assert [len(ids) for ids in tokenizer.encode(["abcdefgh", "a"])] == [8, 1]


def test_documents_by_line_end_each_line_with_its_newline(tmp_path):
    # A newline after a space is one token only where the two are encoded without what follows.
    made = byte_level([("Ġ", "Ċ")])
    text = "a \nb\n\nc"
    a, b, c, newline = (2 + BYTES.index(sign) for sign in "abcĊ")
    whole = load_tokenizer(save(tmp_path / "whole", made, tokenizer_config=EOS))
    lines = load_tokenizer(save(tmp_path / "lines", made, tokenizer_config=EOS | {"sparse_jax_lines": True}))
    assert list(whole.encode_documents([text])[0]) == [a, 2 + BYTES.index("Ġ"), newline, b, newline, newline, c]
    first, second = lines.encode_documents([text, "c"])
    assert list(first) == [a, 258, b, newline, newline, c, newline]
    assert list(second) == [c, newline]
    assert list(lines.encode([text])[0]) == list(whole.encode([text])[0])


def test_embedded_tokenizer_is_by_line_with_its_own_ids(neox):
    assert neox.by_line
    assert (neox.separator_id, neox.bos_id, neox.pad_id, neox.vocab_size) == (0, 0, 1, 4096)
    raw = tokenizers.Tokenizer.from_file(str(embedded.MODELS["novel-neox"] / "tokenizer.json"))
    lines = ["It is a truth  ", "", "", "universally acknowledged"]
    expected = [i for line in lines for i in raw.encode(line + "\n").ids]
    assert list(neox.encode_documents(["\n".join(lines)])[0]) == expected


# Strings for display


def test_token_strings_keep_spaces_and_show_partial_bytes(small):
    text = "the é\n"
    (ids,) = small.encode([text])
    assert small.token_strings(ids) == ["the", " ", "\\xc3", "\\xa9", "\n"]
    assert small.token_strings([0, 1, -1, 260, 10**12]) == [
        "<|endoftext|>",
        "<|padding|>",
        "[-1]",
        "[260]",
        f"[{10**12}]",
    ]
    assert small.token_strings(np.array([259, 259])) == ["the", "the"]


def test_token_strings_of_sentence_pieces(tmp_path):
    made = tokenizers.Tokenizer(
        models.WordLevel({"<s>": 0, "▁the": 1, "<0xE2>": 2, "<0x41>": 3, "er": 5}, unk_token="<s>")
    )
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = load_tokenizer(save(tmp_path / "pieces", made))
    assert tokenizer.vocab_size == 6
    assert tokenizer.token_strings(range(6)) == ["<s>", " the", "\\xe2", "A", "[4]", "er"]


def test_every_token_of_the_embedded_model_has_a_string(neox):
    strings = neox.token_strings(range(4096))
    assert all(isinstance(text, str) and text for text in strings)
    assert strings[0] == "<|endoftext|>"
    assert strings[neox.encode([" the"])[0][0]] == " the"


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(st.text(alphabet=st.characters(codec="ascii"), max_size=60))
def test_strings_of_ascii_text_join_to_the_text(neox, text):
    (ids,) = neox.encode([text])
    assert "".join(neox.token_strings(ids)) == text


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(st.lists(st.text(max_size=30), max_size=4))
def test_any_text_has_ids_without_special_ones(neox, texts):
    for ids in neox.encode_documents(texts):
        assert ids.dtype == np.int32
        assert ((ids > 1) & (ids < 4096)).all()
        neox.token_strings(ids)


# Special ids


@pytest.mark.parametrize(
    ("configs", "expected"),
    [
        ({"tokenizer_config": EOS}, (0, 0, 1)),
        ({"tokenizer_config": {"eos_token": {"content": "<|padding|>"}, "bos_token": None}}, (1, None, None)),
        ({"config": {"eos_token_id": 1, "bos_token_id": 0, "pad_token_id": None}}, (1, 0, None)),
        ({"config": {"eos_token_id": [1, 0]}}, (1, None, None)),
        ({"tokenizer_config": {"eos_token": "<|padding|>"}, "config": {"eos_token_id": 0}}, (1, None, None)),
        ({"tokenizer_config": {"eos_token": "<absent>"}, "config": {"eos_token_id": 1}}, (1, None, None)),
        ({"config": {"eos_token_id": 50256}, "special_tokens_map": {"eos_token": "<|padding|>"}}, (1, None, None)),
        ({}, (0, None, None)),
    ],
)
def test_special_ids_come_from_the_first_file_that_names_them(tmp_path, configs, expected):
    tokenizer = load_tokenizer(save(tmp_path / "model", byte_level(), **configs))
    assert (tokenizer.separator_id, tokenizer.bos_id, tokenizer.pad_id) == expected


def test_separator_is_the_begin_of_text_token_or_none(tmp_path):
    bos = load_tokenizer(save(tmp_path / "a", byte_level(special=("<s>",)), tokenizer_config={"bos_token": "<s>"}))
    assert (bos.separator_id, bos.bos_id, bos.pad_id) == (0, 0, None)
    none = load_tokenizer(save(tmp_path / "b", byte_level(special=("<s>",))))
    assert none.separator_id is None


# Without tokenizer.json


def test_a_tokenizer_written_in_python(tmp_path):
    folder = tmp_path / "byt5"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "t5"}')
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    tokenizer = load_tokenizer(folder)
    # ByT5: the id of a byte is 3 + the byte.
    assert [list(ids) for ids in tokenizer.encode(["a</s>", ""])] == [[3 + byte for byte in b"a</s>"], []]
    assert (tokenizer.separator_id, tokenizer.bos_id, tokenizer.pad_id) == (1, None, 0)
    assert tokenizer.token_strings([1, 3 + ord("a"), 10**6]) == ["</s>", "a", "[1000000]"]
    assert len(tokenizer.sha256) == 64


def refused(folder):
    with pytest.raises(InputError) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_and_broken_tokenizers_are_refused(tmp_path):
    assert "no folder" in refused(tmp_path / "none")
    assert "no tokenizer in" in refused(tmp_path)
    # Made without its files, transformers' GPT-2 tokenizer knows one token.
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert "empty one" in refused(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "is not a tokenizer" in refused(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read as JSON" in refused(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "not an object" in refused(tmp_path)
