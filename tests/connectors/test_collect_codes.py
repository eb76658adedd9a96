"""Codes of several sites from one pass, against a forward pass and an encoder by hand; in memory and in files."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.activations import Normaliser
from sparse_jax.connectors import collect_codes as module
from sparse_jax.connectors.code_files import CodeFiles
from sparse_jax.connectors.collect_codes import collect_codes, largest_slots, open_codes
from sparse_jax.dictionaries import Normalised, TopK
from sparse_jax.errors import InputError
from sparse_jax.lm import forward, random_model
from sparse_jax.lm.families.gpt_neox import GPTNeoXConfig
from sparse_jax.lm.rows import Rows

CONTEXT, VOCAB, D, N, K = 10, 20, 8, 24, 3
SITES = ("resid_pre.1", "mlp_out.1", "resid_post.1")
NUMBERS = np.array([5, 0, 3, 7, 9, 2, 11])


@pytest.fixture(scope="module")
def text():
    """12 rows; documents of 17 tokens behind a separator, 0."""
    stream = np.random.default_rng(0).integers(1, VOCAB, 12 * CONTEXT + 1)
    starts = np.arange(0, 12 * CONTEXT, 17)
    stream[starts] = 0
    names = tuple(map(str, starts))
    return Rows(stream.astype(np.uint16), starts, names, CONTEXT, 1, (0,), None, 0, 0)


@pytest.fixture(scope="module")
def lm():
    return random_model(GPTNeoXConfig(2, D, 16, 2, VOCAB, CONTEXT), jax.random.key(0))


@pytest.fixture(scope="module")
def coders(lm):
    """Two TopK dictionaries; the last site is raw."""
    dictionary = TopK(n_features=N, k=K).sized(D)
    normaliser = Normaliser(jnp.full(D, 0.01, jnp.float32), jnp.array(0.5, jnp.float32))
    made = [Normalised(dictionary, dictionary.init(jax.random.key(seed)), normaliser) for seed in (1, 2)]
    return dict(zip(SITES, [*made, None]))


def by_hand(lm, text, coders, norms=()):
    """(site -> dense `[tokens, n]`, tokens that count): plain, row after row."""
    found, places = {site: [] for site in coders}, []
    for number in NUMBERS:
        tokens, _, mask, document = text[number]
        captured = forward(lm, jnp.array(tokens[None]), capture=SITES).captured
        x = {site: np.asarray(captured[site][0]) for site in SITES}
        for site, limit in dict(norms).items():
            mask = mask & (np.linalg.norm(x[site], axis=1) <= limit)
        for site, coder in coders.items():
            found[site].append((x[site] if coder is None else np.asarray(coder.encode(jnp.array(x[site]))))[mask])
        places += [(tokens[p], document[p], number, p) for p in np.flatnonzero(mask)]
    return {site: np.concatenate(parts) for site, parts in found.items()}, np.array(places)


def check(store, due, places):
    for site, codes in due.items():
        np.testing.assert_allclose(store.sites[site].dense(slice(None)), codes, rtol=1e-4, atol=1e-5)
    for column, name in enumerate(("token", "document", "row", "position")):
        np.testing.assert_array_equal(getattr(store.tokens, name), places[:, column])


def test_codes_are_those_by_hand(lm, text, coders):
    store = collect_codes(lm, text, NUMBERS, coders, batch_rows=4)
    check(store, *by_hand(lm, text, coders))
    assert list(store.sites) == list(SITES)
    for site in SITES[:2]:
        codes = store.sites[site]
        assert (codes.slots, codes.overflow, codes.n_features) == (K, 0, N)
        assert codes.indices.dtype == np.uint16
    assert store.sites[SITES[2]].slots == store.sites[SITES[2]].n_features == D
    assert np.any(store.sites[SITES[2]].values < 0), "raw numbers keep their sign"
    assert len(store.pair(SITES[:1], SITES[1])) == len(store.tokens) < len(NUMBERS) * CONTEXT


def test_large_norms_do_not_count_at_any_site(lm, text, coders):
    norms = {"resid_pre.1": 0.055, "mlp_out.1": 0.035}
    everything, _ = by_hand(lm, text, coders)
    for site in norms:  # limits that some tokens of each site break
        x = np.concatenate([forward(lm, jnp.array(text[NUMBERS].tokens), capture=SITES).captured[site]])
        norms[site] = float(np.quantile(np.linalg.norm(x, axis=-1), 0.7))
    due, places = by_hand(lm, text, coders, norms.items())
    assert 0 < len(places) < 0.75 * len(everything[SITES[0]])
    check(collect_codes(lm, text, NUMBERS, coders, batch_rows=4, max_norms=norms), due, places)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_overflow_is_counted(lm, text, coders, backend, monkeypatch):
    monkeypatch.setattr(module.jax, "default_backend", lambda: backend)  # how codes are found, on the same device
    store = collect_codes(lm, text, NUMBERS, coders, batch_rows=4, slots={SITES[0]: 2})
    due, _ = by_hand(lm, text, coders)
    assert store.sites[SITES[0]].slots == 2
    assert store.sites[SITES[1]].slots == K
    np.testing.assert_allclose(store.sites[SITES[1]].dense(slice(None)), due[SITES[1]], rtol=1e-4, atol=1e-5)
    full = np.sort(due[SITES[0]], axis=1)
    assert store.sites[SITES[0]].overflow == np.count_nonzero(full[:, -3]) > 0
    np.testing.assert_allclose(
        np.sort(store.sites[SITES[0]].dense(slice(None)), axis=1)[:, -2:], full[:, -2:], rtol=1e-4, atol=1e-5
    )


def test_slots_are_measured_where_k_does_not_say(lm, text, coders, monkeypatch):
    """A dictionary without a k: a quarter more than the first batch's most."""
    dense = dict(coders)
    monkeypatch.setattr(TopK, "top_k_codes", lambda self, params, x: jax.nn.relu(self.preactivations(params, x)))
    jax.clear_caches()
    store = collect_codes(lm, text, NUMBERS, dense, batch_rows=8)
    due, _ = by_hand(lm, text, dense)
    jax.clear_caches()
    most = np.count_nonzero(due[SITES[0]], axis=1).max()
    assert most > K
    assert store.sites[SITES[0]].slots == min(int(np.ceil(1.25 * most)), N)
    np.testing.assert_allclose(store.sites[SITES[0]].dense(slice(None)), due[SITES[0]], rtol=1e-4, atol=1e-5)


