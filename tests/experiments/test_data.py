"""How rows begin when a flag leaves it to the model's family."""

import pytest

from experiments import perplexity, train_sae
from experiments.data import resolve_bos
from sparse_jax.dictionaries import L1
from sparse_jax.errors import InputError
from tests.lm import tiny_tokenizers


@pytest.mark.parametrize(
    ("make", "bos"),
    [
        (tiny_tokenizers.gpt_neox, "none"),
        (tiny_tokenizers.gpt2, "none"),
        (tiny_tokenizers.qwen, "none"),
        (tiny_tokenizers.llama2, "row"),
        (tiny_tokenizers.llama3, "row"),
        (tiny_tokenizers.mistral, "row"),
    ],
)
def test_auto_is_the_rule_of_the_family_and_is_gone_afterwards(tmp_path, make, bos):
    folder = str(make(tmp_path / "model"))
    for flags in (perplexity.Flags(model=folder), train_sae.Flags(L1(), model=folder)):
        assert flags.bos == "auto"
        assert resolve_bos(flags).bos == bos
        assert resolve_bos(resolve_bos(flags)) == resolve_bos(flags)


def test_what_is_said_is_kept_without_a_look_at_the_model():
    for bos in ("none", "row"):
        assert resolve_bos(perplexity.Flags(model="./nowhere", bos=bos)).bos == bos


def test_a_llama_model_without_a_begin_of_text_token_is_refused(tmp_path):
    folder = tiny_tokenizers.llama2(tmp_path / "model", bos=False)
    with pytest.raises(InputError, match="its tokenizer has none"):
        resolve_bos(perplexity.Flags(model=str(folder)))
