"""What `experiments.sparse_connections` does with its flags, from top to bottom."""

import dataclasses
from dataclasses import dataclass

import numpy as np

from experiments import run_folder
from experiments.connecting import Ends, Opened, check, feature_count
from experiments.connecting_codes import Codes, Sides
from experiments.connecting_fits import MLPS, Dense, check_ridges, dense_fit, gradient_fit
from experiments.connecting_layers import Stages, layer_folder, plain, rows_of, run_layers
from experiments.data import check_positive
from experiments.sparse_connections import Flags
from experiments.sparse_connections_checks import (
    causal_figures_of,
    check_encoders,
    check_jacobians,
    mean_jacobian_of,
    spliced_figures_of,
    weights_figures,
)
from experiments.sparse_connections_pages import write_pages_of
from experiments.sparse_connections_report import print_summary, write_report
from sparse_jax.connectors.block_errors import BlockErrors, block_errors, moment_errors
from sparse_jax.connectors.code_columns import code_columns
from sparse_jax.connectors.connection import Connection, connections
from sparse_jax.connectors.connector import Trained
from sparse_jax.connectors.connector_files import save_connector
from sparse_jax.connectors.fronts import Front, front, median_nonzeros, nonzeros_at_share
from sparse_jax.connectors.labels import AND, AND_NOT, NO_INPUTS, OR, WEIGHTED_SUM, label_targets
from sparse_jax.connectors.linear_path import LinearMaps, LinearPath, default_alphas, linear_path
from sparse_jax.connectors.linear_refit import refit_linear
from sparse_jax.connectors.moments import moments
from sparse_jax.connectors.standardised import Standardised, standardised
from sparse_jax.connectors.strongest_inputs import strongest_inputs
from sparse_jax.errors import InputError
from sparse_jax.training import JsonLines

EXPERIMENT = "sparse_connections"
LABELS = (OR, AND, AND_NOT, WEIGHTED_SUM, NO_INPUTS)
# Points of the path of a sample.
SAMPLE_POINTS = 14
# What a point of the path is called among what is spliced.
PATH = "path "
# And connectors with as many inputs, which the mean Jacobian chose.
JACOBIAN = "jacobian "
# Terms of a formula in targets.json.
_TERMS = 10


@dataclass(frozen=True)
class Fits:
    """Connectors of one layer.

    Attributes:
        problem: what the linear ones solve.
        path, refits: along the path, with shrinkage and without.
        chosen: which point of the path the sparse connector is.
        elbow: which the chord rule chose on the validation documents; None: --alpha was given.
        sparse, mlp: connectors.
        dense: least squares on all inputs.
    """

    problem: Standardised
    path: LinearPath
    refits: LinearMaps
    chosen: int
    elbow: int | None
    sparse: Trained
    dense: Dense
    mlp: Trained

    @property
    def connectors(self) -> dict[str, Trained]:
        """By name."""
        return {"dense": self.dense.trained, "sparse": self.sparse, "mlp": self.mlp}


def run(flags: Flags) -> int:
    """Run the experiment; returns the exit code."""
    check_flags(flags)
    return run_layers(
        flags, EXPERIMENT, measure_layer, write_report, print_summary,
        suits=lambda opened: check_opened(flags, opened),
    )  # fmt: skip


def check_opened(flags: Flags, opened: Opened) -> None:
    """Raises InputError where what is asked for cannot be had of these dictionaries."""
    if flags.jacobian_support:
        check_jacobians(opened)
    if flags.checks or flags.weights or flags.jacobian_support:
        check_encoders(opened)


def check_flags(flags: Flags) -> None:
    """Raises InputError for flags that cannot be used, before anything is loaded."""
    check(flags)
    check_ridges(flags.ridges)
    check_positive(flags, "alphas", "mlp_width", "mlp_batch", "jacobian_tokens")
    if not 0 < flags.smallest < 1:
        raise InputError(f"--smallest {flags.smallest}: give a share between 0 and 1")
    if not 0 < flags.sample_smallest < 1:
        raise InputError(f"--sample-smallest {flags.sample_smallest}: give a share between 0 and 1")
    for name in ("sample", "mlp_tokens", "splice_tokens", "splice_points", "checks", "pages"):
        if getattr(flags, name) < 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(flags, name)}: give 0 or more")
    if flags.jacobian_support and not (flags.splice_tokens and flags.splice_points):
        raise InputError("--jacobian-support is of what is spliced: give --splice-tokens and --splice-points above 0")
    if flags.alpha is not None and not flags.alpha > 0:
        raise InputError(f"--alpha {flags.alpha}: give a positive penalty")
    if max(len(flags.alphas), 0 if flags.alphas else flags.points) < 3 and flags.alpha is None:
        raise InputError("an elbow needs a path of three points: give more --points or --alphas, or --alpha")
    if not flags.alphas and flags.points < 1:
        raise InputError(f"--points {flags.points}: give 1 or more")


