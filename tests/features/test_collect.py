"""One pass over a text collects everything: against a plain NumPy pass, in parts, in several batch shapes, saved."""

import dataclasses
import importlib
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sparse_jax.activations.normalise import Normaliser
from sparse_jax.dictionaries import L1, Neurons, Normalised
from sparse_jax.errors import InputError
from sparse_jax.features import places as kept_places
from sparse_jax.features.collect import Collected, activation_edges, collect, delimiter_tokens, memory
from sparse_jax.features.firings import _codes, firings, rows_at_once
from sparse_jax.features.places import priorities, token_priorities
from sparse_jax.lm import Site, forward, random_model
from sparse_jax.lm.families.gpt_neox import GPTNeoXConfig
from sparse_jax.lm.rows import Rows

module = importlib.import_module("sparse_jax.features.collect")  # the package's name is the function's

CONTEXT, VOCAB, D, SITE = 30, 20, 8, Site("mlp_out", 1)
ARRAYS = ("fired", "sums", "maximum", "first", "first_delimiters", "delimiters", "rows")


@pytest.fixture(scope="module")
def text():
    """40 rows of random tokens; documents of 100 tokens behind a separator, 0."""
    stream = np.random.default_rng(0).integers(1, VOCAB, 40 * CONTEXT + 1)
    starts = np.arange(0, 40 * CONTEXT, 100)
    stream[starts] = 0
    names = tuple(f"document {i}" for i in range(len(starts)))
    return Rows(stream.astype(np.uint16), starts, names, CONTEXT, 1, (0, 13), None, 0, 0)


@pytest.fixture(scope="module")
def lm():
    return random_model(GPTNeoXConfig(2, D, 16, 2, VOCAB, 32, initializer_range=0.3), jax.random.key(0))


@pytest.fixture(scope="module", params=["l1", "neurons"])
def coder(request):
    """Codes of one sign and of both; feature 3 of the dictionary never fires, feature 4 always does."""
    normaliser = Normaliser(jnp.full(D, 0.01, jnp.float32), jnp.array(0.1, jnp.float32))
    if request.param == "neurons":
        neurons = Neurons(n_features=D, d_in=D, d_out=D, k=3)
        return Normalised(neurons, neurons.fit(jnp.zeros(D, jnp.float32)), normaliser)
    dictionary = L1(n_features=12, d_in=D, d_out=D, compute_dtype="float32")
    params = dictionary.init(jax.random.key(1))
    params |= {"b_enc": params["b_enc"].at[3].set(-1e3).at[4].set(1e2)}
    return Normalised(dictionary, params, normaliser)


@pytest.fixture(scope="module")
def delimiter():
    return np.isin(np.arange(VOCAB), [2, 3, 17])


@pytest.fixture(scope="module")
def median_norm(lm, text):
    x = forward(lm, text[:].tokens, capture=[SITE]).captured[str(SITE)]
    return float(np.median(np.linalg.norm(x, axis=-1)))


def dense(lm, text, numbers, coder, **options):
    """(codes `[rows, position, n]` with 0 where nothing fires, what counts), from the firings."""
    codes = np.zeros((len(numbers), CONTEXT, coder.dictionary.n_features), np.float32)
    counted = np.zeros((len(numbers), CONTEXT), bool)
    where = {int(number): i for i, number in enumerate(numbers)}
    for found in firings(lm, SITE, text, numbers, coder, **options):
        own = np.array([where.get(int(row), -1) for row in found.rows])
        rows, positions = np.divmod(found.places, CONTEXT)
        assert (own[rows] >= 0).all()
        assert not codes[own[rows], positions, found.features].any()
        codes[own[rows], positions, found.features] = found.values
        counted[own[own >= 0]] = found.counted[own >= 0]
    return codes, counted


# Firings


@pytest.mark.parametrize(("rows", "batch_rows", "slots"), [(10, 8, None), (5, 16, None), (40, None, None), (11, 8, 12),
                                                         (11, 3, 2), (3, 1, 1)])  # fmt: skip
