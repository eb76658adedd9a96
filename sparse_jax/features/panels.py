"""What is known of a feature, as plain data: the page, the notebook and the plots show the same.

Every part but the first three is optional: what was not measured is not shown.

    panel = FeaturePanel(123, density=0.012, maximum=8.3, contexts=(Passage(context), ...), raised=((" the", 1.2),))

Numbers keep their unit from the field's comment; an effect is always a change on ablating the feature, so that it is
negative where the feature had raised what is measured.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from sparse_jax.errors import InputError
from sparse_jax.features.page import Context
from sparse_jax.features.sections import Section

Valued = tuple[tuple[str, float], ...]  # a token, as shown, and a number that belongs to it


@dataclass(frozen=True)
class Histogram:
    """Counts of values in bins."""

    edges: tuple[float, ...]  # ascending, one more than there are counts
    counts: tuple[int, ...]

    def __post_init__(self):
        _check_edges(self.edges, len(self.counts))

    @classmethod
    def open_ended(cls, inner: Sequence[float], counts: Sequence[int]) -> "Histogram":
        """Of bins of which the first and the last are open: they are drawn as wide as the ones beside them.

        `inner` are the edges between the bins, at least two, one fewer than there are counts.
        """
        if len(inner) < 2:
            raise InputError(f"{len(inner)} edges between open bins do not say how wide these are: give two or more")
        edges = [float(edge) for edge in inner]
        first, last = 2 * edges[0] - edges[1], 2 * edges[-1] - edges[-2]
        return cls((first, *edges, last), tuple(int(count) for count in counts))


@dataclass(frozen=True)
class TokenHistogram:
    """How often a feature fires how strongly, and on which tokens: counts in bins of activation."""

    edges: tuple[float, ...]  # ascending, one more than there are bins
    tokens: tuple[str, ...]  # the commonest, the most common first
    counts: tuple[tuple[int, ...], ...]  # [tokens][bins]
    rest: tuple[int, ...]  # [bins], firings on all other tokens

    def __post_init__(self):
        _check_edges(self.edges, len(self.rest))
        if len(self.tokens) != len(self.counts) or any(len(row) != len(self.rest) for row in self.counts):
            raise InputError(
                f"a histogram of {len(self.tokens)} tokens and {len(self.rest)} bins needs as many counts of each token"
            )


@dataclass(frozen=True)
class Passage:
    """A context and, at each of its tokens, what ablating the feature there does to the next token."""

    context: Context
    effects: tuple[
        float, ...
    ] = ()  # changes of the next token's log p, nats; negative: less likely without the feature

    def __post_init__(self):
        if self.effects and len(self.effects) != len(self.context.tokens):
            raise InputError(f"a passage of {len(self.context.tokens)} tokens has {len(self.effects)} effects")


@dataclass(frozen=True)
class Partner:
    """A feature that fires on the same tokens."""

    feature: int
    count: int  # tokens on which both fire
    cosine: float | None = None  # between their firings: both / sqrt(one x the other), 0 to 1


@dataclass(frozen=True)
class Cause:
    """An earlier feature whose ablation lowers this one."""

    feature: int
    drop: float  # of this feature's activation, in its units
    cosine: float | None = None  # between the two directions
    where: str = ""  # which dictionary, where it is another: "resid_post.2"; empty: this one, and the number is a link


@dataclass(frozen=True)
class FeaturePanel:
    """All that is shown of a feature. Parts that are None or empty are left out."""

    index: int  # its number in the dictionary
    density: float  # the share of tokens on which it fires, 0 to 1
    maximum: float  # its largest activation: full shade
    mean: float | None = None  # where it fires
    variance: float | None = None  # this and the next two over all tokens
    skew: float | None = None
    kurtosis: float | None = None
    outlier: bool = False
    explanation: str = ""
    scores: tuple[tuple[str, float | None], ...] = ()  # by name, in the order of the columns; None: not scored
    effect: float | None = None  # the one figure of the index: the increase of cross-entropy on ablating it, nats
    top_tokens: Valued = ()  # with the mean activation where it fires on each
    histogram: TokenHistogram | None = None
    contexts: tuple[Passage, ...] = ()  # grouped by label, in the order given
    # Texts of which a token's value is what the activation at the peak loses without it, below 0 where it gains; the
    # peak's is its activation. As `context_ablation.need_contexts` makes them.
    needs: tuple[Context, ...] = ()
    raised: Valued = ()  # logits of tokens that its direction raises most, directly
    lowered: Valued = ()
    ablation_raised: Valued = ()  # tokens whose log p rises most where it is ablated
    ablation_lowered: Valued = ()
    drops: Histogram | None = None  # of the next token's logit where it is ablated
    coactive: tuple[Partner, ...] = ()
    causes: tuple[Cause, ...] = ()
    tags: tuple[tuple[str, str], ...] = ()  # what it is called, by the name of the column: ("label", "AND-NOT")
    lead: tuple[Section, ...] = ()  # parts above the top tokens
    sections: tuple[Section, ...] = ()  # and below the texts

    def __post_init__(self):
        if self.index < 0:
            raise InputError(f"a feature's number is 0 or more, not {self.index}")
        names = [name for name, _ in self.scores]
        if len(set(names)) != len(names):
            raise InputError(f"feature {self.index} has several scores of one name: {', '.join(names)}")
        names = [name for name, _ in self.tags]
        if len(set(names)) != len(names):
            raise InputError(f"feature {self.index} has several tags of one name: {', '.join(names)}")

    def _repr_html_(self) -> str:
        from sparse_jax.features.panel_html import panel_html  # a notebook's display, nobody else, needs it

        return panel_html(self)


@dataclass(frozen=True)
class IndexRow:
    """A feature in the table of all."""

    index: int
    density: float
    maximum: float
    effect: float | None
    outlier: bool
    top_tokens: tuple[str, ...]
    explanation: str
    scores: tuple[tuple[str, float | None], ...]
    tags: tuple[tuple[str, str], ...] = ()


def index_row(panel: FeaturePanel, n_tokens: int = 3) -> IndexRow:
    """What the table says of a feature; it shows, and is searched by, its first `n_tokens` top tokens."""
    tokens = tuple(token for token, _ in panel.top_tokens[:n_tokens])
    return IndexRow(
        panel.index,
        panel.density,
        panel.maximum,
        panel.effect,
        panel.outlier,
        tokens,
        panel.explanation,
        panel.scores,
        panel.tags,
    )


def _check_edges(edges: tuple[float, ...], n_bins: int) -> None:
    rising = all(low < high for low, high in pairwise(edges))
    if len(edges) != n_bins + 1 or not rising or not all(math.isfinite(edge) for edge in edges):
        raise InputError(f"a histogram of {n_bins} bins needs {n_bins + 1} finite, ascending edges; got {len(edges)}")
