"""What is known of features, measured: the part that `experiments.features` and `experiments.feature` share."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from experiments.feature_measures_run import split_rows
from experiments.reading import Subject
from sparse_jax.activations.blocks import activations
from sparse_jax.features.ablation import AblationEffects, ablation_effects, mean_logit_change
from sparse_jax.features.collect import collect, delimiter_tokens
from sparse_jax.features.collected import Collected
from sparse_jax.features.collected_panels import collected_panels
from sparse_jax.features.logit_effect import direct_logit_effect, mean_denominator, most_raised_and_lowered
from sparse_jax.features.panels import FeaturePanel, Histogram
from sparse_jax.features.rules import Rules, find_rules
from sparse_jax.features.token_table import read_tables
from sparse_jax.lm.model import check_site
from sparse_jax.lm.sites import Site

# Sites whose directions reach the logits by the residual stream alone.
WITH_DIRECT_EFFECT = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_hidden", "attn_z")
# Features whose effects on the whole vocabulary are in memory at a time.
BLOCK = 256
# Places of each feature that are kept at the least as its strongest, and that are drawn from all its firings; the
# latter of all features together, where a dictionary is wide.
TOP, SAMPLE, SAMPLED = 20, 256, 1 << 23
# Firings whose tables are made at once: some 90 bytes each.
FIRINGS_AT_ONCE = 16e6
# Rows of text from which the final norm's mean denominator is read.
DENOMINATOR_ROWS = 8
SCORES = (
    ("rule F1", "of the best simple rule about the token or the one before it, on text it was not found on"),
    ("rule corr.", "correlation of that rule with the activation, on the same text"),
)


@dataclass(frozen=True)
class Measured:
    """What was measured of a dictionary's features.

    Attributes:
        collected: of every feature.
        features: `[n]` those that the rest is of.
        rules: theirs, in this order; None where too few rows were read.
        effects: of ablating them; None: not measured.
        strings: how each token of the vocabulary is written.
        denominator: the final norm's, over sample tokens; None where directions do not reach the stream.
    """

    collected: Collected
    features: np.ndarray
    rules: Rules | None
    effects: AblationEffects | None
    strings: list[str]
    denominator: float | None


def measure(
    subject: Subject,
    features: np.ndarray | None,
    *,
    max_norm: float,
    effect_tokens: int,
    rule_tokens: int,
    seed: int,
    top: int = 0,
    memory_gb: float = 8.0,
) -> Measured:
    """Measure on held-out text, telling what is being done.

    Args:
        subject: dictionary, model and text.
        features: which are measured further; None: all that fire.
        max_norm: places where the activation is larger do not count.
        effect_tokens: tokens of the rows on which features are ablated, at most; 0: none are.
        rule_tokens: tokens of the rows on which rules are found and scored, at most; 0: none are.
        seed: decides samples.
        top: strongest places that will be asked for.
        memory_gb: that collecting may need.
    """
    from tqdm import tqdm

    data, numbers = subject.data, subject.numbers
    strings = data.tokenizer.token_strings(np.arange(data.lm.config.vocab_size))
    sigma = denominator(subject)
    with tqdm(total=len(numbers) * data.evaluation.context, desc="collecting", unit="token", unit_scale=True) as bar:
        collected = collect(
            data.lm, data.site, data.evaluation, numbers, subject.coder, max_norm=max_norm, seed=seed,
            delimiters=delimiter_tokens(strings), progress=bar.update, top=max(TOP, top),
            limit_bytes=int(memory_gb * 1e9),
            sample=max(SAMPLE // 8, min(SAMPLE, SAMPLED // subject.coder.dictionary.n_features)),
        )  # fmt: skip
    if features is None:
        features = np.flatnonzero(collected.fired > 0)
    rules = effects = None
    if rule_tokens and len(features) and len(some := first_rows(subject, rule_tokens)) > 1:
        print(f"rules for {len(features):,} features on {len(some) * data.evaluation.context:,} tokens", flush=True)
        rules = best_rules(subject, features, collected.fired[features], some, strings, max_norm)
    if effect_tokens and len(features):
        some = first_rows(subject, effect_tokens)
        print(f"ablating {len(features):,} features on {len(some) * data.evaluation.context:,} tokens", flush=True)
        tokens, targets, mask, _ = data.evaluation[some]
        effects = ablation_effects(
            data.lm, subject.coder, data.site, tokens, targets, mask, features, max_norm=max_norm
        )
    return Measured(collected, np.asarray(features), rules, effects, strings, sigma)


def first_rows(subject: Subject, tokens: int) -> np.ndarray:
    """The first of the rows that are read, with at most so many tokens, one row at the least."""
    return subject.numbers[: max(1, tokens // subject.data.evaluation.context)]


def best_rules(
    subject: Subject, features: np.ndarray, fired: np.ndarray, rows: np.ndarray, strings: list[str], max_norm: float
) -> Rules:
    """The best rule of each, found on one half of the rows and scored on the other.

    Features that together fire more often than memory allows take a pass over the text for each part of them.
    """
    data, made = subject.data, []
    for part in parts_of(features, fired * (len(rows) / len(subject.numbers))):
        found, scored = (
            read_tables(data.lm, subject.coder, data.site, data.evaluation, half, part, len(strings), max_norm=max_norm)
            for half in split_rows(rows)
        )
        made.append(find_rules(found, scored, strings))
    return Rules.joined(made)


def parts_of(features: np.ndarray, firings: np.ndarray) -> list[np.ndarray]:
    """The features in their order, in parts that have FIRINGS_AT_ONCE firings at most, or a single feature."""
    parts, total = [[]], 0.0
    for feature, count in zip(features.tolist(), firings.tolist()):
        if parts[-1] and total + count > FIRINGS_AT_ONCE:
            parts.append([])
            total = 0.0
        parts[-1].append(feature)
        total += count
    return [np.array(part, np.int64) for part in parts]


def denominator(subject: Subject) -> float | None:
    """The final norm's mean denominator on the first rows; None where directions do not reach the stream."""
    data = subject.data
    if data.site.name not in WITH_DIRECT_EFFECT:
        return None
    last = check_site(data.lm.config, Site("resid_post", data.lm.config.n_layers - 1))
    tokens, _, mask, _ = data.evaluation[subject.numbers[:DENOMINATOR_ROWS]]
    return mean_denominator(data.lm, activations(data.lm, tokens, last), mask)


