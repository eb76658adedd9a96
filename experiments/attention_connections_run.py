"""What `experiments.attention_connections` does with its flags, from top to bottom."""

import dataclasses
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from experiments import run_folder
from experiments.attention_connections import Flags
from experiments.attention_connections_report import Labels, maps_table, report
from experiments.connecting_fits import check_ridges, dense_fit, gradient_fit
from experiments.data import check_positive
from experiments.reading import Subject, given_of, max_norm_of, open_subject, read_dictionary
from sparse_jax.connectors.attention_check import TrioCheck, check_trios, random_places, sample_places
from sparse_jax.connectors.attention_codes import AttentionCodes, collect_attention
from sparse_jax.connectors.attention_heads import Heads, heads_of, read_by, written_by
from sparse_jax.connectors.attention_maps import TopEntries, top_ov, top_qk
from sparse_jax.connectors.attention_trios import Trios, find_trios, head_vectors
from sparse_jax.connectors.mlp_on_linear import MLPOnLinear
from sparse_jax.connectors.moments import moments
from sparse_jax.connectors.same_position import SamePosition, same_position
from sparse_jax.connectors.standardised import standardised
from sparse_jax.connectors.trio_places import Columns, Places, TrioFigures, figures_of, places_of
from sparse_jax.errors import InputError
from sparse_jax.features import write
from sparse_jax.lm.sites import Site

# Share of the documents that maps of the same position are fitted on which chooses the ridge; tokens in an MLP's step.
VALIDATION, MLP_BATCH = 0.1, 1024
WRITTEN = ("trios.json", "same_position.json", "maps.json")


@dataclasses.dataclass(frozen=True)
class HeadTrios:
    """A head's trios, and what each is like on the text."""

    trios: Trios
    figures: list[TrioFigures]
    places: list[Places]


def run(flags: Flags) -> int:
    """Run the experiment; returns the exit code."""
    started = time.perf_counter()
    check(flags)
    run_folder.check_apart(flags.out, flags.before, flags.after)
    run_folder.prepare(flags.out, overwrite=flags.overwrite)
    layer, before, after = opened(flags)
    heads = heads_of(before.data.lm, layer)
    chosen = checked_heads(flags, heads)
    check_documents(before)
    resolved = {"layer": layer, "before": before.coder.dictionary.kind, "after": after.coder.dictionary.kind}
    run_folder.begin(flags, {**resolved, **before.data.identity()}, also=WRITTEN)
    found = collected(flags, layer, before, after)
    explained = explained_by_position(flags, found)
    columns = Columns(found.before), Columns(found.after)
    trios = {head: trios_of(flags, heads, head, found, before, after, columns) for head in chosen}
    checks = checked_trios(flags, found, before, after, trios)
    maps = {head: maps_of(flags, heads, head, found, before, after) for head in chosen}
    labels = Labels(found, columns, before.data.tokenizer)
    final = figures_of_run(layer, before, after, found, explained, trios, checks)
    write_tables(flags.out, found, explained, trios, maps, checks, labels)
    write(report(flags, layer, before, found, explained, trios, checks, maps, labels), flags.out / "report.html")
    run_folder.write_json(flags.out / "metrics.json", final | {"seconds": time.perf_counter() - started})
    print_summary(final)
    print(f"report: {flags.out / 'report.html'}   trios: {flags.out / 'trios.json'}")
    return 0


def check(flags: Flags) -> None:
    """Raises InputError for flags that cannot be used, before anything is loaded."""
    check_positive(flags, "eval_tokens", "trios", "pairs", "per_pair", "sources", "checks", "slots", "mlp_width",
                   "memory_gb")  # fmt: skip
    for name in ("distance", "mlp_epochs", "seed"):
        if getattr(flags, name) < 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(flags, name)}: give 0 or more")
    check_ridges(flags.ridges)
    if not 0 < flags.held_out < 1:
        raise InputError(f"--held-out {flags.held_out}: give a share between 0 and 1")


