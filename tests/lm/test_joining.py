"""How each family's texts are put together: the table against packed ids worked by hand and against transformers."""

import json

import numpy as np
import pytest
import transformers

from sparse_jax.errors import InputError
from sparse_jax.lm import families  # noqa: F401  registers the families
from sparse_jax.lm.family import FAMILIES
from sparse_jax.lm.joining import RULES, joining_of, row_bos
from sparse_jax.lm.packing import pack
from sparse_jax.lm.tokenizer import Tokenizer, load_tokenizer
from tests.lm import tiny_tokenizers
from tests.lm.letters import texts
from tests.lm.real_tokenizers import END_OF_TEXT, FAMILY, real_tokenizer

# Name -> (model_type, what makes a folder in its style).
KINDS = {
    "gpt_neox": ("gpt_neox", tiny_tokenizers.gpt_neox),
    "gpt2": ("gpt2", tiny_tokenizers.gpt2),
    "llama2": ("llama", tiny_tokenizers.llama2),
    "llama3": ("llama", tiny_tokenizers.llama3),
    "mistral": ("mistral", tiny_tokenizers.mistral),
    "qwen2": ("qwen2", tiny_tokenizers.qwen),
    "qwen3": ("qwen3", lambda folder: tiny_tokenizers.qwen(folder, "qwen3")),
}
# "ab" and "c ab", a separator before each, cut into rows that take two tokens of the stream.
NO_BOS = ([[257, 256], [257, 66]], [[256, 257], [66, 220]])
PACKED = {
    "gpt_neox": NO_BOS,
    "gpt2": NO_BOS,
    "llama2": ([[1, 2, 264], [1, 2, 259]], [[2, 264, 2], [2, 259, 262]]),
    "llama3": ([[257, 258, 256], [257, 258, 66]], [[258, 256, 258], [258, 66, 220]]),
    "mistral": ([[1, 2, 264], [1, 2, 259]], [[2, 264, 2], [2, 259, 262]]),
    "qwen2": NO_BOS,
    "qwen3": NO_BOS,
}


def rule_for(model_type: str, tokenizer: Tokenizer) -> str:
    return row_bos(model_type, bos_id=tokenizer.bos_id, adds_bos=tokenizer.adds_bos)


def added_by(reference, text: str) -> list[int]:
    """The ids that transformers' tokenizer puts before a text; none may stand after it."""
    with_added, plain = (reference(text, add_special_tokens=added)["input_ids"] for added in (True, False))
    count = len(with_added) - len(plain)
    assert with_added[count:] == plain
    return with_added[:count]


def test_every_family_that_is_read_has_a_rule_with_a_reason():
    assert set(FAMILIES) <= set(RULES)
    assert set(RULES) == {model_type for model_type, _ in KINDS.values()}
    for rule in RULES.values():
        assert rule.separators
        assert rule.why
        assert (rule.bos == "row") == (rule.tokenizer_adds == "begin-of-text")


@pytest.mark.parametrize("kind", KINDS)
def test_two_documents_packed_by_the_rule_have_these_ids(kind, tmp_path):
    model_type, make = KINDS[kind]
    tokenizer = load_tokenizer(make(tmp_path / kind))
    bos = rule_for(model_type, tokenizer)
    assert bos == joining_of(model_type).bos
    tokens, targets, mask, _ = pack(texts("ab", "c ab"), tokenizer, 3 if bos == "row" else 2, bos=bos)[:]
    assert (tokens.tolist(), targets.tolist()) == PACKED[kind]
    # Separators and begin-of-text tokens never count, here nor at position 0.
    expected = ~np.isin(tokens, [tokenizer.separator_id, -1 if tokenizer.bos_id is None else tokenizer.bos_id])
    expected[:, 0] = False
    assert (mask == expected).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_column_of_what_tokenizers_add_is_what_transformers_does(kind, tmp_path):
    model_type, make = KINDS[kind]
    folder = make(tmp_path / kind)
    ours, reference = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    adds = joining_of(model_type).tokenizer_adds == "begin-of-text"
    assert added_by(reference, "ab c") == ([ours.bos_id] if adds else [])
    assert ours.adds_bos == adds
    assert ours.encode(["ab c"])[0].tolist() == reference("ab c", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", ["gpt2", "neox"])
def test_the_real_tokenizers_add_nothing_and_are_joined_by_end_of_text(shared, tmp_path, name):
    folder = real_tokenizer(shared, tmp_path, name)
    tokenizer, reference = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert added_by(reference, "Hello world") == []
    assert rule_for(FAMILY[name], tokenizer) == "none"
    first, second = (tokenizer.encode([text])[0].tolist() for text in ("Hello world", "Good night"))
    stream = [END_OF_TEXT[name], *first, END_OF_TEXT[name], *second]
    rows = pack(texts("Hello world", "Good night"), tokenizer, len(stream) - 1)
    assert rows[0].tokens.tolist() == stream[:-1]
    assert rows[0].targets.tolist() == stream[1:]


def test_chat_models_are_joined_by_end_of_text_not_by_the_end_of_a_turn(tmp_path):
    llama = load_tokenizer(tiny_tokenizers.llama3(tmp_path / "llama", eos="<|eot_id|>"))
    qwen = load_tokenizer(tiny_tokenizers.qwen(tmp_path / "qwen", eos="<|im_end|>"))
    assert (llama.separator_id, qwen.separator_id) == (258, 257)


def test_an_ordinary_token_that_spells_a_separator_is_not_taken_for_it(tmp_path):
    # Another family's tokenizer under Llama's architecture: "</s>" is a word of text, the declared EOS is the end.
    folder = tiny_tokenizers.gpt2(tmp_path / "model")
    spelled = json.loads((folder / "tokenizer.json").read_text())
    spelled["model"]["vocab"]["</s>"], spelled["added_tokens"][0]["id"] = 257, 258
    (folder / "tokenizer.json").write_text(json.dumps(spelled))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = load_tokenizer(folder)
    assert tokenizer.token_strings([257, tokenizer.separator_id]) == ["</s>", "<|endoftext|>"]


def one_line(caught) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_llama_tokenizer_without_a_begin_of_text_token_is_refused(tmp_path):
    tokenizer = load_tokenizer(tiny_tokenizers.llama2(tmp_path / "model", bos=False))
    with pytest.raises(InputError, match="but its tokenizer has none: name it as bos_token") as caught:
        rule_for("llama", tokenizer)
    assert "--bos none" in one_line(caught)


def test_a_llama_model_with_a_tokenizer_that_never_uses_its_begin_of_text_token_is_refused(tmp_path):
    for tokenizer in (tiny_tokenizers.llama3(tmp_path / "a", bos=False), tiny_tokenizers.gpt2(tmp_path / "b")):
        with pytest.raises(InputError, match="does not put it before a text: give --bos row or --bos none") as caught:
            rule_for("llama", load_tokenizer(tokenizer))
        one_line(caught)


def test_a_begin_of_text_token_that_only_the_config_adds_counts(tmp_path):
    # transformers 4 went by it, and the models were run with that; transformers 5 goes by tokenizer.json alone.
    folder = tiny_tokenizers.llama3(tmp_path / "model", bos=False)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert rule_for("llama", load_tokenizer(folder)) == "row"


@pytest.mark.parametrize("model_type", ["mamba", None])
def test_a_family_without_a_rule_is_refused(model_type):
    with pytest.raises(InputError, match="known: gpt_neox, gpt2") as caught:
        joining_of(model_type)
    assert "give --bos none or --bos row" in one_line(caught)
