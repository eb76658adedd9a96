"""What `experiments.feature` does with its flags, from top to bottom."""

import dataclasses
from typing import NamedTuple

import numpy as np

from experiments import run_folder
from experiments.data import check_positive
from experiments.feature import Flags
from experiments.feature_panels import SCORES, Measured, measure, panels
from experiments.features_run import PAGES, check, opened, resolved
from experiments.reading import Subject, check_features, check_width, max_norm_of, read_dictionary
from sparse_jax.errors import InputError
from sparse_jax.features.ablation import ablation_effects
from sparse_jax.features.causes import Located, causes, check_order, contexts_of
from sparse_jax.features.collected_panels import choose_places
from sparse_jax.features.context_ablation import context_needs, need_contexts, sample_tokens
from sparse_jax.features.index_page import write_pages
from sparse_jax.features.page import Context
from sparse_jax.features.panels import Cause, FeaturePanel
from sparse_jax.lm.model import check_site

# Tokens of each printed text, up to the place and behind it.
BEFORE, AFTER = 14, 6
# Tokens that take an earlier one's place with --replace.
REPLACEMENTS = 10
# Needed tokens that are printed of a text: those without which at least this share of the activation is lost.
NEEDED, NEEDED_SHARE = 3, 0.15


def run(flags: Flags) -> int:
    """Run the experiment; returns the exit code."""
    check(flags)
    check_positive(flags, "texts", "causes", "cause_texts", "tokens_shown")
    if not flags.features or len(set(flags.features)) < len(flags.features):
        raise InputError("give the number of a feature, or several that differ: ... runs/demo 123")
    subject = opened(flags)
    check_features(subject.coder, flags.features)
    earlier = None if flags.earlier is None else open_earlier(flags, subject)
    run_folder.begin(flags, resolved(subject))
    max_norm = max_norm_of(flags.max_norm, subject)
    features = np.array(flags.features, np.int64)
    measured = measure(
        subject, features, max_norm=max_norm, effect_tokens=flags.effect_tokens, rule_tokens=flags.rule_tokens,
        seed=flags.seed, top=flags.texts,
    )  # fmt: skip
    top, changes = max(flags.texts, 6), {}
    for number in flags.features:
        rows = choose_places(measured.collected, features[features == number], top=top).rows
        if len(rows):
            changes |= changes_in_texts(subject, measured, number, rows, max_norm)
    plain = panels(
        subject, measured, tokens=flags.tokens_shown, top=top, before=BEFORE, after=AFTER,
        changes_at=lambda feature, row: changes.get((feature, row)),
    )  # fmt: skip
    made = [with_contexts(flags, subject, measured, panel, earlier) for panel in plain]
    page = write_pages(
        flags.out / PAGES,
        f"{subject.coder.dictionary.kind} dictionary of {subject.data.site}",
        made,
        subtitle=f"{subject.data.flags.model}, features {', '.join(map(str, flags.features))}",
        score_hints=SCORES,
    )
    run_folder.write_json(flags.out / "metrics.json", {"features": [dataclasses.asdict(panel) for panel in made]})
    for panel in made:
        print_panel(flags, subject, measured, panel)
    print(f"\npage: {page}")
    return 0


class Earlier(NamedTuple):
    """A dictionary of an earlier site, and the largest norm of activations there that counts."""

    located: Located
    max_norm: float


def open_earlier(flags: Flags, subject: Subject) -> Earlier:
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
    flags: Flags, subject: Subject, measured: Measured, panel: FeaturePanel, earlier: Earlier | None
) -> FeaturePanel:
    """The panel with what single texts say: what the feature needs, what causes it."""
    fires = measured.collected.top.rows[panel.index] >= 0
    if not fires.any():
        return panel
    top = measured.collected.top
    rows, positions = (places[panel.index][fires][: flags.texts] for places in (top.rows, top.positions))
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
    flags: Flags, subject: Subject, panel: FeaturePanel, rows: np.ndarray, positions: np.ndarray
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
    flags: Flags, subject: Subject, measured: Measured, panel: FeaturePanel, earlier: Earlier
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


def print_panel(flags: Flags, subject: Subject, measured: Measured, panel: FeaturePanel) -> None:
    """All of it, in some ten lines and the texts."""
    print(f"\nfeature {panel.index} of the {subject.coder.dictionary.kind} dictionary of {subject.data.site}")
    if not measured.collected.fired[panel.index]:
        print(f"  never fires on {measured.collected.tokens:,} tokens")
        return
    print(
        f"  fires on {100 * panel.density:.3f} % of {measured.collected.tokens:,} tokens, at most {panel.maximum:.2f}, "
        f"mean {panel.mean:.2f}{'; an outlier feature: of first tokens' * panel.outlier}"
    )
    said("on", panel.top_tokens)
    if panel.explanation:
        scores = ", ".join(f"{name} {value:.2f}" for name, value in panel.scores if value is not None)
        print(f"  {panel.explanation} ({scores})")
    said("its direction raises", panel.raised)
    said("and lowers", panel.lowered)
    if panel.effect is not None:
        print(f"  ablating it changes the cross-entropy by {panel.effect:+.6f} nats a token")
        said("without it less likely", panel.ablation_lowered)
        said("and more likely", panel.ablation_raised)
    if panel.coactive:
        print(f"  fires with {', '.join(f'{other.feature} ({other.count})' for other in panel.coactive)}")
    for cause in panel.causes:
        beside = "" if cause.cosine is None else f", cosine {cause.cosine:+.2f}"
        print(f"  caused by {cause.where} feature {cause.feature}: {cause.drop:+.2f} of its activation{beside}")
    for passage, need in zip([each for each in panel.contexts if each.context.label == "top"], panel.needs):
        print(f"  {line_of(passage.context)}   {needed(need)}")


def said(words: str, tokens: tuple[tuple[str, float], ...]) -> None:
    """Tokens with their figures, if there are any."""
    if tokens:
        print(f"  {words} {', '.join(f'{token!r} {value:.2f}' for token, value in tokens)}")


def line_of(context: Context) -> str:
    """A text on one line, the token at which the feature fires marked."""
    tokens, peak = context.tokens, context.peak
    text = "".join([*tokens[:peak], f"[[{tokens[peak]}]]", *tokens[peak + 1 :]])
    return f"{context.activations[peak]:6.2f}  " + "".join(sign if sign.isprintable() else "↵" for sign in text)


def needed(context: Context) -> str:
    """The earlier tokens without which most is lost."""
    activation, losses = context.activations[context.peak], np.array(context.activations[: context.peak])
    order = np.argsort(-losses, kind="stable")[:NEEDED]
    found = [f"{context.tokens[i]!r} {losses[i]:+.1f}" for i in order if losses[i] >= NEEDED_SHARE * activation]
    return f"needs {', '.join(found)}" if found else "needs no single earlier token"