def measure_layer(flags: Flags, opened: Opened, ends: Ends, codes: Codes) -> dict:
    """All of one connection: fits it, measures it, writes its tables, connectors and pages; returns its figures."""
    stage, folder, sides = Stages(ends.name), layer_folder(flags.out, ends), codes.sides(ends, flags)
    print(f"{ends.name}: {len(sides.fit):,} tokens to fit on, {len(sides.validation):,} to choose on, "
          f"{len(sides.held_out):,} held out", flush=True)  # fmt: skip
    fits = fitted(flags, ends, sides, stage)
    with stage("R2 on held-out text"):
        lasso, refits = (block_errors(sides.held_out, maps) for maps in (fits.path, fits.refits))
        beside = block_errors(sides.held_out, [fits.dense.trained, fits.mlp])
    with stage("front"):
        figures, fronts = front_figures(fits, lasso, refits, beside)
    if flags.sample:
        with stage("path of a sample"):
            figures["nonzeros_at_90"] = needed_by_sample(flags, sides, fits.problem, part(beside, 0))
    with stage("formulas and labels"):
        made, table, counts = formulas(opened, ends, sides, fits, refits, beside)
    figures |= {"name": ends.name, "inputs": ends.inputs, "target": ends.target, "tokens": tokens_of(sides)}
    figures |= {"labels": counts}
    if flags.splice_tokens:
        with stage("spliced"):
            figures["spliced"] = spliced(flags, opened, ends, sides, fits, beside.alive(), codes.numbers)
    if flags.checks:
        with stage("causal check"):
            figures["causal"] = causal_figures_of(flags, opened, ends, sides, fits.sparse, fits.problem)
    if flags.weights:
        with stage("other weights"):
            figures["weights"] = weights_figures(opened, ends, sides, fits.sparse)
    if flags.pages:
        with stage("pages"):
            write_pages_of(flags, opened, ends, sides, made, table, folder / "pages")
    for name, connector in fits.connectors.items():
        facts = {**opened.data.identity(), "site": None, "inputs": ends.inputs, "target": ends.target}
        save_connector(folder / "connectors" / name, connector, facts | {"tokens": len(sides.fit), "seed": flags.seed})
    run_folder.write_json(folder / "front.json", fronts)
    run_folder.write_json(folder / "targets.json", rows_of(table))
    return plain(figures | {"seconds": stage.seconds})


def tokens_of(sides: Sides) -> dict:
    """How many tokens each side has."""
    return {"fit": len(sides.fit), "validation": len(sides.validation), "held_out": len(sides.held_out)}


def fitted(flags: Flags, ends: Ends, sides: Sides, stage: Stages) -> Fits:
    """All connectors of a layer, from the training text alone."""
    with stage("moments"):
        problem = standardised(moments(sides.fit, blocks=1, dtype=np.float64))
    with stage("path"):
        path = linear_path(problem, alphas_of(flags, problem))
    with stage("refits"):
        refits = refit_linear(path, problem)
    with stage("elbow"):
        chosen, elbow = choose(flags, sides, path, refits)
    with stage("dense"):
        dense = dense_fit(problem, sides.validation, flags.ridges)
    with stage("MLP"):
        lines = JsonLines(flags.out / "metrics.jsonl")
        (mlp,) = gradient_fit(
            MLPS[flags.mlp](n_features=flags.mlp_width), sides.fit, flags.mlp_tokens, flags.mlp_batch, (flags.seed,),
            lambda row: lines.write({"layer": ends.layer, "connector": "mlp", **row}), linear=(dense.trained,),
        )  # fmt: skip
    return Fits(problem, path, refits, chosen, elbow, refits.trained(chosen, problem), dense, mlp)


def alphas_of(flags: Flags, problem: Standardised) -> np.ndarray:
    """The penalties of the path, the given one among them."""
    alphas = np.array(flags.alphas) if flags.alphas else default_alphas(problem, flags.points, flags.smallest)
    return alphas if flags.alpha is None else np.unique([*alphas, flags.alpha])