def opened(flags: Flags) -> tuple[int, Subject, Subject]:
    """(layer, dictionary before its attention, dictionary after it), of one model and text.

    Raises:
        InputError: they are of other places than the layer's, or of two models.
    """
    sites = [read_dictionary(path)[1].get("site") for path in (flags.before, flags.after)]
    layer = flags.layer
    if layer is None:
        if sites[1] is None:
            raise InputError(f"the dictionary in {flags.after} does not say which site it was trained on: give --layer")
        layer = Site.parse(sites[1]).layer
    allowed = (f"resid_pre.{layer}", f"resid_post.{layer - 1}"), (f"attn_out.{layer}",)
    for path, site, places in zip((flags.before, flags.after), sites, allowed):
        if site is not None and site not in places:
            raise InputError(
                f"the dictionary in {path} is of {site}; around the attention of layer {layer} give one of "
                f"{' or '.join(places)}"
            )
    given = given_of(flags, "model", "revision", "text", "eval_text")
    before = open_subject(flags.before, given | {"site": f"resid_pre.{layer}"}, eval_tokens=flags.eval_tokens)
    after = open_subject(flags.after, given | {"site": f"attn_out.{layer}"}, eval_tokens=flags.eval_tokens, like=before)
    names = [(each.data.flags.model, each.data.flags.revision) for each in (before, after)]
    if names[0] != names[1]:
        raise InputError(f"the dictionaries are of two models, {names[0][0]} and {names[1][0]}: give two of one")
    return layer, before, after


def checked_heads(flags: Flags, heads: Heads) -> tuple[int, ...]:
    """The heads that are read; raises InputError for what is not there, and for logits that are not bilinear."""
    heads.check_logits()
    chosen = tuple(dict.fromkeys(flags.heads)) or tuple(range(heads.n_heads))
    for head in chosen:
        heads.check_head(head)
    return chosen


def check_documents(subject: Subject) -> None:
    """Raises InputError for a text of one document, of which no share can be held out."""
    _, _, mask, document = subject.data.evaluation[subject.numbers]
    if len(np.unique(document[mask])) < 2:
        raise InputError("the text that is read has fewer than two documents: raise --eval-tokens")


def collected(flags: Flags, layer: int, before: Subject, after: Subject) -> AttentionCodes:
    """Codes and attention, in one pass."""
    from tqdm import tqdm

    data, norms = before.data, (max_norm_of(None, before), max_norm_of(None, after))
    total = before.numbers.size * data.evaluation.context
    with tqdm(total=total, desc="codes and attention", unit="token", unit_scale=True, mininterval=0.5) as bar:
        return collect_attention(data.lm, layer, data.evaluation, before.numbers, before.coder, after.coder,
                                 sources=flags.sources, slots=flags.slots, max_norms=norms,
                                 progress=bar.update)  # fmt: skip


def explained_by_position(flags: Flags, found: AttentionCodes) -> SamePosition:
    """R^2 of each feature of attn_out from the features of the same position."""
    train, held_out = found.pair().split(flags.held_out, flags.seed)
    fit, validation = train.split(VALIDATION, flags.seed)
    problem = standardised(moments(fit, blocks=1, dtype=np.float64))
    dense = dense_fit(problem, validation, flags.ridges)
    maps = {"linear": dense.trained}
    if flags.mlp_epochs:
        (maps["MLP"],) = gradient_fit(
            MLPOnLinear(n_features=flags.mlp_width), fit, flags.mlp_epochs * len(fit), MLP_BATCH, (flags.seed,),
            lambda row: None, linear=(dense.trained,),
        )  # fmt: skip
    return same_position(held_out, maps, problem.target_mean)


def trios_of(flags, heads: Heads, head: int, found, before: Subject, after: Subject, columns) -> HeadTrios:
    """A head's strongest trios."""
    began = time.perf_counter()
    trios = find_trios(heads, head, found, before.coder, after.coder, count=flags.trios, pairs=flags.pairs,
                       per_pair=flags.per_pair, limit_bytes=int(flags.memory_gb * 1e9))  # fmt: skip
    places = places_of(heads, head_vectors(heads, head, before.coder, after.coder), found, trios, columns)
    seconds = time.perf_counter() - began
    print(f"head {head}: {len(trios)} trios, {trios.certain} certainly the strongest, {seconds:.1f} s", flush=True)
    return HeadTrios(trios, [figures_of(found, each) for each in places], places)


def checked_trios(flags, found, before: Subject, after: Subject, trios: dict[int, HeadTrios]) -> dict[str, TrioCheck]:
    """The strongest trios and random ones, by intervention."""
    every = [places for each in trios.values() for places in each.places]
    chosen = {
        "strongest": sample_places(every, flags.checks, flags.seed),
        "random": random_places(found, flags.checks, flags.seed, tuple(trios)),
    }
    data = before.data
    return {
        name: check_trios(data.lm, data.evaluation, found, before.coder, after.coder, places)
        for name, places in chosen.items()
    }


