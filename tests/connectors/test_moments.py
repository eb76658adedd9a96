"""Moments of codes against plain NumPy on dense rows."""

import dataclasses

import numpy as np
import pytest

from sparse_jax.connectors import moments as module
from sparse_jax.connectors.moments import Moments, moments
from sparse_jax.errors import InputError
from tests.connectors.random_pairs import dense_sides, random_pair

FIELDS = [field.name for field in dataclasses.fields(Moments)]


def by_numpy(pair, rows):
    """The sums over some tokens."""
    x, y = (side[rows] for side in dense_sides(pair))
    return {
        "count": len(x), "gram": x.T @ x, "cross": x.T @ y, "input_sum": x.sum(0), "target_sum": y.sum(0),
        "target_square": (y**2).sum(0), "input_fired": (x != 0).sum(0), "target_fired": (y != 0).sum(0),
    }  # fmt: skip


@pytest.mark.parametrize(("method", "rtol"), [("sparse", 1e-12), ("dense", 3e-6)])
def test_each_block(method, rtol, monkeypatch):
    monkeypatch.setattr(module, "SPARSE_TOKENS", 37)
    monkeypatch.setattr(module, "DENSE_TOKENS", 64)
    pair = random_pair()
    block = np.random.default_rng(1).integers(4, size=len(pair))
    made = moments(pair, block_of=block, dtype=np.float64, method=method)
    assert made.blocks == 4
    for number in range(4):
        for name, due in by_numpy(pair, block == number).items():
            np.testing.assert_allclose(getattr(made, name)[number], due, rtol=rtol, atol=1e-5 * (rtol > 1e-9))


def test_empty_slots_may_point_anywhere():
    pair = random_pair()
    indices = np.where(pair.inputs.values == 0, pair.inputs.indices[:, :1], pair.inputs.indices)
    assert np.any(indices != pair.inputs.indices)
    moved = dataclasses.replace(pair, inputs=dataclasses.replace(pair.inputs, indices=indices))
    for method in ("sparse", "dense"):
        for name in FIELDS:
            one, two = (getattr(moments(each, method=method), name) for each in (pair, moved))
            np.testing.assert_allclose(one, two, rtol=1e-6)


def test_a_bootstrap_is_a_weighted_sum():
    pair = random_pair()
    block = np.arange(len(pair)) % 3
    made = moments(pair, block_of=block, dtype=np.float64, method="sparse")
    rows = np.concatenate([np.flatnonzero(block == 0), *[np.flatnonzero(block == 2)] * 3])
    drawn = made.total(np.array([1, 0, 3]))
    assert drawn.blocks == 1
    for name, due in by_numpy(pair, rows).items():
        np.testing.assert_allclose(getattr(drawn, name)[0], due, rtol=1e-12)
    for name, due in by_numpy(pair, slice(None)).items():
        np.testing.assert_allclose(getattr(made.total(), name)[0], due, rtol=1e-12)


def test_blocks_are_of_documents_and_kept_in_float32():
    pair = random_pair()
    made = moments(pair, blocks=5)
    assert made.blocks == 5
    assert made.gram.dtype == made.cross.dtype == np.float32
    assert made.count.sum() == len(pair)
    np.testing.assert_allclose(made.total().gram[0], by_numpy(pair, slice(None))["gram"], rtol=1e-6)


def test_merge(tmp_path):
    pair = random_pair()
    parts = [moments(pair.at(rows), blocks=3) for rows in (slice(0, 100), slice(100, 300))]
    merged = parts[0].merge(parts[1])
    assert merged.blocks == 6
    for name, due in by_numpy(pair, slice(None)).items():
        np.testing.assert_allclose(getattr(merged.total(), name)[0], due, rtol=1e-6)
    with pytest.raises(InputError, match="do not merge"):
        merged.merge(moments(random_pair(n1=11)))
    merged.save(tmp_path / "moments.npz")
    read = Moments.load(tmp_path / "moments.npz")
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(read, name), getattr(merged, name))
        assert getattr(read, name).dtype == getattr(merged, name).dtype
    assert [path.name for path in tmp_path.iterdir()] == ["moments.npz"]


def test_sparse_products_where_few_are_active():
    pair = random_pair(n1=2048, n2=2048, slots=30, tokens=2)
    assert module._faster(pair) == "sparse"
    assert module._faster(random_pair()) == "dense"


def test_what_cannot_be(tmp_path):
    pair = random_pair()
    with pytest.raises(InputError, match="'sparse' or 'dense'"):
        moments(pair, method="both")
    with pytest.raises(InputError, match="for each of 300 tokens"):
        moments(pair, block_of=np.zeros(3, int))
    with pytest.raises(InputError, match="none below 0"):
        moments(pair, blocks=2).total([1, -1])
    with pytest.raises(InputError, match="is not there"):
        Moments.load(tmp_path / "none.npz")
    (tmp_path / "bad.npz").write_bytes(b"no")
    with pytest.raises(InputError, match="cannot be read"):
        Moments.load(tmp_path / "bad.npz")
