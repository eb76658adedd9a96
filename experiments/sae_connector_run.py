"""What `experiments.sae_connector` does with its flags, from top to bottom."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import run_folder
from experiments.connecting import Ends, Opened, check, feature_count
from experiments.connecting_codes import Codes, Sides
from experiments.connecting_fits import gradient_fit
from experiments.connecting_layers import (
    Stages,
    layer_folder,
    plain,
    rows_of,
    run_layers,
)
from experiments.data import check_positive
from experiments.sae_connector import Flags
from experiments.sae_connector_report import print_summary, write_report
from sparse_jax.connectors.autoencoder import AutoencoderConnector
from sparse_jax.connectors.block_errors import block_errors
from sparse_jax.connectors.clusters import UnitClusters, unit_clusters
from sparse_jax.connectors.code_columns import code_columns, hidden_columns
from sparse_jax.connectors.code_panels import ReadText, column_panels
from sparse_jax.connectors.connection import connections
from sparse_jax.connectors.connection_pages import used_inputs, write_connection_pages
from sparse_jax.connectors.connector import Trained
from sparse_jax.connectors.connector_files import save_connector
from sparse_jax.connectors.mlp import MLP
from sparse_jax.connectors.paired_codes import Pair
from sparse_jax.errors import InputError
from sparse_jax.numerics.sparse_codes import SparseCodes
from sparse_jax.training import JsonLines

EXPERIMENT = "sae_connector"
# A weight counts from here on.
LARGE = 0.1
# Tokens whose hidden units are made at once.
_ROWS = 2048


def run(flags: Flags) -> int:
    """Run the experiment; returns the exit code."""
    check_flags(flags)
    return run_layers(flags, EXPERIMENT, measure_layer, write_report, print_summary)


def check_flags(flags: Flags) -> None:
    """Raises InputError for flags that cannot be used, before anything is loaded."""
    check(flags)
    check_positive(flags, "width", "batch", "hidden_l1", "cluster_tokens")
    if not flags.hidden_l1 or len(set(flags.hidden_l1)) < len(flags.hidden_l1):
        raise InputError(f"--hidden-l1 {' '.join(map(str, flags.hidden_l1))}: give at least one, each once")
    if flags.read is not None and flags.read not in (0, *flags.hidden_l1):
        raise InputError(f"--read {flags.read:g}: give 0 (the MLP) or one of --hidden-l1")
    for name in ("alpha", "fit_tokens", "pages"):
        if getattr(flags, name) < 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(flags, name)}: give 0 or more")


def name_of(hidden_l1: float) -> str:
    """What a connector is called; 0 is the MLP."""
    return f"hidden-l1-{hidden_l1:g}" if hidden_l1 else "mlp"


def measure_layer(flags: Flags, opened: Opened, ends: Ends, codes: Codes) -> dict:
    """All of one connection: fits, measures, writes units, connectors and pages; returns its figures."""
    stage, folder, sides = Stages(ends.name), layer_folder(flags.out, ends), codes.sides(ends, flags)
    with stage("connectors"):
        fits = fitted(flags, ends, sides.fit)
    with stage("R2 on held-out text"):
        errors = block_errors(sides.held_out, list(fits.values()))
    alive = errors.alive()
    if not alive.any():
        raise InputError(f"no target of {ends.target} fires often enough on held-out text: raise --eval-tokens")
    with stage("hidden units"):
        units = {name: hidden_sums(each, sides.held_out) for name, each in fits.items()}
    found = {
        name: {
            "r2": float(r2[alive].mean()), "median_r2": float(np.median(r2[alive])),
            **unit_figures(units[name], len(sides.held_out)), "weights": weight_counts(each),
        }
        for (name, each), r2 in zip(fits.items(), errors.r2())
    }  # fmt: skip
    read = name_of(flags.hidden_l1[0] if flags.read is None else flags.read)
    chosen, strength = strongest(fits[read], units[read], flags.pages)
    with stage("clusters and pages"):
        clusters = write_units(flags, opened, ends, sides, fits[read], chosen, folder)
    for name, each in fits.items():
        facts = {**opened.data.identity(), "site": None, "inputs": ends.inputs, "target": ends.target}
        save_connector(folder / "connectors" / name, each, facts | {"tokens": len(sides.fit), "seed": flags.seed})
    table = unit_table(fits[read], units[read], strength, clusters, len(sides.held_out))
    run_folder.write_json(folder / "units.json", rows_of(table))
    figures = {"name": ends.name, "inputs": ends.inputs, "target": ends.target, "alive": int(alive.sum()), "read": read}
    return plain(figures | {"connectors": found, "clusters": cluster_figures(clusters), "seconds": stage.seconds})


def fitted(flags: Flags, ends: Ends, pair: Pair) -> dict[str, Trained]:
    """The MLP and an autoencoder connector for each penalty, by name; all start at the same weights."""
    lines, made = JsonLines(flags.out / "metrics.jsonl"), {}
    for hidden_l1 in (0.0, *flags.hidden_l1):
        name = name_of(hidden_l1)
        connector, coefficients = MLP(n_features=flags.width), {}
        if hidden_l1:
            connector = AutoencoderConnector(n_features=flags.width, norm_weighted=not flags.plain_norm)
            coefficients = {"alpha": flags.alpha, "hidden_l1": hidden_l1}

        def log(row, name=name):
            lines.write({"layer": ends.layer, "connector": name, **row})

        (made[name],) = gradient_fit(connector, pair, flags.fit_tokens, flags.batch, (flags.seed,), log, coefficients)
    return made


def hidden_sums(trained: Trained, pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """(`[width]` int64 tokens on which each hidden unit fires, `[width]` float64 sum of its activations)."""
    fired, total = 0, 0.0
    for start in range(0, len(pair), _ROWS):
        codes = pair.inputs.at(slice(start, start + _ROWS))
        missing = _ROWS - len(codes.values)
        codes = SparseCodes(*(jnp.array(np.pad(part, ((0, missing), (0, 0)))) for part in codes))
        counts, sums = _sums(trained, codes, jnp.arange(_ROWS, dtype=jnp.int32) < _ROWS - missing)
        fired, total = fired + np.asarray(counts, np.int64), total + np.asarray(sums, np.float64)
    return fired, total


@jax.jit
def _sums(trained: Trained, codes, counted):
    hidden = jnp.where(counted[:, None], trained.hidden(codes), 0)
    return jnp.sum(hidden > 0, axis=0, dtype=jnp.int32), jnp.sum(hidden, axis=0)


def unit_figures(units: tuple[np.ndarray, np.ndarray], tokens: int) -> dict:
    """Mean number of units that fire on a token, and how many never do."""
    fired, _ = units
    return {"hidden_l0": float(fired.sum() / tokens), "silent_units": int((fired == 0).sum()), "units": len(fired)}


def weight_counts(trained: Trained) -> dict:
    """Weights above 0.1 in size by sign, and those that are not 0: in their own units and in scaled ones."""
    counts = {}
    scaled = trained.connector.in_scaled_units(trained.params)
    for units, params in (("own", trained.params), ("scaled", scaled)):
        for name in ("W_enc", "W_dec"):
            W = np.asarray(params[name])
            signs = {"positive": int((W > LARGE).sum()), "negative": int((W < -LARGE).sum())}
            counts.setdefault(name, {})[units] = signs
    for name in counts:
        counts[name]["nonzero"] = int(np.count_nonzero(np.asarray(trained.params[name])))
    return counts


def strongest(trained: Trained, units, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(the units that get pages, ascending; `[width]` mean activation x norm of what a unit of it writes, scaled)."""
    norms = np.linalg.norm(np.asarray(trained.connector.in_scaled_units(trained.params)["W_dec"]), axis=1)
    strength = units[1] * norms
    order = np.argsort(-strength, kind="stable")
    return np.sort(order[: min(count, int((strength > 0).sum()))]), strength


