"""The store: what is written is what is read, blocks are those without a store, and damage is seen and named."""

import errno
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.activations import (
    Blocks,
    BlocksAt,
    Entry,
    Manifest,
    Share,
    SiteBlocks,
    StoredBlocks,
    open_store,
    shards,
)
from sparse_jax.activations import activations as activations_at
from sparse_jax.activations.harvest import check_room, harvest, shard_rows_for
from sparse_jax.activations.row_encoding import as_float32, decode, encode
from sparse_jax.activations.shards import shard_folder
from sparse_jax.activations.store import MANIFEST, read_manifest
from sparse_jax.dictionaries import L1, Normalised
from sparse_jax.errors import InputError
from sparse_jax.lm import Site
from sparse_jax.numerics.sparse_codes import dense
from tests.activations.conftest import CONTEXT, N_ROWS, SEPARATOR, VOCAB

FIRST, SECOND = Site("resid_post", 0), Site("mlp_out", 1)
WIDTH = 16


def manifest(*entries, shard_rows=8, n_rows=N_ROWS, identity=None) -> Manifest:
    return Manifest(
        identity={"model": "tiny"} if identity is None else identity,
        entries=entries or (Entry(FIRST, WIDTH), Entry(SECOND, WIDTH)),
        context=CONTEXT,
        fill_id=SEPARATOR,
        vocab_size=VOCAB,
        shard_rows=shard_rows,
        n_rows=n_rows,
        window_rows=None,
    )


@pytest.fixture
def stored(lm, rows, tmp_path):
    done = harvest(lm, rows, tmp_path / "store", manifest())
    assert (done.written, done.found, done.finished) == (3, 0, True)
    return tmp_path / "store"


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


# What is written is what is read


def test_every_row_is_there_with_its_tokens_and_documents(stored, lm, rows):
    store = open_store(stored)
    assert (len(store), store.n_tokens, store.n_shards) == (N_ROWS, N_ROWS * CONTEXT, 3)
    numbers = np.array([0, 23, 7, 8, 7])
    assert_equal(store[numbers], rows[numbers])
    assert_equal(store[np.array([[3, -1], [-1, 20]])], rows[np.array([[3, -1], [-1, 20]])])
    for site in (FIRST, SECOND):
        due = activations_at(lm, jnp.array(rows[numbers].tokens), site)
        np.testing.assert_allclose(store.activations(str(site), numbers), due, rtol=0, atol=5e-6)
    assert store.documents == dict(enumerate(rows.documents))
    assert store.damage() == []