def test_largest_slots_by_hand():
    codes, lost = largest_slots(np.array([[0, 2, 1, 2], [0, 0, 0, 0], [3, 0, 0, 0]], np.float32), 2)
    assert lost == 1
    assert codes.values.tolist() == [[2, 2], [0, 0], [3, 0]]
    assert codes.indices.tolist() == [[1, 3], [0, 0], [0, 0]]


def same(one, two):
    for site in SITES:
        for name in ("values", "indices", "overflow", "n_features"):
            np.testing.assert_array_equal(getattr(one.sites[site], name), getattr(two.sites[site], name))
    for field in dataclasses.fields(one.tokens):
        np.testing.assert_array_equal(getattr(one.tokens, field.name), getattr(two.tokens, field.name))


def test_files_hold_the_same(lm, text, coders, tmp_path):
    folder, told = tmp_path / "codes", []
    given = {"batch_rows": 2, "slots": 2, "identity": {"model": "x"}}
    made = collect_codes(lm, text, NUMBERS, coders, folder=folder, **given, progress=told.append)
    assert sum(told) == len(NUMBERS) * CONTEXT
    due = collect_codes(lm, text, NUMBERS, coders, **given)
    same(made, due)
    assert made.sites[SITES[0]].overflow > 0
    assert isinstance(made.sites[SITES[0]].values, np.memmap)
    same(open_codes(folder), due)
    assert [path.name for path in tmp_path.iterdir()] == ["codes"]
    assert json.loads((folder / "manifest.json").read_text())["identity"]["given"] == {"model": "x"}
    told.clear()
    same(collect_codes(lm, text, NUMBERS, coders, folder=folder, **given, progress=told.append), due)
    assert told == [], "what is whole is opened, not collected again"