def write_units(
    flags: Flags, opened: Opened, ends: Ends, sides: Sides, trained: Trained, chosen: np.ndarray, folder: Path
) -> dict[int, UnitClusters]:
    """Clusters of the chosen units; writes their pages."""
    from tqdm import tqdm

    if not len(chosen):
        return {}
    data, held, params = opened.data, sides.held_out, trained.params
    inputs, fires = code_columns(held.inputs), hidden_columns(trained.connector, params, held.inputs, chosen)
    W, b = np.asarray(params["W_enc"])[:, chosen], np.asarray(params["b_enc"])[chosen]
    found = {
        at: unit_clusters(inputs, W[:, at], fires, at, bias=float(b[at]), tokens=flags.cluster_tokens, seed=flags.seed)
        for at in tqdm(range(len(chosen)), desc="clusters", unit="unit", mininterval=0.5)
    }
    # Columns are numbered by their place among the chosen ones; pages tell which unit that is.
    sites = [(site, feature_count(opened, site)) for site in ends.inputs]
    made = connections(
        W, inputs, fires, sites, target="hidden", bias=b, relu=True, outputs=np.asarray(params["W_dec"])[chosen],
        clusters=found,
    )  # fmt: skip
    read = ReadText(held.tokens, data.evaluation, data.tokenizer.token_strings)
    of_inputs = {panel.index: panel for panel in column_panels(inputs, read, used_inputs(made), seed=flags.seed)}
    own = column_panels(fires, read, seed=flags.seed)
    pairs: Iterable = tqdm(zip(own, made), total=len(made), desc="pages", unit="unit", mininterval=0.5)
    write_connection_pages(
        folder / "pages", f"hidden units from {ends.name}", named(pairs, chosen), of_inputs, read=read, fires=fires,
        subtitle=f"{data.flags.model}, {trained.connector.kind} connector", noun=("Hidden unit", "hidden units"),
        facts=[("held-out tokens", f"{len(held):,}"), ("units", f"{len(chosen)} strongest of {flags.width:,}")],
    )  # fmt: skip
    return {int(chosen[at]): each for at, each in found.items()}


