"""What `experiments.linearity` does with its flags, from top to bottom."""

import dataclasses
import itertools
import json
from functools import partial

import numpy as np

from experiments import run_folder
from experiments.connecting import Ends, Opened, check
from experiments.connecting_codes import Codes, Sides, spread_rows
from experiments.connecting_fits import MLPS, check_ridges, dense_fit, gradient_fit
from experiments.connecting_layers import (
    Stages,
    layer_folder,
    plain,
    rows_of,
    run_layers,
)
from experiments.data import check_positive
from experiments.linearity import Flags
from experiments.linearity_report import print_summary, write_report
from sparse_jax.connectors.connector import Connector, Trained
from sparse_jax.connectors.connector_files import save_connector
from sparse_jax.connectors.document_errors import DocumentErrors, document_errors
from sparse_jax.connectors.linear import Linear
from sparse_jax.connectors.linearity import Linearity, class_counts, classify, linearity
from sparse_jax.connectors.moments import moments
from sparse_jax.connectors.noise_threshold import NoiseThreshold, noise_threshold
from sparse_jax.connectors.original_rule import OriginalRule, original_rule
from sparse_jax.connectors.outliers import Outliers, outliers
from sparse_jax.connectors.paired_codes import Pair
from sparse_jax.connectors.scaling import moments_of
from sparse_jax.connectors.standardised import standardised
from sparse_jax.errors import InputError
from sparse_jax.features import delimiter_tokens
from sparse_jax.training import JsonLines

EXPERIMENT = "linearity"


def run(flags: Flags) -> int:
    """Run the experiment; returns the exit code."""
    check_flags(flags)
    return run_layers(
        flags, EXPERIMENT, measure_layer, write_report, print_summary,
        suits=check_targets, over_all=partial(with_original, flags), facts={"level": flags.level},
    )  # fmt: skip


def with_original(flags: Flags, opened: Opened, layers: dict) -> dict:
    """Layers' figures with those of the original rule, which needs the norms of all of them."""
    return {
        str(ends.layer): layers[str(ends.layer)] | {"original": original_figures(flags, opened, ends, layers)}
        for ends in opened.ends
    }


def check_flags(flags: Flags) -> None:
    """Raises InputError for flags that cannot be used, before anything is loaded."""
    check(flags)
    check_ridges(flags.ridges)
    check_positive(flags, "widths", "batches", "levels", "noise_tokens", "min_documents")
    for name in ("seeds", "widths", "batches", "levels"):
        given = getattr(flags, name)
        if not given or len(set(given)) < len(given) or min(given) < 0:
            shown = " ".join(map(str, given))
            raise InputError(f"--{name} {shown}: give at least one, each once, none below 0")
    if flags.level not in flags.levels:
        raise InputError(f"--level {flags.level}: give one of --levels {' '.join(map(str, flags.levels))}")
    if flags.fit_tokens < 0 or flags.replicates < 2:
        raise InputError(
            f"--fit-tokens {flags.fit_tokens} --replicates {flags.replicates}: give 0 or more, and at least 2"
        )


def check_targets(opened: Opened) -> None:
    """Raises InputError for raw targets: noise is in codes of a dictionary."""
    if raw := [ends.target for ends in opened.ends if opened.coders[ends.target] is None]:
        raise InputError(f"{', '.join(raw)} without a dictionary: the threshold is of features; give one of the target")


def measure_layer(flags: Flags, opened: Opened, ends: Ends, codes: Codes) -> dict:
    """All of one connection: fits, classes, sweeps; writes its table and connectors; returns its figures."""
    stage, folder, sides = Stages(ends.name), layer_folder(flags.out, ends), codes.sides(ends, flags)
    log = layer_log(flags, ends)
    with stage("linear"):
        linear, ridge = linear_fits(flags, sides, log)
    with stage("MLPs"):
        mlps = mlp_fits(flags, sides.fit, flags.widths[0], flags.batches[0], flags.seeds, linear, log)
    with stage("errors on held-out text"):
        errors = document_errors(sides.held_out, {**linear, **mlps})
        means = moments_of(sides.fit.targets).mean
        errors = errors.constant(means)
        # An exact solution has no seeds: as often as there are MLPs, its spread over them is 0.
        names = list(linear) if len(linear) > 1 else list(linear) * max(2, len(mlps))
        measured = linearity(errors, names, list(mlps), replicates=flags.replicates, seed=flags.seed)
    with stage("threshold"):
        noise = calibrated(flags, opened, ends, codes.numbers, errors)
    with stage("outliers"):
        strings = opened.data.tokenizer.token_strings(range(opened.data.lm.config.vocab_size))
        apart = outliers(sides.held_out.targets, sides.held_out.tokens, delimiter_tokens(strings))
    classes = {level: classes_at(flags, measured, noise, level) for level in flags.levels}
    main = classes[flags.level]
    figures = {
        "name": ends.name, "inputs": ends.inputs, "target": ends.target, "ridge": ridge,
        "tokens": {name: len(getattr(sides, name)) for name in ("fit", "validation", "held_out")},
        "threshold": noise,
        "classes": {f"{level:g}": class_counts(each, apart.outlier) for level, each in classes.items()},
        "linear_share": {f"{level:g}": linear_share(each, apart.outlier) for level, each in classes.items()},
        **summary(measured, main, apart),
        "median_norm": float(opened.statistics(ends.target).median_norm),
    }  # fmt: skip
    if len(flags.widths) * len(flags.batches) > 1:
        with stage("sweep"):
            figures["sweep"] = swept(flags, sides, linear, errors, noise, apart, log)
    if flags.retrain:
        with stage("retrained on linear targets"):
            figures["retrained"] = retrained(flags, sides, linear, errors, measured, main, log)
    save_all(flags, opened, ends, sides, {**linear, **mlps})
    run_folder.write_json(folder / "targets.json", rows_of(table_of(measured, classes, apart)))
    return plain(figures | {"seconds": stage.seconds})


