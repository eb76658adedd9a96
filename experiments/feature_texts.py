"""What single texts say of a feature: which earlier tokens it needs, which earlier features cause it, and what ablating
it there does. The part that `experiments.feature` and `experiments.features` share.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from experiments.feature_panels import Measured
from experiments.features import MeasuringFlags
from experiments.reading import Subject, check_width, read_dictionary
from sparse_jax.errors import InputError
from sparse_jax.features.ablation import ablation_effects
from sparse_jax.features.causes import Located, causes, check_order, contexts_of
from sparse_jax.features.context_ablation import context_needs, need_contexts, sample_tokens
from sparse_jax.features.page import Context
from sparse_jax.features.panels import Cause, FeaturePanel
from sparse_jax.lm.model import check_site

# Tokens that take an earlier one's place with --replace.
REPLACEMENTS = 10


class Earlier(NamedTuple):
    """A dictionary of an earlier site, and the largest norm of activations there that counts."""

    located: Located
    max_norm: float


def open_earlier(flags: MeasuringFlags, subject: Subject) -> Earlier:
    """The dictionary of an earlier site, of the same model.

    Raises:
        InputError: its site is not known, not earlier, or not of this model.
    """
    coder, provenance = read_dictionary(flags.earlier)
    if not provenance.get("site"):
        raise InputError(f"the dictionary in {flags.earlier} does not say which site it was trained on")
    mine, its = subject.provenance.get("weights_sha256"), provenance.get("weights_sha256")
    if mine and its and mine != its:
        raise InputError(f"{flags.earlier} is of another model ({provenance['model']}) than {flags.dictionary}")
    site = check_site(subject.data.lm.config, provenance["site"])
    check_order(site, subject.data.site)
    check_width(coder, dataclasses.replace(subject.data, site=site), flags.earlier)
    return Earlier(Located(site, coder), provenance.get("max_norm") or float("inf"))


def with_contexts(
    flags: MeasuringFlags,
    subject: Subject,
    measured: Measured,
    panel: FeaturePanel,
    earlier: Earlier | None,
    texts: int,
) -> FeaturePanel:
    """The panel with what the feature needs in its `texts` strongest texts, and with what causes it."""
    top = measured.collected.top
    fires = top.rows[panel.index] >= 0
    if not fires.any():
        return panel
    if texts:
        rows, positions = (places[panel.index][fires][:texts] for places in (top.rows, top.positions))
        panel = dataclasses.replace(panel, needs=needs(flags, subject, panel, rows, positions))
    if earlier is None:
        return panel
    return dataclasses.replace(panel, causes=caused_by(flags, subject, measured, panel, earlier))


def changes_in_texts(
    subject: Subject, measured: Measured, feature: int, rows: np.ndarray, max_norm: float
) -> dict[tuple[int, int], np.ndarray]:
    """(feature, row) -> `[position]` change of log p of each next token on ablating it in that row."""
    data, rows = subject.data, np.unique(rows)
    tokens, targets, mask, _ = data.evaluation[rows]
    if not (mask & (targets >= 0)).any():
        return {}
    changes = ablation_effects(
        data.lm, subject.coder, data.site, tokens, targets, mask, [feature], keep_changes=True, max_norm=max_norm
    ).changes
    return {(feature, int(rows[row])): log_p for row, log_p in zip(changes.rows, changes.log_p)}


def needs(
    flags: MeasuringFlags, subject: Subject, panel: FeaturePanel, rows: np.ndarray, positions: np.ndarray
) -> tuple[Context, ...]:
    """What the activation at each of the strongest places loses without each earlier token."""
    data = subject.data
    tokens = data.evaluation[rows.astype(np.int64)].tokens
    others = None
    if flags.replace:
        sample = data.evaluation[subject.numbers[:8]]
        others = sample_tokens(sample.tokens, sample.mask, REPLACEMENTS, flags.seed)
    found = context_needs(
        data.lm, subject.coder, data.site, panel.index, tokens, positions.astype(np.int64), replace_with=others,
        start=int(data.evaluation.bos_id is not None),
    )  # fmt: skip
    return need_contexts(found, tokens, positions, data.tokenizer.token_strings)


def caused_by(
    flags: MeasuringFlags, subject: Subject, measured: Measured, panel: FeaturePanel, earlier: Earlier
) -> tuple[Cause, ...]:
    """The earlier features whose ablation lowers the activation most, where it is at least half of its largest."""
    sample, top = measured.collected.sample, measured.collected.top
    values, rows, positions = (
        np.concatenate([getattr(sample, name)[panel.index], getattr(top, name)[panel.index]])
        for name in ("values", "rows", "positions")
    )
    _, once = np.unique(np.stack([rows, positions]), axis=1, return_index=True)
    once = once[rows[once] >= 0]
    chosen = once[contexts_of(values[once], flags.cause_texts, flags.seed, maximum=panel.maximum)]
    data = subject.data
    tokens, _, mask, _ = data.evaluation[rows[chosen].astype(np.int64)]
    later, places = Located(data.site, subject.coder), positions[chosen].astype(np.int64)
    found = causes(data.lm, earlier.located, later, panel.index, tokens, mask, places, max_norm=earlier.max_norm)
    cosines = found.cosine if found.cosine is not None else [None] * len(found.features)
    return tuple(
        Cause(int(number), float(drop), None if cosine is None else float(cosine), str(earlier.located.site))
        for number, drop, cosine in list(zip(found.features, found.drop, cosines))[: flags.causes]
    )