def named(pairs: Iterable, chosen: np.ndarray) -> Iterable:
    """The same pairs; what stands on the page says which unit a column is."""
    for panel, connection in pairs:
        name = f"hidden {chosen[connection.target]}"
        formula = dataclasses.replace(connection.formula, target=name)
        yield panel, dataclasses.replace(connection, formula=formula)


def cluster_figures(clusters: dict[int, UnitClusters]) -> dict:
    """How many units have one way to fire, or several."""
    counts = [len(each.clusters) for each in clusters.values()]
    several = [each for each in clusters.values() if len(each.clusters) > 1]
    return {
        "units": len(counts),
        "with several": len(several),
        "stopped somewhere": sum(each.stopped > 0 for each in clusters.values()),
        "most": max(counts, default=0),
    }


def unit_table(trained: Trained, units, strength, clusters: dict[int, UnitClusters], tokens: int) -> dict:
    """Columns of units.json."""
    fired, total = units
    W_enc, W_dec = (np.asarray(trained.params[name]) for name in ("W_enc", "W_dec"))
    words = [
        [] if unit not in clusters
        else [each.words([f"IF {row}" for row in clusters[unit].inputs]) for each in clusters[unit].clusters]
        for unit in range(len(fired))
    ]  # fmt: skip
    return {
        "unit": np.arange(len(fired)),
        "fired": fired,
        "mean_activation": np.where(fired > 0, total / np.maximum(fired, 1), 0),
        "strength": strength / tokens,
        "inputs_positive": (W_enc > LARGE).sum(axis=0),
        "inputs_negative": (W_enc < -LARGE).sum(axis=0),
        "outputs_positive": (W_dec > LARGE).sum(axis=1),
        "outputs_negative": (W_dec < -LARGE).sum(axis=1),
        "clusters": ["; ".join(each) for each in words],
    }
