"""What is left when `experiments.sweep` has trained: dictionaries saved, and measured."""

import math
from collections.abc import Sequence

from jax.sharding import Mesh

from experiments import scale
from experiments.data import Data, passes
from experiments.measuring import measure_members
from experiments.sweep import Flags
from experiments.sweep_members import Choice, knob
from experiments.sweep_report import usable
from experiments.train_sae_run import FLOOR_FIGURES, provenance
from sparse_jax.activations import (
    SiteBlock,
    Statistics,
)
from sparse_jax.dictionaries import Normalised, save
from sparse_jax.metrics import fronts
from sparse_jax.training import (
    Group,
)
from sparse_jax.training.ensemble import trained


def trained_members(
    groups: Sequence[Group], states: Sequence, site: str, mesh: Mesh | None = None
) -> dict[str, Normalised]:
    """The dictionaries of a site as they are measured and saved, on one device, by their members' names."""
    return {
        member.name: scale.on_one_device(trained(each, own, i), mesh)
        for each, own in zip(groups, states)
        if each.site == site
        for i, member in enumerate(each.members)
    }


def finish(
    flags: Flags,
    by_site: dict[str, Data],
    chosen: dict[str, Choice],
    trained: dict[str, dict[str, Normalised]],
    seen: dict[str, int],
    block: SiteBlock,
    statistics: dict[str, Statistics],
) -> dict:
    """Save and measure every member; returns what goes into `metrics.json`.

    Args:
        flags, by_site, chosen, statistics: of the run.
        trained: site -> its members by name.
        seen: member -> tokens it was trained on.
        block: the first one of training.
    """
    data = next(iter(by_site.values()))
    members, floors, clean, masks = [], [], {}, {}
    for site, here in by_site.items():
        saved = trained[site]
        for name, dictionary in saved.items():
            card = provenance(here, statistics[site], seen[name], chosen[name].seed) | {"order_seed": flags.seed}
            save(flags.out / "dictionaries" / name, dictionary, card)
        measured, site_floors = measure_members(
            here,
            saved,
            statistics[site],
            block.at(site),
            eval_tokens=flags.eval_tokens,
            seed=flags.seed,
            drop=flags.drop_outliers,
        )
        for name, dictionary in saved.items():
            entry = {**member_entry(site, chosen[name], dictionary), "tokens_trained": seen[name]}
            members.append({**entry, **finite(measured.figures[name]), "unmasked": finite(measured.unmasked[name])})
        kept = ("floor", "k", *FLOOR_FIGURES)
        floors += [{"site": site, **{key: floor[key] for key in kept}} for floor in site_floors]
        clean[site] = {key: members[-1][key] for key in ("ce_clean", "ce_zero", "ce_mean")}
        masks[site] = measured.mask
    return {
        "model": flags.model,
        "revision": flags.revision,
        "text": flags.text,
        "held_out": data.evaluation.documents,
        "dictionary": flags.dictionary.kind,
        "knob": "target L0" if flags.target_l0s else knob(flags.dictionary),
        "seeds": flags.seeds,
        "tokens_trained": max(seen.values()),
        "epochs": passes(flags.tokens, data.train),
        "tokens_evaluated": members[0]["tokens_evaluated"],
        "normalise": flags.normalise,
        "mean_over_std": {site: each.mean_over_std for site, each in statistics.items()},
        "clean": clean,
        "masks": masks,
        "members": members,
        "floors": floors,
        "fronts": fronts(usable(members)),
    }


def finite(figures: dict) -> dict:
    """The figures with None for what is not finite: JSON has no such number. A member may have diverged."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def member_entry(site: str, choice: Choice, trained: Normalised) -> dict:
    """What a member is, for its figures in metrics.json and metrics.jsonl."""
    return {
        "name": choice.name,
        "site": site,
        "n_features": trained.dictionary.n_features,
        "learning_rate": choice.learning_rate,
        "sparsity": choice.sparsity,
        "seed": choice.seed,
    }
