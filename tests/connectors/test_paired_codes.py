"""Codes of the same tokens at several sites: joined, split by documents, looked up; by hand."""

import numpy as np
import pytest

from sparse_jax.connectors.paired_codes import CodeStore, Pair, SiteCodes, Tokens, joined, raw_site
from sparse_jax.errors import InputError


def codes(name, n, rows):
    """Rows of {feature: value}, two slots each."""
    values, indices = np.zeros((len(rows), 2), np.float32), np.zeros((len(rows), 2), np.int32)
    for row, active in enumerate(rows):
        for slot, (feature, value) in enumerate(active.items()):
            values[row, slot], indices[row, slot] = value, feature
    return SiteCodes(name, n, values, indices)


def tokens(documents):
    count = np.arange(len(documents))
    return Tokens(count.astype(np.int32), np.array(documents, np.int32), count // 2, (count % 2).astype(np.int32))


FIRST = codes("resid_pre.0", 3, [{0: 1.0}, {2: 2.0, 0: 3.0}, {}])
SECOND = codes("attn_out.0", 2, [{1: 4.0}, {}, {0: 5.0, 1: 6.0}])


def test_dense_codes_have_an_empty_slots_feature_at_zero():
    np.testing.assert_array_equal(FIRST.dense(slice(None)), [[1, 0, 0], [3, 0, 2], [0, 0, 0]])


def test_an_empty_slot_may_point_at_an_active_feature():
    doubled = SiteCodes("a.0", 2, np.array([[7.0, 0.0]], np.float32), np.array([[1, 1]]))
    np.testing.assert_array_equal(doubled.dense(slice(None)), [[0, 7]])


def test_sites_stand_side_by_side():
    both = joined([FIRST, SECOND])
    assert (both.name, both.n_features, both.slots) == ("resid_pre.0+attn_out.0", 5, 4)
    np.testing.assert_array_equal(both.dense(slice(None)), [[1, 0, 0, 0, 4], [3, 0, 2, 0, 0], [0, 0, 0, 5, 6]])


def test_a_raw_site_uses_every_slot():
    x = np.array([[0.5, -1.0], [2.0, 0.0]], np.float32)
    np.testing.assert_array_equal(raw_site("mlp_out.0", x).dense([1, 0]), x[::-1])


def test_a_store_gives_pairs_and_says_what_it_lacks():
    store = CodeStore({site.name: site for site in (FIRST, SECOND)}, tokens([0, 0, 1]))
    pair = store.pair(["resid_pre.0"], "attn_out.0")
    assert pair.inputs is FIRST
    assert pair.targets is SECOND
    assert len(pair) == 3
    with pytest.raises(InputError, match=r"no codes of mlp_out.0; there are those of resid_pre.0, attn_out.0"):
        store.pair(["resid_pre.0"], "mlp_out.0")


def test_splitting_keeps_documents_whole_and_tokens_together():
    documents = np.repeat(np.arange(20), 5)
    values = np.arange(1, 101, dtype=np.float32)[:, None]
    side = SiteCodes("a.0", 1, values, np.zeros((100, 1), np.int32))
    pair = Pair(side, side, tokens(documents))
    train, held_out = pair.split(0.2, seed=3)
    assert len(held_out) == 20
    assert len(train) == 80
    assert not set(train.tokens.document) & set(held_out.tokens.document)
    for part in (train, held_out):
        np.testing.assert_array_equal(part.inputs.values[:, 0], part.tokens.token + 1)
    again, _ = pair.split(0.2, seed=4)
    assert set(again.tokens.document) != set(train.tokens.document)


def test_a_large_share_leaves_a_document_to_train_on():
    train, held_out = Pair(FIRST, SECOND, tokens([0, 0, 1])).split(0.99)
    assert len(train)
    assert len(held_out)


@pytest.mark.parametrize(("share", "documents"), [(0.0, [0, 0, 1]), (1.0, [0, 0, 1]), (0.5, [4, 4, 4])])
def test_what_cannot_be_split_is_refused(share, documents):
    with pytest.raises(InputError, match="held-out share"):
        Pair(FIRST, SECOND, tokens(documents)).split(share)


def test_what_does_not_belong_together_is_refused():
    with pytest.raises(InputError, match="3 input codes, 3 target codes, 2 tokens"):
        Pair(FIRST, SECOND, tokens([0, 0]))
    with pytest.raises(InputError, match="two equal shapes"):
        SiteCodes("a.0", 2, np.zeros((2, 3), np.float32), np.zeros((2, 2), np.int32))


def test_codes_of_some_features_alone():
    rng = np.random.default_rng(0)
    values, indices = rng.random((20, 3)).astype(np.float32), np.argsort(rng.random((20, 7)), axis=1)[:, :3]
    site = SiteCodes("mlp_out.0", 7, values, indices.astype(np.uint16))
    kept = np.array([1, 4, 6])
    found = site.of_features(kept)
    np.testing.assert_array_equal(found.dense(slice(None)), site.dense(slice(None))[:, kept])