def layer_log(flags: Flags, ends: Ends):
    """Rows of training for metrics.jsonl."""
    lines = JsonLines(flags.out / "metrics.jsonl")
    return lambda row: lines.write({"layer": ends.layer, **row})


def linear_fits(flags: Flags, sides: Sides, log) -> tuple[dict[str, Trained], float | None]:
    """(linear connectors by name, the ridge of the exact one)."""
    if flags.gradients:
        made = gradient_fit(Linear(), sides.fit, flags.fit_tokens, flags.batches[0], flags.seeds, log)
        return {f"linear/{seed}": each for seed, each in zip(flags.seeds, made)}, None
    problem = standardised(moments(sides.fit, blocks=1, dtype=np.float64))
    dense = dense_fit(problem, sides.validation, flags.ridges)
    return {"linear": dense.trained}, dense.ridge


def mlp_fits(
    flags: Flags, pair: Pair, width: int, batch: int, seeds: tuple[int, ...], linear: dict[str, Trained], log
) -> dict[str, Trained]:
    """MLPs of all seeds by name, on these linear connectors."""
    connector: Connector = MLPS[flags.mlp](n_features=width)
    made = gradient_fit(connector, pair, flags.fit_tokens, batch, seeds, log, linear=tuple(linear.values()))
    return {mlp_name(width, batch, seed): each for seed, each in zip(seeds, made)}


def mlp_name(width: int, batch: int, seed: int) -> str:
    """What an MLP is called among the predictors."""
    return f"mlp/{width}/{batch}/{seed}"