@pytest.mark.parametrize("outliers", [False, True])
def test_firings_are_the_positive_codes_that_count(lm, text, coder, rows, batch_rows, slots, outliers, median_norm):
    limit = median_norm if outliers else np.inf
    numbers = np.random.default_rng(3).permutation(40)[:rows]
    codes, counted = dense(lm, text, numbers, coder, max_norm=limit, batch_rows=batch_rows, slots=slots)
    tokens, _, mask, _ = text[numbers]
    x = np.asarray(forward(lm, tokens, capture=[SITE]).captured[str(SITE)]).reshape(-1, D)
    expected = np.maximum(np.asarray(coder.encode(jnp.array(x))), 0).reshape(codes.shape)
    near = np.isclose(np.linalg.norm(x, axis=1), limit, rtol=1e-4).reshape(mask.shape)  # rounding may decide
    mask = mask & (np.linalg.norm(x, axis=1) <= limit).reshape(mask.shape)
    np.testing.assert_array_equal(counted[~near], mask[~near])
    assert (mask.mean() < 0.6) == outliers
    np.testing.assert_allclose(codes[~near], np.where(mask[..., None], expected, 0)[~near], atol=1e-3)


def test_one_executable_for_all_batches(lm, text, coder):
    before = _codes._cache_size()
    for rows in (3, 8, 21):
        list(firings(lm, SITE, text, np.arange(rows), coder, batch_rows=8))
    assert _codes._cache_size() <= before + 1


def test_rows_at_once():
    assert rows_at_once(None, 256, 2048) == 32
    assert rows_at_once(None, 256, 16384) == 8
    assert rows_at_once(None, 4096, 1 << 20) == 1
    assert rows_at_once(3, 256, 2048) == 3


# Everything, against plain NumPy


def plain(codes, counted, tokens, numbers, delimiter, edges):
    """What one pass is to find, feature by feature; places as (value, row, position)."""
    n, bins = codes.shape[-1], edges.shape[1] + 1
    first, first_delimiter = np.zeros_like(counted), np.zeros_like(counted)
    for i, row in enumerate(counted):
        places = np.flatnonzero(row)
        if len(places):
            first[i, places[0]] = True
        places = [p for p in places[1:] if delimiter[tokens[i, p]]]
        if places:
            first_delimiter[i, places[0]] = True
    made = []
    for f in range(n):
        c = codes[..., f].astype(np.float64)
        fires = c > 0
        assert not (fires & ~counted).any()
        kept = c[counted]
        variance = kept.var()
        places = [(float(c[i, p]), int(numbers[i]), int(p)) for i, p in np.argwhere(fires)]
        best = {}
        for place in sorted(places, key=lambda place: (-place[0], place[1], place[2])):
            best.setdefault(place[1], place)
        pairs = {}
        for t in np.unique(tokens[fires]):
            there = c[fires & (tokens == t)]
            which = [sum(v > float(edge) for edge in edges[f]) for v in there]
            pairs[int(t)] = (len(there), there.sum(), np.bincount(which, minlength=bins).tolist())
        made.append(
            {
                "fired": fires.sum(),
                "sums": [(kept**k).sum() for k in (1, 2, 3, 4)],
                "maximum": c.max(),
                "first": (fires & first).sum(),
                "first_delimiters": (fires & first_delimiter).sum(),
                "delimiters": (fires & delimiter[tokens]).sum(),
                "density": fires.sum() / counted.sum(),
                "mean": c[fires].mean() if fires.any() else 0,
                "variance": variance,
                "skew": ((kept - kept.mean()) ** 3).mean() / variance**1.5 if variance else 0,
                "kurtosis": ((kept - kept.mean()) ** 4).mean() / variance**2 if variance else 0,
                "top": sorted(best.values(), key=lambda place: (-place[0], place[1])),
                "places": places,
                "pairs": pairs,
            }
        )
    return made


def slots_of(places, f):
    return [(float(v), int(r), int(p)) for v, r, p in zip(*(each[f] for each in places)) if r >= 0]