def test_blocks_are_those_without_a_store(stored, lm, rows):
    options = {"seed": 5, "block_rows": 8, "max_norms": {str(FIRST): 3.5}}
    due = SiteBlocks(lm, rows, (FIRST, SECOND), **options)
    read = StoredBlocks(open_store(stored), (FIRST, SECOND), **options)
    for index in range(5):  # into the second epoch
        assert np.array_equal(read.row_numbers(index), due.row_numbers(index))
        assert_equal(read[index], due[index])
    assert float(due[0].weight[str(FIRST)].sum()) < float(due[0].weight[str(SECOND)].sum())
    assert (read.tokens_per_block, read.vocab_size) == (due.tokens_per_block, due.vocab_size)
    one = BlocksAt(read, FIRST)
    assert_equal(one[2], Blocks(lm, rows, FIRST, 5, 8, 3.5)[2])
    assert (one.tokens_per_block, one.vocab_size) == (read.tokens_per_block, VOCAB)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_every_batch_without_overlap(stored, processes):
    store, batch = open_store(stored), 12
    whole = StoredBlocks(store, (FIRST,), seed=1, block_rows=8)
    parts = [
        StoredBlocks(store, (FIRST,), seed=1, block_rows=8, share=Share(process, processes, batch))
        for process in range(processes)
    ]
    for index in range(4):
        due, found = whole[index], [part[index] for part in parts]
        for number in range(8 * CONTEXT // batch):
            own = slice(number * batch // processes, (number + 1) * batch // processes)
            joined = jax.tree.map(lambda *values, own=own: jnp.concatenate([value[own] for value in values]), *found)
            assert_equal(joined, jax.tree.map(lambda value, n=number: value[n * batch : (n + 1) * batch], due))
        # What a stream's block is cut into is the same.
        assert_equal(found[-1].place, Share(processes - 1, processes, batch).of(due.place))


def test_shares_that_cannot_be_are_refused():
    for wrong in ((2, 2, 4), (-1, 2, 4), (0, 3, 4), (0, 1, 0)):
        with pytest.raises(InputError):
            Share(*wrong)
    with pytest.raises(InputError, match="no whole number of batches"):
        Share(0, 2, 4).of(np.zeros(6))


@pytest.mark.parametrize("processes", [1, 4])
def test_processes_that_harvest_together_write_what_one_writes(stored, lm, rows, tmp_path, processes):
    folder = tmp_path / "shared"
    for process in reversed(range(processes)):
        done = harvest(lm, rows, folder, manifest(), process=process, processes=processes)
        assert done.written == len(range(process, 3, processes))
    one, other = open_store(stored), open_store(folder)
    for index in range(3):
        assert_equal(dict(one.shard(index).arrays), dict(other.shard(index).arrays))
        assert one.shard(index).card == other.shard(index).card


# Encodings


def values(rows=40):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(rows, WIDTH)).astype(np.float32)
    x[0], x[1, 3] = 0, 300
    return x


@pytest.mark.parametrize(
    ("dtype", "bound"),
    # int8: half a step of the row's largest entry; bfloat16: half a unit in the last of 8 bits.
    [("float32", lambda x: 0), ("bfloat16", lambda x: np.abs(x) / 256),
     ("int8", lambda x: np.abs(x).max(-1, keepdims=True) / 254 * (1 + 1e-6))],
)  # fmt: skip
def test_what_rounding_costs_is_bounded_and_host_and_device_agree(dtype, bound):
    x, entry = values(), Entry(FIRST, WIDTH, dtype)
    arrays, lost = jax.jit(lambda x: encode(entry, x))(x)
    assert {name: (array.shape[1:], array.dtype) for name, array in arrays.items()} == entry.arrays
    back = np.asarray(decode(entry, arrays))
    assert np.all(np.abs(back - x) <= bound(x))
    assert np.all(back[0] == 0)
    assert int(lost.sum()) == 0
    np.testing.assert_array_equal(back, as_float32(entry, {name: np.asarray(a) for name, a in arrays.items()}))


def dictionary() -> Normalised:
    from sparse_jax.activations import fit_normaliser

    made = L1(n_features=64).sized(WIDTH)
    return Normalised(made, made.init(jax.random.key(0)), fit_normaliser("none", np.zeros(WIDTH), 1.0))


@pytest.mark.parametrize("slots", [64, 5])
def test_codes_are_stored_with_all_slots_and_what_found_none_is_counted(lm, rows, tmp_path, slots):
    trained = dictionary()
    entry = Entry(FIRST, WIDTH, "codes", slots=slots, n_features=64)
    folder = tmp_path / str(slots)
    done = harvest(lm, rows, folder, manifest(Entry(FIRST, WIDTH), entry), dictionaries={entry.name: trained})
    store, numbers = open_store(folder), np.arange(N_ROWS)
    x = store.activations(str(FIRST), numbers)
    due = np.asarray(trained.encode(jnp.array(x.reshape(-1, WIDTH))))
    codes = store.codes("codes.resid_post.0", numbers)
    found = np.asarray(dense(jax.tree.map(lambda a: jnp.array(a.reshape(-1, slots)), codes), 64))
    active = (due != 0).sum(-1)
    counted = store[numbers].mask.reshape(-1)
    assert done.lost == np.maximum(active - slots, 0)[counted].sum()
    np.testing.assert_array_equal(found[active <= slots], due[active <= slots])
    np.testing.assert_array_equal((found != 0).sum(-1), np.minimum(active, slots))
    np.testing.assert_allclose(np.sort(found, -1)[:, -slots:], np.sort(due, -1)[:, -slots:])
    with pytest.raises(InputError, match=r"has nothing of resid_post\.1"):
        StoredBlocks(store, (FIRST, Site("resid_post", 1)), 0)
    with pytest.raises(InputError, match="not activations"):
        store.activations("codes.resid_post.0", numbers)
    with pytest.raises(InputError, match="not codes"):
        store.codes("resid_post.0", numbers)


@pytest.mark.parametrize(
    "wrong", [{"dtype": "float8"}, {"slots": 3}, {"dtype": "codes"}, {"dtype": "codes", "slots": 5, "n_features": 4}]
)
def test_entries_that_cannot_be_are_refused(wrong):
    with pytest.raises(InputError):
        Entry(FIRST, WIDTH, **wrong)


# Going on, and what is damaged


def test_a_harvest_goes_on_at_the_first_shard_that_is_missing(stored, lm, rows, tmp_path):
    folder, calls = tmp_path / "again", []
    harvest(lm, rows, folder, manifest(), should_stop=lambda: len(calls) > 0 or calls.append(1))
    with pytest.raises(InputError, match=r"unfinished \(1 of 3 shards"):
        open_store(folder)
    part = open_store(folder, unfinished=True)
    assert len(part) == 8
    assert_equal(part[np.arange(8)], rows[np.arange(8)])
    done = harvest(lm, rows, folder, manifest())
    assert (done.written, done.found) == (2, 1)
    for index in range(3):
        assert_equal(dict(open_store(stored).shard(index).arrays), dict(open_store(folder).shard(index).arrays))


def test_a_flipped_byte_is_named_where_it_is_read(stored):
    path = shard_folder(stored, 1) / "mlp_out.1.values.npy"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1  # in the last row of the shard: row 15 of the text
    path.write_bytes(content)
    store = open_store(stored)
    store.activations("mlp_out.1", np.arange(15))
    store.activations("resid_post.0", np.arange(24))
    with pytest.raises(InputError, match=r"00001 is damaged: row 15 of mlp_out.1.values.npy"):
        store.activations("mlp_out.1", np.array([15]))
    assert len(store.damage()) == 1


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def spoil_header(path):
    content = bytearray(path.read_bytes())
    content[content.index(b"(8, 12, 16)") + 5] = ord("3")
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("mlp_out.1.values.npy", cut, "bytes of"),
        ("mlp_out.1.values.npy", lambda path: path.unlink(), "is missing"),
        ("mlp_out.1.values.npy", spoil_header, "damaged"),
        ("shard.json", cut, "cannot be read"),
        ("shard.json", lambda path: path.write_text("{}"), "cannot be read"),
    ],
)
def test_a_damaged_shard_is_named_and_made_again(stored, lm, rows, name, spoil, words):
    due = open_store(stored).activations("mlp_out.1", np.arange(24))
    spoil(shard_folder(stored, 2) / name)
    with pytest.raises(InputError, match=rf"00002 is damaged.*{words}" if words != "damaged" else "00002 is damaged"):
        open_store(stored).activations("mlp_out.1", np.arange(24))
    said = []
    if words == "damaged":  # its size is right: only reading sees it
        shutil.rmtree(shard_folder(stored, 2))
    done = harvest(lm, rows, stored, manifest(), warn=said.append)
    assert done.written == 1
    assert words == "damaged" or "00002" in said[0]
    np.testing.assert_array_equal(open_store(stored).activations("mlp_out.1", np.arange(24)), due)


