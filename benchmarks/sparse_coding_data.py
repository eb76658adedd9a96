"""What `benchmarks.sparse_coding` codes: rows and unit atoms, real and random.

real: activations of the embedded model on text that it was trained on, centred and scaled so that E||x||^2 = d; width
256 is resid_post.3, width 512 resid_post.1 beside resid_post.3, each normalised by itself. The atoms are the decoder of
a TopK dictionary (k 32) after 256,000 tokens, scaled to length 1, and its bias is taken from the rows. The rows are of
a block that neither it nor the normaliser saw. What was made is kept in a folder.

gaussian: rows and atoms of independent normal numbers, atoms scaled to length 1.
"""

import functools
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from experiments.data import weights_sha256
from sparse_jax.activations import Normaliser, SiteBlocks
from sparse_jax.activations.normalise import fit_normaliser
from sparse_jax.dictionaries import TopK
from sparse_jax.errors import InputError
from sparse_jax.lm import check_site, load, load_tokenizer, resolve
from sparse_jax.lm.documents import fingerprint
from sparse_jax.lm.holdout import split
from sparse_jax.lm.packing import pack
from sparse_jax.training.schedules import Schedule
from sparse_jax.training.state import init_state, settings_for
from sparse_jax.training.step import adam, make_step

CONTEXT = 256
# By width.
SITES = {256: ("resid_post.3",), 512: ("resid_post.1", "resid_post.3")}
# Rows of random data, and at most so many of a block of activations.
MOST_ROWS = 4096


@dataclass(frozen=True)
class Recipe:
    """How the activations and the dictionary come about."""

    model: str = "novel-neox"
    text: str = "embedded"
    block_rows: int = 256
    steps: int = 250
    batch: int = 1024
    k: int = 32
    learning_rate: float = 3e-3
    seed: int = 0


def gaussian(width: int, features: int) -> tuple[np.ndarray, np.ndarray]:
    """(x `[MOST_ROWS, width]`, W `[features, width]`), float32."""
    generator = np.random.default_rng(0)
    return generator.normal(size=(MOST_ROWS, width)).astype(np.float32), _unit(
        generator.normal(size=(features, width)).astype(np.float32)
    )


def real(width: int, features: int, folder: Path, recipe: Recipe = Recipe()) -> tuple[np.ndarray, np.ndarray]:
    """(x `[rows, width]`, W `[features, width]`), float32: read from the folder, or made and put there.

    Raises:
        InputError: a width for which no sites are chosen.
    """
    if width not in SITES:
        raise InputError(f"--widths {width}: activations are of width {', '.join(map(str, SITES))}")
    card = {
        **asdict(recipe),
        "sites": SITES[width],
        "weights_sha256": weights_sha256(recipe.model, None),
        "text_fingerprint": fingerprint(recipe.text),
    }
    card = json.dumps(card, sort_keys=True)
    path = folder / f"real-d{width}-n{features}.npz"
    if path.exists():
        with np.load(path) as stored:
            if str(stored["card"]) == card:
                return stored["x"], stored["W"]
    print(f"making {path}: activations, and a dictionary of them", flush=True)
    train, rest = activations(width, recipe)
    W, bias = trained(train, features, recipe)
    x = rest[:MOST_ROWS] - bias
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.savez(file, x=x, W=W, card=card)
    os.replace(temporary, path)
    return x, W


@functools.lru_cache(maxsize=1)
def activations(width: int, recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """Normalised activations `[tokens, width]`: those to train on, and the ones of the block after them."""
    lm, tokenizer = load(recipe.model, dtype="float32"), load_tokenizer(resolve(recipe.model))
    sites = tuple(check_site(lm.config, site) for site in SITES[width])
    to_train, _ = split(recipe.text, tokenizer=tokenizer, context=CONTEXT)
    blocks = SiteBlocks(lm, pack(to_train, tokenizer, CONTEXT), sites, recipe.seed, recipe.block_rows)
    parts, found = [], 0
    while found < recipe.steps * recipe.batch:
        parts.append(_counted(blocks, len(parts)))
        found += len(parts[-1])
    train, rest = np.concatenate(parts), _counted(blocks, len(parts))
    for columns in np.split(np.arange(width), len(sites)):
        part = slice(columns[0], columns[-1] + 1)
        mean = train[:, part].mean(0, dtype=np.float64)
        variance = float(np.mean(np.sum((train[:, part] - mean) ** 2, axis=1)))
        normaliser = fit_normaliser("centre-scale", mean, variance)
        for x in (train, rest):
            x[:, part] = normaliser.apply(x[:, part])
    return train, rest


def _counted(blocks: SiteBlocks, index: int) -> np.ndarray:
    """`[tokens, width]`: all sites side by side, of the tokens that the mask lets count."""
    block = blocks[index]
    here = np.asarray(next(iter(block.weight.values()))) > 0
    return np.concatenate([np.asarray(x)[here] for x in block.x.values()], axis=1)


def trained(x: np.ndarray, features: int, recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """(unit atoms `[features, width]`, bias `[width]`) of a TopK dictionary."""
    width = x.shape[1]
    dictionary = TopK(n_features=features, k=recipe.k).sized(width)
    optimisation = adam(recipe.learning_rate)
    none = Normaliser(jnp.zeros(width), jnp.ones(()))
    settings = settings_for(dictionary, optimisation)
    state = init_state(dictionary, optimisation.transform, none, recipe.seed, settings)
    step = make_step(dictionary, optimisation, Schedule(), recipe.steps, dead_window=10**9)
    weight = jnp.ones(recipe.batch)
    for i in range(recipe.steps):
        state, _ = step(state, jnp.array(x[i * recipe.batch : (i + 1) * recipe.batch]), weight)
    return _unit(np.array(state.params["W_dec"])), np.array(state.params["b_dec"])


def _unit(W: np.ndarray) -> np.ndarray:
    return W / np.linalg.norm(W, axis=1, keepdims=True)
