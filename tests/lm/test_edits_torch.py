"""The same intervention in the ports and by hooks in transformers' PyTorch models gives the same values downstream."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.lm import Edit, add, forward, load
from sparse_jax.lm.documents import documents
from sparse_jax.lm.embedded import MODELS as EMBEDDED
from sparse_jax.lm.packing import pack
from sparse_jax.lm.tokenizer import load_tokenizer
from tests.lm.reference.models import (
    FAMILIES,
    MODELS,
    errors_at,
    family_of,
    random_tensors,
    random_tokens,
    relative_error,
    sites,
    write_model,
)

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

TOLERANCE = 1e-10  # float64
HEAD_AXIS = {"attn_q": 2, "attn_k": 2, "attn_v": 2, "attn_z": 2, "attn_pattern": 1}


def replace(value, new, mask):
    return jnp.where(mask[..., None], new, value)


def zero_head(value, head):
    return value.at[:, :, head].set(0)


def scaled(value, factor):
    return value * factor


# name -> (site, edit made in JAX from the arrays, the same made by a PyTorch hook from the arrays)
EDITS = {
    "attn_out replaced at some positions": (
        "attn_out.1",
        lambda new, mask, _: Edit("attn_out.1", replace, (jnp.array(new), jnp.array(mask))),
        lambda value, new, mask, _: torch.where(torch.from_numpy(mask)[..., None], torch.from_numpy(new), value),
    ),
    "a head's z set to zero": (
        "attn_z.0",
        lambda *_: Edit("attn_z.0", zero_head, (jnp.array(1),)),
        lambda value, *_: value * torch.tensor([1.0, 0.0] + [1.0] * (value.shape[2] - 2), dtype=value.dtype)[:, None],
    ),
    "a direction added to resid_post": (
        "resid_post.0",
        lambda new, _, direction: Edit("resid_post.0", add, (jnp.array(direction), jnp.array(1.5, new.dtype))),
        lambda value, _, __, direction: value + 1.5 * torch.from_numpy(direction),
    ),
    "keys doubled before the rotation": (
        "attn_k.1",
        lambda new, *_: Edit("attn_k.1", scaled, (jnp.array(2, new.dtype),)),
        lambda value, *_: 2 * value,
    ),
    "neurons halved": (
        "mlp_hidden.1",
        lambda new, *_: Edit("mlp_hidden.1", scaled, (jnp.array(0.5, new.dtype),)),
        lambda value, *_: 0.5 * value,
    ),
}


@pytest.mark.parametrize("name", ["parallel", "sequential"])
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_is_a_hook(edit, name, torch_reference, loaded, model_folder, x64):
    """The same intervention gives the same values downstream, and they are not those of the clean pass."""
    tiny = MODELS[name]
    tokens, d = random_tokens(tiny, seed=8), tiny.config["hidden_size"]
    random = np.random.default_rng(5)
    arrays = random.normal(size=(*tokens.shape, d)), random.random(tokens.shape) < 0.5, random.normal(size=d)
    at, ours, hook = EDITS[edit]
    model = torch_reference.torch_model(model_folder(name), "float64")
    clean = torch_reference.torch_values(model, tokens)
    theirs = torch_reference.torch_values(
        model, tokens, lambda site, value: hook(value, *arrays) if site == at else None
    )
    out = forward(loaded(name, "float64"), tokens, capture=sites(tiny.config), edits=[ours(*arrays)])
    assert relative_error(clean["logits"], theirs["logits"]) > 1e-2
    assert max(errors_at(out, theirs).values()) <= TOLERANCE


def test_an_edit_of_the_trained_model(torch_reference):
    """Mean-ablating the attention of layer 3 on half of the positions of real text, in float32."""
    rows = pack(documents("austen"), load_tokenizer(EMBEDDED["novel-neox"]), 256)
    text = rows[np.array([0, 1500, 4000])].tokens
    mask = np.arange(256)[None] % 2 == np.zeros((3, 1))
    model = torch_reference.torch_model(EMBEDDED["novel-neox"], "float32")
    clean = torch_reference.torch_values(model, text)
    new = np.broadcast_to(clean["attn_out.3"].mean((0, 1)), clean["attn_out.3"].shape).copy()

    def hook(site, value):
        if site == "attn_out.3":
            return torch.where(torch.from_numpy(mask)[..., None], torch.from_numpy(new), value)
        return None

    theirs = torch_reference.torch_values(model, text, hook)
    out = forward(load(), text, edits=[Edit("attn_out.3", replace, (jnp.array(new), jnp.array(mask)))])
    assert relative_error(clean["logits"], theirs["logits"]) > 1e-2
    assert relative_error(out.logits, theirs["logits"]) <= 1e-5


# Random edits, in arithmetic that JAX and PyTorch write alike.


def zeroed(value):
    return value * 0


def moved(value, direction):
    return value + direction


def blended(value, new, mask):
    return value * (1 - mask) + new * mask


def multiplied(value, factor):
    return value * factor


class Change(NamedTuple):
    """An edit with NumPy arguments, for either side."""

    site: str
    kind: str
    fn: Callable
    args: tuple[np.ndarray, ...]


def random_change(random: np.random.Generator, site: str, shape: tuple[int, ...]) -> Change:
    """Of a random kind, at a site whose values have this shape."""
    name = site.split(".")[0]
    head_axis = HEAD_AXIS.get(name)
    kinds = ["zero", "add a direction", "replace at positions"]
    kind = str(random.choice(kinds + ([] if head_axis is None else ["scale a head", "zero a head"])))
    if kind == "zero":
        return Change(site, kind, zeroed, ())
    if kind == "add a direction":
        return Change(site, kind, moved, (2 * random.normal(size=shape[-1]),))
    if kind == "replace at positions":
        position_axis = 2 if name == "attn_pattern" else 1
        chosen = (random.random((shape[0], shape[position_axis])) < 0.5).astype(np.float64)
        axes = tuple(axis for axis in range(len(shape)) if axis not in (0, position_axis))
        new = random.random(shape) if name == "attn_pattern" else 2 * random.normal(size=shape)
        return Change(site, kind, blended, (new, np.expand_dims(chosen, axes)))
    factor = np.ones(shape[head_axis])
    factor[random.integers(len(factor))] = 0 if kind == "zero a head" else random.uniform(-3, 3)
    return Change(site, kind, multiplied, (factor.reshape(-1, *[1] * (len(shape) - head_axis - 1)),))


def hook(changes: list[Change]):
    def edit(site, value):
        wanted = [change for change in changes if change.site == site]
        for change in wanted:
            value = change.fn(value, *map(torch.from_numpy, change.args))
        return value if wanted else None

    return edit


# Draws that are made of each family: every model takes part, every site is edited at least once.
DRAWS = {"gpt_neox": 16, "gpt2": 16, "llama": 16}
CASES = [(family, number) for family, count in DRAWS.items() for number in range(count)]


@pytest.fixture(scope="module")
def case(torch_reference, tmp_path_factory):
    """(family, number) -> name of the model, tokens, one to three changes, the values that they lead to."""
    found = {}

    def draw(family, number):
        names = [name for name in FAMILIES[family].MODELS if name != "one-position"]
        # Rolled so that every kind of block meets the site that only sequential ones have.
        name = names[(number + 4) % len(names)]
        tiny = MODELS[name]
        folder = write_model(tmp_path_factory.mktemp(name), tiny.config, random_tensors(tiny.config))
        model, tokens = torch_reference.torch_model(folder, "float64"), random_tokens(tiny, seed=8)
        clean = torch_reference.torch_values(model, tokens)
        own = family_of(tiny.config).site_names(tiny.config)
        for attempt in itertools.count():
            random = np.random.default_rng([list(DRAWS).index(family), number, attempt])
            first = f"{own[number % len(own)]}.{random.integers(family_of(tiny.config).n_layers(tiny.config))}"
            chosen = [first, *random.choice(sites(tiny.config), number % 3)]
            changes = [random_change(random, str(site), clean[site].shape) for site in chosen]
            theirs = torch_reference.torch_values(model, tokens, hook(changes))
            # Draws without effect are drawn again: the same number added to all scores of a query, say, or something
            # that a later edit at the same place overwrites.
            without = [
                torch_reference.torch_values(model, tokens, hook(changes[:i] + changes[i + 1 :]))["logits"]
                for i in range(len(changes))
            ]
            if all(relative_error(logits, theirs["logits"]) > 1e-3 for logits in [*without, clean["logits"]]):
                return name, tokens, changes, clean, theirs

    def get(family, number):
        if (family, number) not in found:
            found[family, number] = draw(family, number)
        return found[family, number]

    return get


@pytest.mark.parametrize(("family", "number"), CASES)
def test_random_edits_are_hooks(family, number, case, loaded, x64):
    name, tokens, changes, clean, theirs = case(family, number)
    print(name, [(change.site, change.kind) for change in changes])
    assert relative_error(theirs["logits"], clean["logits"]) > 1e-3
    edits = [Edit(change.site, change.fn, tuple(map(jnp.array, change.args))) for change in changes]
    out = forward(loaded(name, "float64"), tokens, capture=sites(MODELS[name].config), edits=edits)
    errors = errors_at(out, theirs)
    print({site: f"{error:.1e}" for site, error in errors.items()})
    assert max(errors.values()) <= TOLERANCE
    if number % 3 == 0:  # nobody looks at the patterns: attention runs in blocks of queries
        out = forward(loaded(name, "float64"), tokens, edits=edits)
        assert relative_error(out.logits, theirs["logits"]) <= TOLERANCE


@pytest.mark.parametrize("family", DRAWS)
def test_the_random_edits_leave_nothing_out(family, case):
    """Every model with more than one position, every site, every kind of edit; one, two and three at once."""
    cases = [case(family, number) for number in range(DRAWS[family])]
    assert {name for name, *_ in cases} == FAMILIES[family].MODELS.keys() - {"one-position"}
    changes = [change for _, _, made, _, _ in cases for change in made]
    names = {name for tiny in FAMILIES[family].MODELS.values() for name in FAMILIES[family].site_names(tiny.config)}
    assert {change.site.split(".")[0] for change in changes} == names
    assert {change.kind for change in changes} == {
        "zero", "add a direction", "replace at positions", "scale a head", "zero a head",
    }  # fmt: skip
    assert {len(made) for _, _, made, _, _ in cases} == {1, 2, 3}