def test_a_store_of_another_model_is_refused_and_left_alone(stored, lm, rows):
    before = (stored / MANIFEST).read_bytes()
    with pytest.raises(InputError, match=r"another one \(model: 'tiny' there, 'other' now\)"):
        harvest(lm, rows, stored, manifest(identity={"model": "other"}))
    with pytest.raises(InputError, match="shard_rows: 8 there, 4 now"):
        harvest(lm, rows, stored, manifest(shard_rows=4))
    assert (stored / MANIFEST).read_bytes() == before


def test_manifests_that_are_none_are_refused(stored, tmp_path):
    with pytest.raises(InputError, match="holds no activation store"):
        open_store(tmp_path)
    assert read_manifest(stored) == manifest()
    good = json.loads((stored / MANIFEST).read_text())
    for change, words in (({"version": 9}, "version 9"), ({"format": "x"}, "no manifest"), ({"context": None}, "")):
        (stored / MANIFEST).write_text(json.dumps(good | change))
        if words:
            with pytest.raises(InputError, match=words):
                open_store(stored)
    (stored / MANIFEST).write_text("{")
    with pytest.raises(InputError, match="damaged"):
        open_store(stored)
    (stored / MANIFEST).write_text(json.dumps(good))
    with pytest.raises(InputError, match=r"has nothing of resid_post\.1"):
        open_store(stored).entry("resid_post.1")


