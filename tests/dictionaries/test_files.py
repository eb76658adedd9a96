"""Dictionaries on disk: whole or not at all, and a plain message for whatever is damaged."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sparse_jax.activations import Normaliser
from sparse_jax.dictionaries import L1, Normalised, files, load, read_card, save
from sparse_jax.errors import InputError


def made(seed=0, **options):
    dictionary = L1(n_features=6, **options).sized(4)
    normaliser = Normaliser(jnp.full(4, float(seed)), jnp.float32(1.5 + seed))
    return Normalised(dictionary, dictionary.init(jax.random.key(seed)), normaliser)


def same(one, other):
    return (
        one.dictionary == other.dictionary
        and one.params.keys() == other.params.keys()
        and all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), one, other)))
    )


def test_the_card(tmp_path):
    save(tmp_path / "a" / "b", made(l1=2.5), {"model": "novel-neox", "seed": 7})
    card = read_card(tmp_path / "a" / "b")
    assert card["provenance"] == {"model": "novel-neox", "seed": 7}
    assert card["dictionary"]["kind"] == "l1"
    assert card["dictionary"]["l1"] == 2.5
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {"dictionary.json", "params.safetensors"}


def test_params_are_written_as_they_are_and_not_as_they_lie_in_memory(tmp_path):
    trained = made()
    turned = np.arange(24, dtype=np.float32).reshape(6, 4).T  # a transposed view
    params = {**trained.params, "W_enc": turned}
    save(tmp_path, Normalised(trained.dictionary, params, trained.normaliser), {})
    np.testing.assert_array_equal(load_file(tmp_path / "params.safetensors")["params.W_enc"], turned)
    np.testing.assert_array_equal(load(tmp_path).params["W_enc"], turned)
    assert load(tmp_path).normaliser.scale.shape == ()


def test_a_run_folder_with_one_dictionary_is_enough(tmp_path):
    save(tmp_path / "dictionaries" / "l1", made(), {"seed": 1})
    assert same(load(tmp_path), made())
    assert read_card(tmp_path)["provenance"] == {"seed": 1}


def test_of_several_one_must_be_named(tmp_path):
    for seed in (0, 1):
        save(tmp_path / "dictionaries" / str(seed), made(seed), {})
    with pytest.raises(InputError, match=r"holds 2 dictionaries; give one of .*/dictionaries/0, .*/dictionaries/1"):
        load(tmp_path)
    assert same(load(tmp_path / "dictionaries" / "1"), made(1))


def test_no_dictionary(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="holds no dictionary"):
            load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged"),
        ("", "damaged"),
        ("[1]", "damaged"),
        ('{"format": 1}', "damaged"),
        ('{"format": 1, "dictionary": "l1"}', "damaged"),
        (b"\xff\xfe\x00", "damaged"),
        ('{"dictionary": {"kind": "nothing"}}', "not known"),
        ('{"dictionary": {"kind": "l1", "colour": 1}}', "do not fit"),
        ('{"dictionary": {"kind": "l1", "l1": -1.0}}', "negative"),
    ],
)
def test_damaged_cards(tmp_path, text, message):
    save(tmp_path, made(), {})
    (tmp_path / "dictionary.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message):
        load(tmp_path)


def test_damaged_parameters(tmp_path):
    save(tmp_path, made(), {})
    path = tmp_path / "params.safetensors"
    whole = path.read_bytes()
    for damaged in (b"", whole[:50], whole[:-20], b"\x00" * len(whole)):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"params\.safetensors cannot be read"):
            load(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match=r"params\.safetensors cannot be read"):
        load(tmp_path)


@pytest.mark.parametrize("change", ["normaliser.centre", "normaliser.scale", "params.W_dec", "extra", "shape"])
def test_parameters_that_are_not_the_cards(tmp_path, change):
    save(tmp_path, made(), {})
    path = tmp_path / "params.safetensors"
    arrays = load_file(path)
    if change == "extra":
        arrays["params.W_gate"] = np.zeros(3, np.float32)
    elif change == "shape":
        arrays["params.W_dec"] = np.zeros((7, 4), np.float32)
    else:
        del arrays[change]
    save_file(arrays, path)
    with pytest.raises(InputError, match=r"params\.safetensors does not fit"):
        load(tmp_path)


class Full(OSError):
    """The disk is full."""


def failing_at(call):
    """An `os.replace` that works until its `call`-th call."""
    calls = []

    def replace(source, target):
        calls.append(target)
        if len(calls) == call:
            raise Full
        os.rename(source, target)

    return replace


@pytest.mark.parametrize("call", [1, 2])
def test_a_failure_in_the_middle_leaves_no_dictionary(tmp_path, monkeypatch, call):
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", failing_at(call))
        with pytest.raises(Full):
            save(tmp_path, made(), {})
    with pytest.raises(InputError, match="holds no dictionary"):
        load(tmp_path)
    # The next attempt is not disturbed by what was left.
    save(tmp_path, made(), {})
    assert same(load(tmp_path), made())


@pytest.mark.parametrize("call", [1, 2])
def test_a_failure_never_mixes_an_old_dictionary_with_a_new_one(tmp_path, monkeypatch, call):
    old, new = made(0, l1=1.0), made(1, l1=2.0)
    save(tmp_path, old, {})
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", failing_at(call))
        with pytest.raises(Full):
            save(tmp_path, new, {})
    # What is there now is the old one, the new one or none.
    if (tmp_path / "dictionary.json").exists():
        assert any(same(load(tmp_path), one) for one in (old, new))
    else:
        with pytest.raises(InputError, match="holds no dictionary"):
            load(tmp_path)


def test_what_cannot_be_written_leaves_the_old_dictionary_alone(tmp_path, monkeypatch):
    save(tmp_path, made(0), {"seed": 0})

    def full(arrays, path):
        raise Full

    with pytest.raises(TypeError):
        save(tmp_path, made(1), {"key": object()})
    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", full)
        with pytest.raises(Full):
            save(tmp_path, made(1), {"seed": 1})
    assert same(load(tmp_path), made(0))
    assert read_card(tmp_path)["provenance"] == {"seed": 0}
