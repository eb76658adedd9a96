"""Ablation and causal effects of features against brute force, in the same process: ratios of times, and differences.

    python -m benchmarks.feature_ablation --run runs/demo
    python -m benchmarks.feature_ablation --run runs/demo --basis random --site resid_post.5

Brute force is one whole forward pass of every row for each feature: jitted once, the feature traced, rows in batches of
`--block-rows`, codes and directions made beforehand, and nothing read but log p(next token) (of causes: nothing above
the later site is run, and its code is all that is read). Ours makes every figure of `ablation_effects`, its clean pass
included. A pass of brute force takes as long for any feature, so some stand for all: its time is that of
`--brute-features`, drawn from those that fire, times the number that ours runs. Both sides take turns; medians.
"""

import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments import command
from experiments.reading import Subject, open_subject
from sparse_jax.activations import Normaliser, activations
from sparse_jax.dictionaries import Neurons, Normalised, RandomDictionary
from sparse_jax.features.ablation import ablation_effects
from sparse_jax.features.causes import Located, causes
from sparse_jax.lm import Edit, Site, forward


@dataclass(frozen=True)
class Flags:
    """Ablation and causal effects of features against brute force."""

    run: Path
    """Run folder of train_sae (or a dictionary's)."""
    site: str | None = None
    """Another site than the dictionary's: for --basis random."""
    basis: Literal["dictionary", "random"] = "dictionary"
    """Whose features: the run's, or those of a random dictionary fitted at the site."""
    k: int = 32
    """Active features of the random dictionary, of either sign."""
    rows: int = 16
    """Rows of held-out text."""
    context: int = 256
    """Tokens in each."""
    features: int = 0
    """Features that ours runs, drawn from those that fire; 0: all."""
    contexts: int = 4
    """Contexts of the causal effects; 0 leaves them out."""
    brute_features: int = 4
    """Features of the brute force."""
    block_rows: int = 8
    """Rows at once, of both."""
    repeats: int = 3
    """Turns of each."""
    debug: bool = False
    """Show tracebacks of errors in the input."""


def main(flags: Flags) -> None:
    """Time both sides, compare their answers, print."""
    given = {"site": flags.site, "context": flags.context}
    subject = open_subject(flags.run, given, eval_tokens=flags.rows * flags.context)
    lm, site = subject.data.lm, Site.parse(subject.data.site)
    tokens, targets, mask, _ = subject.data.evaluation[subject.numbers]
    coder = subject.coder if flags.basis == "dictionary" else random_dictionary(flags, subject, tokens, mask)
    codes = firing_codes(subject, coder, tokens, mask)
    active = np.flatnonzero((codes > 0).any(axis=(0, 1)))
    generator = np.random.default_rng(0)
    chosen = np.sort(generator.permutation(active)[: flags.features or None])
    sample = np.sort(generator.permutation(len(chosen))[: flags.brute_features])
    fires = codes[..., chosen] > 0
    print(f"{lm.config.model_type} of {lm.config.n_layers} layers, {site}, {flags.basis} of {codes.shape[-1]} features")
    print(f"{len(tokens)} rows of {tokens.shape[1]}; {len(active)} features fire; {len(chosen)} are run by ours")
    print(f"a feature fires on {fires.mean():.2%} of tokens and on {fires.any(axis=1).mean():.1%} of rows")
    ablation(flags, lm, coder, site, (tokens, targets, mask), codes, chosen, sample)
    if flags.contexts and site.layer < lm.config.n_layers - 1:
        causal(flags, lm, coder, site, (tokens, mask), codes)


def random_dictionary(flags: Flags, subject: Subject, tokens: np.ndarray, mask: np.ndarray) -> Normalised:
    """Random rows at the site, as many as the run's dictionary has; mean and gain from the rows that are read."""
    x = jnp.concatenate(
        [activations(subject.data.lm, jnp.array(row[None]), Site.parse(subject.data.site))[0] for row in tokens]
    )
    x = x[jnp.array(mask.reshape(-1))]
    width, n_features = x.shape[1], subject.coder.dictionary.n_features
    dictionary = RandomDictionary(n_features=n_features, d_in=width, d_out=width, k=flags.k)
    identity = Normaliser(jnp.zeros(width), jnp.ones(()))
    return Normalised(dictionary, dictionary.fit(jax.random.key(0), x.mean(axis=0), x), identity)