def test_a_disk_that_is_full_leaves_whole_shards_only(lm, rows, tmp_path, monkeypatch):
    real, calls = shards._settle, []

    def settle(file):
        calls.append(file.name)
        if len(calls) > 12:  # in the middle of the second shard: seven files each
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file)

    monkeypatch.setattr(shards, "_settle", settle)
    with pytest.raises(InputError, match=r"the disk is full at .*make room and go on with --resume"):
        harvest(lm, rows, tmp_path / "store", manifest())
    assert sorted(path.name for path in (tmp_path / "store" / "shards").iterdir()) == ["00000"]
    part = open_store(tmp_path / "store", unfinished=True)
    assert part.damage() == []
    monkeypatch.setattr(shards, "_settle", real)
    assert harvest(lm, rows, tmp_path / "store", manifest()).written == 2
    assert open_store(tmp_path / "store").damage() == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_told_from_other_errors():
    with open("/dev/full", "wb", buffering=0) as file, pytest.raises(OSError) as caught:
        shards.write_array(file, np.zeros(1 << 16, np.float32))
    assert caught.value.errno == errno.ENOSPC


def test_arrays_are_files_of_numpy(tmp_path):
    for number, values in enumerate((np.arange(6, dtype=np.uint16).reshape(2, 3), np.ones((2, 1, 4), bool))):
        with (tmp_path / f"{number}.npy").open("wb") as file:
            shards.write_array(file, values)
        read = np.load(tmp_path / f"{number}.npy")
        assert (read.dtype, read.tolist()) == (values.dtype, values.tolist())


def test_room_is_looked_at_before_anything_is_done(tmp_path):
    check_room(tmp_path / "a" / "b", manifest(), 1000)
    check_room(tmp_path, manifest(), None)
    with pytest.raises(InputError, match=r"take [\d,.]+ GB, and .*GB free"):
        check_room(tmp_path / "a" / "b", manifest(), 1 << 50)


def test_shards_are_of_a_useful_size():
    assert shard_rows_for(256 * 1024) == 512
    assert shard_rows_for(1 << 40) == 8
    assert manifest().bytes_per_row == CONTEXT * (2 * WIDTH * 4 + 2 + 4 + 4 + 1)


def test_activations_that_are_not_finite_are_named_and_not_stored(lm, rows, tmp_path):
    poisoned = jax.tree.map(lambda a: a, lm)
    poisoned.params["blocks"]["mlp"]["down"]["bias"] = jnp.full_like(lm.params["blocks"]["mlp"]["down"]["bias"], np.nan)
    with pytest.raises(InputError, match=r"activation at mlp_out.1 is not finite \(row 0 of the text, position 0"):
        harvest(poisoned, rows, tmp_path / "store", manifest(Entry(SECOND, WIDTH)))
    assert list((tmp_path / "store" / "shards").iterdir()) == []
