"""Bytes of text that each id stands for: by hand, and summed over the ids of a text."""

import unicodedata

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models

from sparse_jax.lm import embedded
from sparse_jax.lm.documents import documents
from sparse_jax.lm.tokenizer import load_tokenizer
from tests.lm import tiny_tokenizers
from tests.lm.real_tokenizers import HARD, real_tokenizer


@pytest.fixture(scope="module")
def neox():
    return load_tokenizer(embedded.MODELS["novel-neox"])


def test_byte_level_tokens_by_hand(tmp_path):
    tokenizer = load_tokenizer(tiny_tokenizers.gpt_neox(tmp_path / "model"))
    lengths = tokenizer.byte_lengths()
    assert (lengths.dtype, lengths.shape) == (np.int32, (tokenizer.vocab_size,))
    # The 256 bytes, "ab", end-of-text and padding, and an added run of two spaces that is ordinary text.
    assert lengths.tolist() == [1] * 256 + [2, 0, 0, 2]


def test_sentence_pieces_by_hand(tmp_path):
    lengths = load_tokenizer(tiny_tokenizers.llama2(tmp_path / "model")).byte_lengths()
    # <unk>, <s>, </s>, the bytes, then ▁ a b c ▁a ▁ab with a space for each ▁.
    assert lengths.tolist() == [0, 0, 0] + [1] * 256 + [1, 1, 1, 1, 2, 3]


def test_gaps_and_signs_beyond_ascii_by_hand(tmp_path):
    made = tokenizers.Tokenizer(models.WordLevel({"</s>": 0, "é▁日": 1, "<0x4G>": 3, "<0xE2>": 5}, unk_token="</s>"))
    made.decoder = decoders.ByteFallback()
    made.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).byte_lengths().tolist() == [0, 2 + 1 + 3, 0, 6, 0, 1]


def test_a_tokenizer_written_in_python_counts_no_special_token(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    lengths = load_tokenizer(tmp_path).byte_lengths()
    assert lengths[:3].tolist() == [0, 0, 0]
    assert (lengths[3 : 3 + 128] == 1).all()


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(st.text(max_size=60))
def test_the_sum_over_a_text_is_its_length(neox, text):
    (ids,) = neox.encode([text])
    assert neox.byte_lengths()[ids].sum() == len(text.encode())


def test_the_sum_over_a_novel_is_its_length_with_a_newline_for_each_line(neox):
    novel = next(documents("austen")).text
    (ids,) = neox.encode_documents([novel])
    assert neox.byte_lengths()[ids].sum() == len(novel.encode()) + 1


@pytest.mark.parametrize("name", ["gpt2", "neox"])
def test_the_sum_over_a_text_is_its_length_with_real_tokenizers(shared, tmp_path, name):
    tokenizer = load_tokenizer(real_tokenizer(shared, tmp_path, name))
    lengths = tokenizer.byte_lengths()
    for text in (*HARD, "\n".join(HARD)):
        (ids,) = tokenizer.encode([text])
        normalised = unicodedata.normalize("NFC", text) if name == "neox" else text
        assert lengths[ids].sum() == len(normalised.encode()), text
    assert lengths[tokenizer.separator_id] == 0
    if name == "neox":
        assert lengths[50254] == 24  # the longest of the added runs of spaces