def firing_codes(subject: Subject, coder: Normalised, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`[rows, position, n]` codes where the mask counts and they are positive."""
    encode = jax.jit(lambda coder, x: jnp.maximum(coder.encode(x), 0))
    found = []
    for row, counts in zip(tokens, mask):
        x = activations(subject.data.lm, jnp.array(row[None]), Site.parse(subject.data.site))[0]
        found.append(np.asarray(encode(coder, x)) * counts[:, None])
    return np.stack(found)


def subtract(value, removed):
    """What brute force puts at the site."""
    return value - removed.reshape(value.shape).astype(value.dtype)


@partial(jax.jit, static_argnames=("site",))
def brute_log_p(lm, site, tokens, targets, codes, direction):
    """log p(next token) `[rows, position]` of one feature ablated, from the tokens."""
    logits = forward(lm, tokens, edits=[Edit(site, subtract, (codes[..., None] * direction,))]).logits
    chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(targets >= 0, chosen - jax.nn.logsumexp(logits, axis=-1), 0)


def ablation(flags, lm, coder, site, rows, codes, chosen, sample) -> None:
    """`ablation_effects` of the features `chosen` against brute force for the places `sample` among them."""
    tokens, targets, mask = rows
    directions = coder.directions()

    def brute(feature: int | None):
        found = []
        for begin in range(0, len(tokens), flags.block_rows):
            part = slice(begin, begin + flags.block_rows)
            removed = codes[part, :, feature or 0] * (feature is not None)
            found.append(
                brute_log_p(lm, site, tokens[part], targets[part], jnp.array(removed), directions[feature or 0])
            )
        return np.concatenate([np.asarray(values) for values in found])

    def ours(keep: bool = False, features=chosen):
        return ablation_effects(
            lm, coder, site, tokens, targets, mask, features, keep_changes=keep, block_rows=flags.block_rows
        )

    clean, some = brute(None), ours(True, chosen[sample])
    kept = {(f, r): row for f, r, row in zip(*some.changes)}
    places = mask & (targets >= 0)
    worst = ce = largest = 0.0
    for place, feature in enumerate(chosen[sample]):
        change = brute(feature) - clean
        for row in range(len(tokens)):
            worst = np.maximum(worst, np.abs(change[row] - kept.get((feature, row), 0)).max())
        largest = np.maximum(largest, np.abs(change).max())
        by_brute = -change[places].sum(dtype=np.float64) / places.sum()
        ce = np.maximum(ce, abs(by_brute - some.ce_change[place]))
    print(f"log p changes by up to {largest:.2g}; largest difference {worst:.1e}, of a feature's CE {ce:.1e} nats")
    report("ablation", *in_turns(ours, lambda: [brute(f) for f in chosen[sample]], flags), len(chosen))


@partial(jax.jit, static_argnames=("site", "later_site"))
def brute_code(lm, site, later_site, tokens, codes, direction, places, later, number):
    """The later feature's code at the place of each row, one earlier feature ablated, from the tokens."""
    edits = [Edit(site, subtract, (codes[..., None] * direction,))]
    captured = forward(lm, tokens, capture=[later_site], edits=edits, stop=later_site.layer + 1).captured
    x = captured[str(later_site)][jnp.arange(len(places), dtype=jnp.int32), places]
    return jnp.maximum(jnp.take(later.encode(x), number, axis=1), 0)


def causal(flags, lm, coder, site, rows, codes) -> None:
    """`causes` of one neuron of the last residual stream against brute force for some earlier features."""
    tokens, mask = (part[: flags.contexts] for part in rows)
    later_site, width = Site("resid_post", lm.config.n_layers - 1), lm.config.d_model
    neurons = Neurons(n_features=width, d_in=width, d_out=width, k=width)
    identity = Normaliser(jnp.zeros(width), jnp.ones(()))
    later = Located(later_site, Normalised(neurons, neurons.fit(jnp.zeros(width)), identity))
    x = np.asarray(activations(lm, jnp.array(tokens), later_site))
    number = int(np.argmax((x > 0).mean(axis=(0, 1))))
    places = np.where(mask, x[..., number], -np.inf).argmax(axis=1).astype(np.int32)
    before = np.arange(tokens.shape[1]) <= places[:, None]
    codes = codes[: flags.contexts] * before[..., None]
    found = causes(lm, Located(site, coder), later, number, tokens, mask, places)
    sample = np.random.default_rng(1).permutation(len(found.features))[: flags.brute_features]
    directions = coder.directions()

    def brute(feature: int | None):
        removed = jnp.array(codes[..., feature or 0] * (feature is not None))
        return np.asarray(
            brute_code(
                lm, site, later_site, tokens, removed, directions[feature or 0], places, later.coder, jnp.int32(number)
            )
        )

    clean = brute(None)
    by_brute = np.stack([clean - brute(found.features[i]) for i in sample], axis=1)
    worst = np.abs(by_brute - found.drops[:, sample]).max()
    print(f"causes: {len(found.features)} features active up to the places {places.tolist()} of {len(tokens)} contexts")
    sizes = f"drops of up to {np.abs(by_brute).max():.2g} of activations of up to {found.activations.max():.2f}"
    print(f"{sizes}: largest difference {worst:.1e}")

    def ours():
        return causes(lm, Located(site, coder), later, number, tokens, mask, places)

    report("causes", *in_turns(ours, lambda: [brute(f) for f in found.features[sample]], flags), len(found.features))


def in_turns(ours, brute, flags) -> tuple[list[float], list[float]]:
    """Seconds of ours, and of brute force for one feature."""
    taken = ([], [])
    for run in (ours, brute):  # compiled
        run()
    for _ in range(flags.repeats):
        for times, run, share in zip(taken, (ours, brute), (1, flags.brute_features)):
            begin = time.perf_counter()
            run()
            times.append((time.perf_counter() - begin) / share)
    return taken


def report(name: str, ours: list[float], brute: list[float], n_features: int) -> None:
    """One line: ratio of times for all features."""
    ratio = statistics.median(b * n_features / o for o, b in zip(ours, brute))
    print(
        f"{name} of {n_features} features: ours {statistics.median(ours):.2f} s, brute force "
        f"{statistics.median(brute) * n_features:.2f} s ({statistics.median(brute):.3f} s each): {ratio:.1f} times"
    )


if __name__ == "__main__":
    command.main(Flags, main)