def choose(flags: Flags, sides: Sides, path: LinearPath, refits: LinearMaps) -> tuple[int, int | None]:
    """(point of the path that is the sparse connector, the elbow's on validation documents)."""
    if flags.alpha is not None:
        return int(np.argmin(np.abs(path.alphas - flags.alpha))), None
    errors = moment_errors(moments(sides.validation, blocks=1, dtype=np.float64), refits)
    found = front(errors, refits.nonzeros)
    elbow = int(found.order[found.elbow])
    return elbow, elbow


def spliced(
    flags: Flags, opened: Opened, ends: Ends, sides: Sides, fits: Fits, alive: np.ndarray, numbers: np.ndarray
) -> dict:
    """Figures with the site replaced: by connectors, by some of the path, by those that the mean Jacobian chose."""
    points = path_points(fits, flags.splice_points)
    kinds = {PATH: LinearMaps(tuple(fits.refits.weights[i] for i in points), fits.refits.bias[points])}
    if flags.jacobian_support:
        kinds[JACOBIAN] = jacobian_maps(flags, opened, ends, sides, fits, points)
    several = fits.connectors
    for kind, maps in kinds.items():
        several |= {f"{kind}{point}": maps.trained(i, fits.problem) for i, point in enumerate(points)}
    figures = spliced_figures_of(flags, opened, ends, several, numbers)
    for kind, maps in kinds.items():
        costs = path_costs(fits.path, points, maps.nonzeros[:, alive], figures["rows"], kind)
        r2 = block_errors(sides.held_out, maps).r2()[:, alive].mean(axis=1)
        figures[kind.strip()] = [cost | {"r2": float(each)} for cost, each in zip(costs, r2)]
    return figures


def path_points(fits: Fits, count: int) -> list[int]:
    """Some points of the path, evenly from the sparsest with a connection to the densest."""
    points = np.flatnonzero(fits.refits.nonzeros.sum(axis=1))
    if not count or not len(points):
        return []
    chosen = np.unique(np.linspace(0, len(points) - 1, min(count, len(points))).round().astype(int))
    return [int(point) for point in points[chosen]]


def jacobian_maps(flags: Flags, opened: Opened, ends: Ends, sides: Sides, fits: Fits, points: list[int]) -> LinearMaps:
    """As many inputs of each target as the path has at each point, chosen by the mean Jacobian on fitting tokens."""
    made = mean_jacobian_of(opened, ends, sides.fit, flags.jacobian_tokens)
    return refit_linear(strongest_inputs(made.firing, fits.problem.norms, fits.refits.nonzeros[points]), fits.problem)


def path_costs(path: LinearPath, points: list[int], nonzeros: np.ndarray, rows: dict, kind: str) -> list[dict]:
    """What connectors cost when spliced that belong to some points of the path; taken out of the rows.

    Args:
        path: whose points those are.
        points: which, the sparsest first.
        nonzeros: `[points, alive targets]` connections.
        rows: spliced figures by name.
        kind: the beginning of their names.
    """
    return [
        {"point": point, "alpha": path.alphas[point], "nonzeros": spread(each), "figures": rows.pop(f"{kind}{point}")}
        for point, each in zip(points, nonzeros)
    ]


def front_figures(fits: Fits, lasso: BlockErrors, refits: BlockErrors, beside: BlockErrors) -> tuple[dict, dict]:
    """(figures of the layer, points of the fronts)."""
    fronts = {
        "lasso": front(lasso, fits.path.nonzeros, fits.path.l1),
        "refit": front(refits, fits.refits.nonzeros, fits.path.l1),
    }
    dense = part(beside, 0)
    alive = beside.alive()
    r2 = beside.r2()[:, alive]
    sparse = refits.r2()[fits.chosen, alive]
    needed = {
        name: median_nonzeros(errors, maps.nonzeros, dense)
        for name, errors, maps in (("lasso", lasso, fits.path), ("refit", refits, fits.refits))
    }
    nonzeros = fits.refits.nonzeros[fits.chosen]
    figures = {
        "alive": int(alive.sum()),
        "targets": len(alive),
        "alpha": float(fits.path.alphas[fits.chosen]),
        "elbow": fits.elbow,
        "worst_violation": float(fits.path.violation.max()),
        "ridge": fits.dense.ridge,
        "ridges_on_validation": fits.dense.tried,
        "r2": {"dense": spread(r2[0]), "sparse": spread(sparse), "mlp": spread(r2[1])},
        "sparse_r2_interval": interval_at(fronts["refit"], fits.chosen),
        "nonzeros": spread(nonzeros[alive]),
        "nonzeros_at_90": needed,
        "g": spread(r2[1] - r2[0]),
    }
    points = {name: front_points(each, fits.path.alphas) for name, each in fronts.items()}
    return figures, plain({**points, "chosen": fits.chosen, "dense": float(r2[0].mean()), "mlp": float(r2[1].mean())})