def maps_of(flags, heads: Heads, head: int, found, before: Subject, after: Subject) -> dict[str, TopEntries]:
    """The largest entries of a head's QK and OV maps: of features where they fire, at the mean scale of the norm."""
    usual = [jnp.array(where_firing(side), jnp.float32) for side in (found.before, found.after)]
    scaled = usual[0] * jnp.float32(found.scale.mean())
    relative = jnp.where(usual[1] > 0, 1 / jnp.where(usual[1] > 0, usual[1], 1), 0)
    directions, (readers, _) = written_by(before.coder)[0], read_by(after.coder)
    return {
        "qk": top_qk(heads, head, flags.distance, directions, directions, flags.trios, query_weight=scaled,
                     key_weight=scaled),
        "ov": top_ov(heads, head, directions, readers, flags.trios, source_weight=scaled, output_weight=relative),
    }  # fmt: skip


def where_firing(side) -> np.ndarray:
    """`[n_features]` the mean code of each where it fires; 0 for those that never do."""
    fires = side.values > 0
    count = np.bincount(side.indices[fires], minlength=side.n_features)
    return np.bincount(side.indices[fires], side.values[fires], side.n_features) / np.maximum(count, 1)


def figures_of_run(layer, before, after, found, explained, trios, checks) -> dict:
    """`metrics.json`."""
    return {
        "model": before.data.flags.model,
        "layer": layer,
        "before": str(before.path),
        "after": str(after.path),
        "tokens": len(found),
        "overflow": {"before": found.before.overflow, "after": found.after.overflow},
        "same_position": explained.summary(),
        "heads": {
            str(head): {
                "own": float(found.own[head]),
                "uncounted": float(found.uncounted[head]),
                "kept": float(found.kept[head]),
                "trios": len(each.trios),
                "certain": each.trios.certain,
                "bound": each.trios.bound,
                "strongest": float(np.abs(each.trios.strength).max(initial=0)),
            }
            for head, each in trios.items()
        },
        "checks": {
            name: {what: finite(dataclasses.asdict(each)) for what, each in made.agreements().items()}
            for name, made in checks.items()
        },
    }


def finite(values: dict) -> dict:
    """JSON has no nan."""
    return {name: None if isinstance(v, float) and not np.isfinite(v) else v for name, v in values.items()}


def write_tables(out: Path, found, explained, trios, maps, checks, labels: Labels) -> None:
    """The JSON files beside the report."""
    listed = []
    for head, each in trios.items():
        for k, figures in enumerate(each.figures):
            features = (int(each.trios.query[k]), int(each.trios.key[k]), int(each.trios.output[k]))
            sides = zip(("query", "key", "output"), features, (0, 0, 1))
            tokens = {f"{name}_tokens": labels.tokens(side, feature) for name, feature, side in sides}
            listed.append({"head": head, **dict(zip(("query", "key", "output"), features)),
                           **dataclasses.asdict(figures), **tokens})  # fmt: skip
    run_folder.write_json(out / "trios.json", listed)
    r2 = {name: [None if np.isnan(v) else float(v) for v in values] for name, values in explained.r2.items()}
    run_folder.write_json(
        out / "same_position.json",
        {"r2": r2, "variance": explained.variance.tolist(), "fired": explained.fired.tolist()},
    )
    run_folder.write_json(out / "maps.json", {str(head): maps_table(each) for head, each in maps.items()})


def print_summary(final: dict) -> None:
    """The figures in a few lines."""
    print(f"\n{'same position':>16} {'targets':>8} {'pooled R2':>10} {'median':>8} {'> 0.5':>7}")
    for name, each in final["same_position"].items():
        if each["targets"]:
            print(f"{name:>16} {each['targets']:8} {each['pooled']:10.3f} {each['q50']:8.3f} {each['above 0.5']:7.3f}")
    print(f"\n{'check':>10} {'':>30} {'correlation':>12} {'slope':>8}")
    for name, made in final["checks"].items():
        for what, each in made.items():
            shown = ("–" if each[key] is None else f"{each[key]:.3f}" for key in ("correlation", "slope"))
            print("{:>10} {:>30} {:>12} {:>8}".format(name, what, *shown))