@pytest.mark.parametrize(("rows", "batch_rows", "slots"), [(40, 8, None), (21, 16, None), (5, 8, None), (13, 3, 4)])
@pytest.mark.parametrize("outliers", [False, True])
def test_all_fields_against_plain_counting(
    lm, text, coder, delimiter, rows, batch_rows, slots, outliers, median_norm, monkeypatch
):
    monkeypatch.setattr(module, "EDGE_ROWS", 8)
    monkeypatch.setattr(kept_places, "_ASIDE", 50)  # so that places are sorted in several times
    numbers = np.random.default_rng(4).permutation(40)[:rows]
    options = {"max_norm": median_norm if outliers else np.inf, "batch_rows": batch_rows, "slots": slots}
    told = []
    found = collect(lm, SITE, text, numbers, coder, delimiters=delimiter, top=6, sample=50, bins=4, seed=2,
                    coactive_tokens=100, progress=told.append, **options)  # fmt: skip
    codes, counted = dense(lm, text, numbers, coder, **options)
    tokens = text[numbers].tokens
    edges = activation_edges(lm, SITE, text, numbers, coder, 4, **options)
    expected = plain(codes, counted, tokens, numbers, delimiter, edges)
    assert found.tokens == counted.sum()
    assert sum(told) == rows * CONTEXT
    assert found.seed == 2
    np.testing.assert_array_equal(found.rows, np.sort(numbers))
    for name in ("fired", "maximum", "first", "first_delimiters", "delimiters"):
        np.testing.assert_array_equal(getattr(found, name), [each[name] for each in expected], name)
    np.testing.assert_allclose(found.sums.T, [each["sums"] for each in expected], rtol=1e-10)
    for name in ("density", "mean", "variance"):
        np.testing.assert_allclose(getattr(found, name), [each[name] for each in expected], rtol=1e-9, err_msg=name)
    for name in ("skew", "kurtosis"):
        np.testing.assert_allclose(getattr(found, name), [each[name] for each in expected], rtol=1e-4, err_msg=name)
    for f, each in enumerate(expected):
        assert slots_of(found.top, f) == each["top"][:6]
        _, rows_there, positions = np.array(each["places"] or np.zeros((0, 3))).T.astype(int)
        chance = priorities(token_priorities(2, rows_there, positions), np.full(len(positions), f))
        by_chance = [each["places"][i] for i in np.argsort(chance)]
        assert slots_of(found.sample, f) == by_chance[:50]
        one = found.token_counts.of(f)
        assert one.tokens.tolist() == list(each["pairs"])
        assert one.counts.tolist() == [count for count, _, _ in each["pairs"].values()]
        np.testing.assert_allclose(one.sums, [total for _, total, _ in each["pairs"].values()])
        assert one.bins.tolist() == [bins for _, _, bins in each["pairs"].values()]
    np.testing.assert_array_equal(found.token_counts.occurrences, np.bincount(tokens[counted], minlength=VOCAB))
    order = np.argsort(token_priorities(2, *(each.reshape(-1) for each in np.broadcast_arrays(
        numbers[:, None], np.arange(CONTEXT))))[counted.reshape(-1)])[:100]  # fmt: skip
    fires = (codes > 0)[counted][order]
    np.testing.assert_array_equal(found.coactive.matrix().todense(), fires)
    np.testing.assert_array_equal(found.coactive.rows, np.broadcast_to(numbers[:, None], counted.shape)[counted][order])


def test_the_edges_are_equal_parts_of_the_first_rows_range(lm, text, coder, monkeypatch):
    monkeypatch.setattr(module, "EDGE_ROWS", 5)
    numbers = np.arange(40)[::-1]
    codes, _ = dense(lm, text, numbers[:5], coder)
    maximum = codes.max(axis=(0, 1))
    edges = activation_edges(lm, SITE, text, numbers, coder, 4)
    where = maximum > 0
    np.testing.assert_allclose(edges[where], maximum[where, None] * np.array([0.25, 0.5, 0.75]), rtol=1e-6)
    usual = np.median(maximum[where]) * np.array([0.25, 0.5, 0.75])
    np.testing.assert_allclose(edges[~where], np.broadcast_to(usual, edges[~where].shape), rtol=1e-6)
    assert activation_edges(lm, SITE, text, numbers, coder, 1).shape == (coder.dictionary.n_features, 0)


# Parts


def assert_same(a, b, rtol=1e-12):
    for name in ("tokens", "seed", *ARRAYS):
        check = np.testing.assert_array_equal
        if name == "sums":
            np.testing.assert_allclose(a.sums, b.sums, rtol=rtol)
        else:
            check(getattr(a, name), getattr(b, name), name)
    for part in ("top", "sample"):
        for x, y in zip(getattr(a, part), getattr(b, part)):
            np.testing.assert_array_equal(x, y, part)
    for part in ("token_counts", "coactive"):
        for field in dataclasses.fields(getattr(a, part)):
            x, y = (getattr(getattr(each, part), field.name) for each in (a, b))
            np.testing.assert_allclose(x, y, rtol=rtol if field.name == "sums" else 0, err_msg=field.name)