def test_an_interrupted_run_goes_on(lm, text, coders, tmp_path, monkeypatch):
    folder, write, told = tmp_path / "codes", CodeFiles.append, []

    def failing(self, layout, arrays, overflow):
        if self.batches == 2:  # half of the batch is on the disk when the power goes
            with (tmp_path / "codes.unfinished" / f"{SITES[0]}.values").open("ab") as file:
                file.write(b"half")
            raise KeyboardInterrupt
        write(self, layout, arrays, overflow)

    given = {"batch_rows": 2, "slots": 2}
    with monkeypatch.context() as patched:
        patched.setattr(CodeFiles, "append", failing)
        with pytest.raises(KeyboardInterrupt):
            collect_codes(lm, text, NUMBERS, coders, folder=folder, **given)
    assert not folder.exists()
    with pytest.raises(InputError, match="unfinished"):
        open_codes(folder)
    with pytest.raises(InputError, match="another rows"):
        collect_codes(lm, text, NUMBERS[::-1], coders, folder=folder, **given)
    made = collect_codes(lm, text, NUMBERS, coders, folder=folder, **given, progress=told.append)
    assert sum(told) == (len(NUMBERS) - 4) * CONTEXT, "two batches of two rows were there"
    same(made, collect_codes(lm, text, NUMBERS, coders, **given))


def test_other_codes_in_the_folder(lm, text, coders, tmp_path):
    folder = tmp_path / "codes"
    collect_codes(lm, text, NUMBERS, coders, folder=folder, batch_rows=4)
    other = dataclasses.replace(coders[SITES[0]], params={**coders[SITES[0]].params, "b_enc": jnp.ones(N)})
    with pytest.raises(InputError, match="another coders"):
        collect_codes(lm, text, NUMBERS, {**coders, SITES[0]: other}, folder=folder, batch_rows=4)
    model = dataclasses.replace(lm, params=jax.tree.map(lambda leaf: leaf + 1, lm.params))
    with pytest.raises(InputError, match="another model"):
        collect_codes(model, text, NUMBERS, coders, folder=folder, batch_rows=4)
    with (folder / "token").open("ab") as file:
        file.write(b"more")
    with pytest.raises(InputError, match="bytes of"):
        open_codes(folder)
    with pytest.raises(InputError, match="holds no codes"):
        open_codes(tmp_path / "none")


def test_what_cannot_be(lm, text, coders):
    for wrong, message in (
        ({"coders": {}}, "at least one"),
        ({"coders": {"resid_pre.7": None}}, "layers 0 to 1"),
        ({"row_numbers": np.array([0, 0])}, "give each once"),
        ({"slots": 0}, "give at least 1"),
        ({"slots": {"attn_out.0": 3}}, "give at least 1"),
        ({"max_norms": {"attn_out.0": 3.0}}, "largest norm"),
        ({"coders": {"mlp_hidden.1": coders[SITES[0]]}}, "its dictionary reads"),
    ):
        given = {"row_numbers": NUMBERS, "coders": coders} | wrong
        with pytest.raises(InputError, match=message):
            collect_codes(lm, text, given.pop("row_numbers"), given.pop("coders"), **given)
    broken = dataclasses.replace(coders[SITES[0]], params={**coders[SITES[0]].params, "b_enc": jnp.full(N, jnp.nan)})
    with pytest.raises(InputError, match="not finite"):
        collect_codes(lm, text, NUMBERS, {SITES[0]: broken}, batch_rows=4)