def needed_by_sample(flags: Flags, sides: Sides, problem: Standardised, dense: BlockErrors) -> dict:
    """Connections for 90 % of the dense R^2, of targets drawn from those alive, along a path that goes farther."""
    alive = np.flatnonzero(dense.alive() & (problem.scales > 0))
    rng = np.random.default_rng(flags.seed)
    kept = np.sort(rng.choice(alive, min(flags.sample, len(alive)), replace=False))
    problem, dense = problem.of_targets(kept), dense.of_targets(kept)
    held_out = dataclasses.replace(sides.held_out, targets=sides.held_out.targets.of_features(kept))
    path = linear_path(problem, default_alphas(problem, SAMPLE_POINTS, flags.sample_smallest))
    needed = {}
    for name, maps in (("lasso", path), ("refit", refit_linear(path, problem))):
        needed[name] = median_nonzeros(block_errors(held_out, maps), maps.nonzeros, dense)
    return needed | {"sampled": len(kept)}


def part(errors: BlockErrors, number: int) -> BlockErrors:
    """One of its points."""
    return BlockErrors(errors.error[number : number + 1], errors.sum, errors.square, errors.fired, errors.count)


def spread(values: np.ndarray) -> dict:
    """Mean and quartiles."""
    q25, median, q75 = np.quantile(values, [0.25, 0.5, 0.75])
    return {"mean": float(np.mean(values)), "q25": float(q25), "median": float(median), "q75": float(q75)}


def interval_at(found: Front, point: int) -> dict:
    """Mean R^2 of a connector with its interval."""
    (at,) = np.flatnonzero(found.order == point)
    return {"value": float(found.r2[at]), "low": float(found.r2_low[at]), "high": float(found.r2_high[at])}


def front_points(found: Front, alphas: np.ndarray) -> list[dict]:
    """Points of a front, the sparsest first."""
    names = ("nonzeros", "median_nonzeros", "l1", "r2", "r2_low", "r2_high", "median_r2")
    columns = {"point": found.order, "alpha": alphas[found.order], **{name: getattr(found, name) for name in names}}
    return rows_of(columns)


def formulas(opened, ends, sides, fits, refits, beside) -> tuple[list[Connection], dict, dict]:
    """(what is known of each target, table of all targets by column, how many have each label)."""
    W, b = fits.refits.weights[fits.chosen], fits.refits.bias[fits.chosen]
    inputs, fires = code_columns(sides.held_out.inputs), code_columns(sides.held_out.targets)
    labels = label_targets(inputs, fires, W)
    r2 = {"dense": beside.r2()[0], "sparse": refits.r2()[fits.chosen], "mlp": beside.r2()[1]}
    sizes = {site: feature_count(opened, site) for site in ends.inputs}
    made = connections(W, inputs, fires, list(sizes.items()), labels=labels, bias=b, r2=r2["sparse"])
    alive = beside.alive()
    fired = np.diff(fires.indptr)
    table = {
        "target": np.arange(len(alive)),
        "alive": alive,
        "fired": fired,
        "density": fired / len(sides.held_out),
        **{f"r2_{name}": values for name, values in r2.items()},
        "g": r2["mlp"] - r2["dense"],
        "nonzeros": np.diff(W.indptr),
        "nonzeros_at_90": nonzeros_at_share(refits.r2(), fits.refits.nonzeros, r2["dense"]),
        "label": [each.label for each in made],
        "note": [each.note for each in made],
        "formula": [each.formula.text(_TERMS) for each in made],
    }
    counts = {}
    for label in LABELS:
        here = [each for each, there in zip(made, alive) if there and each.label == label]
        counts[label] = {"targets": len(here), "too few tokens": sum(bool(each.note) for each in here)}
    return made, table, counts