def panels(subject: Subject, measured: Measured, *, tokens: int = 8, **shown) -> Iterator[FeaturePanel]:
    """The panels of the features that were measured, in their order.

    Args:
        subject: dictionary, model and text.
        measured: from `measure`.
        tokens: raised and lowered tokens, and top tokens.
        shown: as for `collected_panels`.
    """
    data, of = subject.data, measured.features
    plain = collected_panels(
        measured.collected, data.lm, data.site, data.evaluation, subject.coder, data.tokenizer.token_strings, of,
        tokens=tokens, **shown,
    )  # fmt: skip
    for begin in range(0, len(of), BLOCK):
        block = slice(begin, begin + BLOCK)
        parts = [direct_parts(subject, measured, block, tokens), ablation_parts(subject, measured, block, tokens)]
        for i in range(begin, min(begin + BLOCK, len(of))):
            more = {name: values[i - begin] for part in parts for name, values in part.items()}
            yield dataclasses.replace(next(plain), **more, **rule_parts(measured, i))


def direct_parts(subject: Subject, measured: Measured, block: slice, count: int) -> dict[str, list]:
    """Tokens that the directions of a block of features raise and lower by themselves."""
    if measured.denominator is None:
        return {}
    data = subject.data
    effects = direct_logit_effect(data.lm, subject.coder, measured.features[block], data.site, measured.denominator)
    known = measured.strings[: data.tokenizer.vocab_size]  # a padded vocabulary has ids that stand for nothing
    return valued(known, np.asarray(effects), count, "raised", "lowered")


def ablation_parts(subject: Subject, measured: Measured, block: slice, count: int) -> dict[str, list]:
    """What ablating a block of features did."""
    effects = measured.effects
    if effects is None:
        return {}
    change = mean_logit_change(subject.data.lm, effects, block, log_p=True)
    known = measured.strings[: subject.data.tokenizer.vocab_size]
    parts = valued(known, change, count, "ablation_raised", "ablation_lowered")
    scored = effects.scored[block] > 0
    parts = {name: [each if on else () for each, on in zip(values, scored)] for name, values in parts.items()}
    parts["effect"] = [float(rise) if on else None for rise, on in zip(effects.ce_change[block], scored)]
    parts["drops"] = [
        Histogram.open_ended(effects.edges, counts) if on else None for counts, on in zip(effects.drops[block], scored)
    ]
    return parts


def valued(strings: list[str], effects: np.ndarray, count: int, up: str, down: str) -> dict[str, list]:
    """The tokens with the largest and the smallest effects `[n, vocab]` of each feature, of the first ids, as text."""
    effects = effects[:, : len(strings)]
    found = most_raised_and_lowered(effects, min(count, effects.shape[1]))

    def shown(ids, by):
        return [tuple((strings[i], float(v)) for i, v in zip(*each)) for each in zip(ids, by)]

    return {up: shown(found.raised, found.raised_by), down: shown(found.lowered, found.lowered_by)}


def rule_parts(measured: Measured, i: int) -> dict:
    """The best rule of a feature, named as what it is, and how well it does."""
    if measured.rules is None or (rule := measured.rules.words(i, measured.strings)) == "no rule":
        return {}
    scores = measured.rules.scores
    named = zip(SCORES, (scores.f1[i], scores.correlation[i]))
    return {
        "explanation": f"rule: {rule}",
        "scores": tuple((name, float(value) if np.isfinite(value) else None) for (name, _), value in named),
    }
