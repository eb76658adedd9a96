"""How few tokens a feature is about: entropy of tokens given that it fires, and the share of the commonest token.

    H = - sum over tokens of p log p, nats, p the share of the feature's firings that stand on the token

of the token itself, and of the token before it (the nearest context). Over n firings H is at most log n, so features
that fire more often look broader: beside the entropy of all firings stands that of equally many, drawn at random, for
every feature. Comparisons between dictionaries should use the latter.

The share of the commonest token is taken among activations evenly spaced over the feature's range, not among all, most
of which are weak, nor among the strongest alone. Example: firings (1.0 a), (0.9 b), (0.2 a), (0.1 a), two levels: the
midpoints of the halves of 0 to 1 are 0.75 and 0.25; the nearest firings are 0.9 (b) and 0.2 (a): the share is 0.5.
"""

import numpy as np
from jaxtyping import Float64

from sparse_jax.features.token_table import FiringList, TokenTable


def entropies(table: TokenTable, n_features: int) -> Float64[np.ndarray, " features"]:
    """Entropy in nats of the table's tokens given that each feature fires; nan for one that never does."""
    total = np.bincount(table.features, table.counts, n_features)
    share = table.counts / total[table.features]
    found = np.bincount(table.features, -share * np.log(share), n_features)
    return np.where(total > 0, np.maximum(found, 0), np.nan)


def base_entropy(table: TokenTable) -> float:
    """Entropy in nats of the tokens at all places that count: what a feature that fires anywhere has."""
    share = table.totals[table.totals > 0] / table.totals.sum()
    return float(-(share * np.log(share)).sum())


def entropies_of_draws(
    firings: FiringList, n_features: int, draws: int, seed: int = 0
) -> tuple[Float64[np.ndarray, " features"], Float64[np.ndarray, " features"]]:
    """(entropy of the token, of the token before) over `draws` firings of each feature, drawn without replacement.

    nan for features that fire less often.
    """
    found, generator = np.full((2, n_features), np.nan), np.random.default_rng(seed)
    for feature, at in _by_feature(firings, n_features):
        if len(at) >= draws:
            drawn = generator.permutation(at)[:draws]
            for i, ids in enumerate((firings.here, firings.before)):
                _, counts = np.unique(ids[drawn], return_counts=True)
                found[i, feature] = -(counts / draws * np.log(counts / draws)).sum()
    return np.maximum(found[0], 0), np.maximum(found[1], 0)


def commonest_shares(firings: FiringList, n_features: int, levels: int = 20) -> Float64[np.ndarray, " features"]:
    """Share of the commonest token among activations evenly spaced over each feature's range.

    The range from 0 to the maximum is cut into `levels` equal parts. From the highest down, each part's midpoint takes
    the firing of nearest activation that is not taken yet (of equally near ones the first in the text).
    nan for features that fire less often than `levels`.
    """
    found = np.full(n_features, np.nan)
    for feature, at in _by_feature(firings, n_features):
        if len(at) < levels:
            continue
        taken = evenly_spaced(firings.value[at], levels)
        _, counts = np.unique(firings.here[at[taken]], return_counts=True)
        found[feature] = counts.max() / levels
    return found


def evenly_spaced(values: np.ndarray, levels: int) -> np.ndarray:
    """`[levels]` which of `values [n]`, all above 0 and n >= levels, stand for the levels, highest level first."""
    order = np.argsort(values, kind="stable")
    ascending = values[order].astype(np.float64)
    free, taken = np.ones(len(order), bool), []
    for level in ascending[-1] * (np.arange(levels)[::-1] + 0.5) / levels:
        middle = int(np.searchsorted(ascending, level))
        # The nearest free ones on either side; few have been taken, all of them near higher levels.
        low, high = middle - 1, middle
        while low >= 0 and not free[low]:
            low -= 1
        while high < len(order) and not free[high]:
            high += 1
        if low >= 0:
            low = int(np.searchsorted(ascending, ascending[low]))  # of equal ones the first in the text
            while not free[low]:
                low += 1
        below = level - ascending[low] if low >= 0 else np.inf
        above = ascending[high] - level if high < len(order) else np.inf
        chosen = low if below < above or (below == above and order[low] < order[high]) else high
        free[chosen] = False
        taken.append(order[chosen])
    return np.array(taken)


def _by_feature(firings: FiringList, n_features: int):
    """(feature, which firings are its own, in the order of the text)."""
    order = np.argsort(firings.feature, kind="stable")
    edges = np.searchsorted(firings.feature[order], np.arange(n_features + 1))
    for feature in range(n_features):
        yield feature, order[edges[feature] : edges[feature + 1]]