def test_merged_halves_are_the_whole(lm, text, coder, delimiter):
    """Rows stand where they stood in their batches, so that codes are equal bit for bit."""
    numbers = np.random.default_rng(5).permutation(40)
    edges = activation_edges(lm, SITE, text, numbers, coder, batch_rows=8)
    options = {"edges": edges, "delimiters": delimiter, "batch_rows": 8, "top": 5, "sample": 40, "coactive_tokens": 70}
    parts = [collect(lm, SITE, text, part, coder, **options) for part in (numbers[:16], numbers[16:])]
    whole = collect(lm, SITE, text, numbers, coder, **options)
    assert_same(parts[0].merge(parts[1]), whole)
    assert_same(parts[1].merge(parts[0]), whole)
    three = [collect(lm, SITE, text, part, coder, **options) for part in (numbers[:8], numbers[8:24], numbers[24:])]
    assert_same(three[2].merge(three[0].merge(three[1])), whole)


def test_parts_that_do_not_merge(lm, text, coder):
    options = {"edges": activation_edges(lm, SITE, text, np.arange(40), coder), "batch_rows": 8}
    a = collect(lm, SITE, text, np.arange(8), coder, **options)
    with pytest.raises(InputError, match="both parts hold row 7 of the text"):
        a.merge(collect(lm, SITE, text, np.arange(7, 15), coder, **options))
    rows = np.arange(8, 16)
    for other in ({"seed": 1}, {"top": 3}, {"sample": 3}, {"coactive_tokens": 3}):
        with pytest.raises(InputError, match="do not merge"):
            a.merge(collect(lm, SITE, text, rows, coder, **{**options, **other}))
    with pytest.raises(InputError, match="edges"):
        a.merge(collect(lm, SITE, text, rows, coder, batch_rows=8, bins=3))


# Samples


def test_quantile_samples(lm, text, coder):
    """Of a stretch of the range that holds a tenth of the firings, the places drawn are any of them."""
    numbers = np.arange(40)
    found = collect(lm, SITE, text, numbers, coder, sample=60, batch_rows=8)
    places = found.quantile_samples(5, 3)
    assert places.values.shape == (found.n_features, 5, 3)
    codes, _ = dense(lm, text, numbers, coder, batch_rows=8)
    for f in range(found.n_features):
        there = places.rows[f] >= 0
        got = codes[places.rows[f][there], places.positions[f][there], f]
        np.testing.assert_array_equal(places.values[f][there], got)
        if found.fired[f] >= 60:
            assert there.all()
            assert (places.values[f][:-1].max(axis=1) <= places.values[f][1:].min(axis=1)).all()
    assert places.values.min(initial=1, where=places.rows >= 0) > 0


def test_samples_are_uniform_over_the_firings(lm, text, coder):
    """Ranks of the sampled activations among all firings are uniform, over features and seeds."""
    numbers = np.arange(40)
    codes, _ = dense(lm, text, numbers, coder, batch_rows=8)
    ranks = []
    for seed in range(6):
        found = collect(lm, SITE, text, numbers, coder, sample=30, batch_rows=8, seed=seed)
        for f in np.flatnonzero(found.fired > 300):
            values = np.sort(codes[..., f][codes[..., f] > 0])
            ranks += ((np.searchsorted(values, found.sample.values[f]) + 0.5) / len(values)).tolist()
    assert len(ranks) >= 6 * 30 * 2
    assert stats.kstest(ranks, "uniform").pvalue > 1e-3


# Outliers


def test_outlier_features(text):
    n, rows = 5, 20
    found = Collected(
        tokens=400,
        fired=np.array([20, 20, 400, 9, 0]),
        sums=np.zeros((4, n)),
        maximum=np.zeros(n, np.float32),
        first=np.array([11, 0, 20, 9, 0]),
        first_delimiters=np.array([0, 10, 20, 0, 0]),
        delimiters=np.array([0, 20, 60, 0, 0]),
        **dict.fromkeys(("top", "sample", "token_counts", "coactive")),
        rows=np.arange(rows),
        seed=0,
    )
    assert found.outlier.tolist() == [True, False, False, False, False]
    np.testing.assert_allclose(found.density, [0.05, 0.05, 1, 9 / 400, 0])


def test_delimiters():
    strings = [".", "\n", " ,", "a.", "", "  ", "]", "…", "«", "$", "1", "[5021]", ' "', "<|endoftext|>", "\\xe2"]
    assert [s for s, is_one in zip(strings, delimiter_tokens(strings)) if is_one] == [
        ".", "\n", " ,", "  ", "]", "…", "«", ' "']  # fmt: skip
    assert delimiter_tokens(strings).dtype == bool


# Saved


