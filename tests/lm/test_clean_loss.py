"""The embedded model's loss on all of Austen is the one that its training wrote down."""

import json

import jax
import numpy as np
import pytest

from sparse_jax.lm import cross_entropy, forward, load
from sparse_jax.lm.documents import documents
from sparse_jax.lm.embedded import MODELS
from sparse_jax.lm.packing import pack
from sparse_jax.lm.tokenizer import load_tokenizer

# Of 8, 32 or 64 rows, with `lax.map` or without, and with any allocator setting: the same CPU time within 5 %.
BATCH = 32


@jax.jit
def loss_of_rows(lm, tokens, targets):
    """Nats of each row: a sum of 256 in float32; the sum over rows is the host's, in float64."""
    return cross_entropy(forward(lm, tokens).logits, targets).sum(1)


@pytest.mark.long
def test_clean_loss_on_austen():
    """float32, rows of 256 cut from the start of the stream as in training, every one of their predictions."""
    recorded = json.loads((MODELS["novel-neox"] / "training.json").read_text())["loss"]["austen"]
    rows, lm = pack(documents("austen"), load_tokenizer(MODELS["novel-neox"]), 256), load("novel-neox")
    nats, predictions = 0.0, 0
    for start in range(0, len(rows), BATCH):
        index = np.arange(start, start + BATCH)
        batch = rows[np.where(index < len(rows), index, -1)]  # empty rows fill the last batch
        nats += np.asarray(loss_of_rows(lm, batch.tokens, batch.targets), np.float64).sum()
        predictions += (batch.targets >= 0).sum()
    assert predictions == recorded["predictions"] == 1_051_904
    assert nats / predictions == pytest.approx(recorded["nats_per_token"], abs=2e-3)
    print(f"{nats / predictions:.5f} nats, recorded {recorded['nats_per_token']}")