def calibrated(flags: Flags, opened: Opened, ends: Ends, numbers, errors: DocumentErrors) -> NoiseThreshold:
    """s* of all levels at the target's site."""
    text = opened.data.evaluation
    rows = spread_rows(numbers, flags.noise_tokens // text.context)
    limit = opened.max_norms(ends.target).get(ends.target, float("inf"))
    return noise_threshold(
        opened.data.lm, opened.coders[ends.target], ends.target, text, rows, errors.variance,
        levels=sorted(flags.levels), max_norm=limit, seed=flags.seed, replicates=flags.replicates,
    )  # fmt: skip


def classes_at(flags: Flags, measured: Linearity, noise: NoiseThreshold, level: float) -> np.ndarray:
    """Classes by the threshold of a level."""
    return classify(measured, noise.threshold(level), unexplained=flags.unexplained, min_documents=flags.min_documents)


def linear_share(classes: np.ndarray, outlier: np.ndarray) -> float:
    """Linear targets among linear, nonlinear and undecided ones that are no outliers; NaN where there are none."""
    decided = np.isin(classes, ("linear", "nonlinear", "undecided")) & ~outlier
    return float((classes[decided] == "linear").mean()) if decided.any() else float("nan")


def summary(measured: Linearity, classes: np.ndarray, apart: Outliers) -> dict:
    """Means over targets that fire and are no outliers; medians of g over those that are explained."""
    alive = (measured.fired > 0) & ~apart.outlier & (measured.documents >= 2) & np.isfinite(measured.g)
    explained = np.isin(classes, ("linear", "nonlinear", "undecided")) & ~apart.outlier
    means = {name: getattr(measured, f"r2_{name}")[alive] for name in ("linear", "mlp", "constant")}
    return {
        "alive": int((measured.fired > 0).sum()),
        "outliers": int(apart.outlier.sum()),
        "r2": {name: float(values.mean()) if len(values) else None for name, values in means.items()},
        "median_g": float(np.median(measured.g[explained])) if explained.any() else None,
        "median_seed_spread": float(np.nanmedian(measured.seed_spread[explained]))
        if np.isfinite(measured.seed_spread[explained]).any() else None,
    }  # fmt: skip


def swept(flags: Flags, sides: Sides, linear, errors: DocumentErrors, noise, apart: Outliers, log) -> list[dict]:
    """A row for each width and batch: an MLP of the first seed beside the same linear connector."""
    rows = []
    for width, batch in itertools.product(flags.widths, flags.batches):
        name = mlp_name(width, batch, flags.seeds[0])
        if name not in errors.errors:
            mlps = mlp_fits(flags, sides.fit, width, batch, flags.seeds[:1], linear, log)
            errors = with_errors(errors, document_errors(sides.held_out, mlps))
        measured = linearity(errors, list(linear)[:1], [name], replicates=flags.replicates, seed=flags.seed)
        classes = classes_at(flags, measured, noise, flags.level)
        rows.append({
            "width": width, "batch": batch, "classes": class_counts(classes, apart.outlier),
            "linear_share": linear_share(classes, apart.outlier), **summary(measured, classes, apart),
        })  # fmt: skip
    return rows


def with_errors(errors: DocumentErrors, more: DocumentErrors) -> DocumentErrors:
    """The predictors of both, on the same tokens."""
    return dataclasses.replace(errors, errors={**errors.errors, **more.errors})


def retrained(flags: Flags, sides: Sides, linear, errors, measured: Linearity, classes: np.ndarray, log) -> dict:
    """An MLP for the linear targets alone: what it gains over the one for all, of the first seed."""
    kept = np.flatnonzero(classes == "linear")
    if not len(kept):
        return {"targets": 0}
    width, batch, seed = flags.widths[0], flags.batches[0], flags.seeds[0]
    fit, held = (
        dataclasses.replace(pair, targets=pair.targets.of_features(kept)) for pair in (sides.fit, sides.held_out)
    )
    mlps = mlp_fits(flags, fit, width, batch, (seed,), of_targets(linear, kept), log)
    (name,) = mlps
    alone, before = document_errors(held, mlps).r2(name), errors.r2(name)[kept]
    g = alone - measured.r2_linear[kept]
    return {
        "targets": len(kept),
        "r2_linear": float(np.mean(measured.r2_linear[kept])),
        "r2_mlp": float(np.mean(before)),
        "r2_retrained": float(np.mean(alone)),
        "median_g": float(np.median(measured.g[kept])),
        "median_g_retrained": float(np.median(g)),
    }


def of_features(pair: Pair, kept: np.ndarray) -> Pair:
    """A pair with some of its targets alone."""
    return dataclasses.replace(pair, targets=pair.targets.of_features(kept))


def of_targets(linear: dict[str, Trained], kept: np.ndarray) -> dict[str, Trained]:
    """Linear connectors to some of their targets alone."""

    def cut(trained: Trained) -> Trained:
        params = {name: each if name == "input_norm" else each[..., kept] for name, each in trained.params.items()}
        return Trained(Linear().sized(trained.connector.d_in, len(kept)), params)

    return {name: cut(each) for name, each in linear.items()}


def save_all(flags: Flags, opened: Opened, ends: Ends, sides: Sides, fits: dict[str, Trained]) -> None:
    """The connectors."""
    folder = layer_folder(flags.out, ends) / "connectors"
    facts = {**opened.data.identity(), "site": None, "inputs": ends.inputs, "target": ends.target}
    for name, each in fits.items():
        save_connector(folder / name.replace("/", "-"), each, facts | {"tokens": len(sides.fit)})


def table_of(measured: Linearity, classes: dict[float, np.ndarray], apart: Outliers) -> dict:
    """Columns of targets.json."""
    names = ("g", "low", "high", "seed_spread", "r2_linear", "r2_mlp", "r2_constant", "mse_linear", "mse_mlp")
    names += ("variance", "density", "fired", "documents")
    mse_constant = (1 - measured.r2_constant) * np.where(measured.variance > 0, measured.variance, np.nan)
    return {
        "target": np.arange(len(measured.g)),
        **{name: getattr(measured, name) for name in names},
        "mse_constant": np.where(measured.variance > 0, mse_constant, 0.0),
        **{f"class_{level:g}": each for level, each in classes.items()},
        "outlier": apart.reason,
    }


def original_figures(flags: Flags, opened: Opened, ends: Ends, layers: dict) -> dict:
    """The original rule with the norms of all layers of this run, from the layer's table."""
    rows = json.loads((layer_folder(flags.out, ends) / "targets.json").read_text(encoding="utf8"))
    columns = {name: np.array([row[name] for row in rows], float) for name in ("mse_linear", "mse_mlp", "mse_constant")}
    norms = [each["median_norm"] for each in layers.values()]
    rule: OriginalRule = original_rule(
        *columns.values(), np.array([row["fired"] > 0 for row in rows]),
        norm=layers[str(ends.layer)]["median_norm"], min_norm=min(norms),
    )  # fmt: skip
    shares = {"share": rule.share, "share_alive": rule.share_alive, "share_constant": rule.share_constant}
    return plain({**shares, "norm": layers[str(ends.layer)]["median_norm"], "min_norm": min(norms)})