def test_saved_and_read(lm, text, coder, delimiter, tmp_path):
    found = collect(lm, SITE, text, np.arange(12), coder, delimiters=delimiter, batch_rows=8)
    found.save(tmp_path / "features.npz")
    read = Collected.load(tmp_path / "features.npz")
    assert_same(found, read, rtol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["features.npz"]
    assert isinstance(read.tokens, int)
    assert isinstance(read.coactive.limit, int)
    read.quantile_samples(3, 1)
    read.coactive.most(2)


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="not there"):
        Collected.load(tmp_path / "none.npz")
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    np.savez(tmp_path / "other.npz", fired=np.zeros(3))
    for name in ("bad.npz", "other.npz"):
        with pytest.raises(InputError, match="cannot be read"):
            Collected.load(tmp_path / name)


def test_nothing_is_left_of_a_failed_save(lm, text, coder, tmp_path, monkeypatch):
    found = collect(lm, SITE, text, np.arange(3), coder, batch_rows=8)
    found.save(tmp_path / "features.npz")
    before = (tmp_path / "features.npz").read_bytes()

    def broken(path, **arrays):
        path.write_bytes(b"half")
        raise OSError("no space")

    monkeypatch.setattr(np, "savez", broken)
    with pytest.raises(OSError, match="no space"):
        found.save(tmp_path / "features.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["features.npz"]
    assert (tmp_path / "features.npz").read_bytes() == before


# What cannot be


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top": 0}, "top 0"),
        ({"sample": -1}, "sample -1"),
        ({"seed": -1}, "seed -1"),
        ({"bins": 0}, "0 bins"),
        ({"batch_rows": 12}, "batch_rows 12"),
        ({"slots": 0}, "slots 0"),
        ({"edges": np.zeros((3, 2))}, r"edges of shape \(3, 2\)"),
        ({"delimiters": np.zeros(VOCAB)}, "delimiters of shape"),
        ({"delimiters": np.zeros(VOCAB + 1, bool)}, "delimiters of shape"),
        ({"limit_bytes": 1000}, "raise limit_bytes"),
    ],
)
def test_arguments_that_cannot_be(lm, text, coder, options, words):
    with pytest.raises(InputError, match=words):
        collect(lm, SITE, text, np.arange(3), coder, **options)


@pytest.mark.parametrize("rows", [[], [3, 3], [-1, 2], [40], [0.5], [[1, 2]]])
def test_rows_that_cannot_be(lm, text, coder, rows):
    with pytest.raises(InputError, match="row"):
        collect(lm, SITE, text, np.array(rows), coder)


def test_what_is_not_finite_is_said(lm, text, coder):
    bad = dataclasses.replace(coder, normaliser=Normaliser(jnp.full(D, jnp.nan, jnp.float32), coder.normaliser.scale))
    with pytest.raises(InputError, match=r"codes of activations at mlp_out\.1 are not finite"):
        collect(lm, SITE, text, np.arange(3), bad)
    poisoned = dataclasses.replace(lm, params=jax.tree.map(lambda p: p.at[..., 0].set(jnp.nan), lm.params))
    with pytest.raises(InputError, match="row 2 of the text, position 0"):
        collect(poisoned, SITE, text, np.array([2, 3]), coder)


def test_memory_is_enough():
    """Host arrays of a stream through the accumulators stay below what is said; 16,384 features fit the default."""
    n, vocab, tokens, l0, batches = 500, 1000, 2048, 20, 8
    generator = np.random.default_rng(0)
    sizes = {"top": 20, "sample": 200, "coactive_tokens": 4000, "token_entries": 100_000}
    said = memory(n, vocab, tokens * batches, l0=l0, batch_tokens=tokens, bins=10, **sizes)
    tracemalloc.start()
    totals = module._Totals(np.ones((n, 9), np.float32), vocab, np.zeros(vocab, bool), sizes, 0)
    for number in range(batches):
        places = np.repeat(np.arange(tokens), l0)
        features = np.concatenate([generator.choice(n, l0, replace=False) for _ in range(tokens)])
        values = generator.exponential(size=len(places)).astype(np.float32)
        ids = generator.integers(0, vocab, (8, tokens // 8)).astype(np.int32)
        rows = np.arange(8) + 8 * number
        totals.add(module.Firings(rows, ids, np.ones(ids.shape, bool), places, features, values))
    totals.result(np.arange(8 * batches))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del said["codes"]
    assert 0.1 < peak / sum(said.values()) < 1
    large = memory(16_384, 50_304, 10**9, l0=60, batch_tokens=2048)
    assert sum(large.values()) < module.LIMIT_BYTES
