"""The loss of tiny models of every kind of joining, as transformers' PyTorch models give it on rows joined by hand."""

import json

import numpy as np
import pytest
import transformers

from experiments import perplexity
from experiments.perplexity import Flags
from tests.lm import tiny_tokenizers

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

CONTEXT, DOCUMENTS = 12, ["ab c ba", "c", "cab bac abba " * 8, "a b"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
KINDS = {
    "gpt2": (tiny_tokenizers.gpt2, {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}),
    "gpt_neox": (tiny_tokenizers.gpt_neox, {**SIZES, "max_position_embeddings": 32}),
    "llama": (tiny_tokenizers.llama2, {**SIZES, "max_position_embeddings": 32}),
    "mistral": (tiny_tokenizers.mistral, {**SIZES, "max_position_embeddings": 32, "num_key_value_heads": 2}),
    "qwen2": (tiny_tokenizers.qwen, {**SIZES, "max_position_embeddings": 32, "num_key_value_heads": 2}),
}


def write_model(folder, model_type: str):
    """A random model of transformers with a tiny tokenizer, as one folder, and that model."""
    make, sizes = KINDS[model_type]
    make(folder)
    size = len(transformers.AutoTokenizer.from_pretrained(folder))
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, vocab_size=size, initializer_range=0.3, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(folder)
    return model


def nats_by_torch(model, row: list[int], targets: list[int]) -> np.ndarray:
    """`-log p` of each target, the prediction from the position in its place."""
    with torch.no_grad():
        log_p = torch.log_softmax(model(torch.tensor([row])).logits[0].double(), -1)
    return -log_p[torch.arange(len(targets)), torch.tensor(targets)].numpy()


@pytest.mark.parametrize("model_type", KINDS)
def test_the_loss_is_that_of_transformers_on_rows_joined_by_hand(tmp_path, model_type):
    model = write_model(tmp_path / "model", model_type)
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(DOCUMENTS))
    flags = Flags(model=str(tmp_path / "model"), text=str(tmp_path / "text.txt"), context=CONTEXT, out=tmp_path / "run")
    assert perplexity.main(flags) == 0
    found = json.loads((flags.out / "metrics.json").read_text())

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    # What the tokenizer puts before a text by itself is what stands at the start of each row.
    first = tokenizer("")["input_ids"]
    end = tokenizer.convert_tokens_to_ids("</s>" if first else "<|endoftext|>")
    stream = [
        token for text in DOCUMENTS for token in (end, *tokenizer(text.strip(), add_special_tokens=False)["input_ids"])
    ]
    width = CONTEXT - len(first)
    nats = []
    for start in range(0, (len(stream) - 1) // width * width, width):
        row = stream[start : start + width]
        targets = row if first else stream[start + 1 : start + 1 + width]
        nats.append(nats_by_torch(model, first + row, targets))
    assert found["bos"] == ("row" if first else "none")
    assert found["tokens"] == np.size(nats)
    assert found["nats_per_token"] == pytest.approx(np.mean(nats), rel=1e-5)
