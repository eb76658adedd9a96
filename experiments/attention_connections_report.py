"""The page of `experiments.attention_connections`."""

from pathlib import Path

import numpy as np

from sparse_jax.connectors.attention_check import TrioCheck
from sparse_jax.connectors.attention_codes import AttentionCodes
from sparse_jax.connectors.attention_maps import TopEntries
from sparse_jax.connectors.same_position import SamePosition, by_target
from sparse_jax.connectors.trio_places import Columns
from sparse_jax.features import Report, Table
from sparse_jax.features.svg import histogram
from sparse_jax.features.top_tokens import shown

# Tokens that stand for a feature; features that the same position explains least.
TOKENS, LEAST_EXPLAINED = 4, 15


class Labels:
    """The tokens that a feature is most about: those with the largest sum of its codes."""

    def __init__(self, found: AttentionCodes, columns: tuple[Columns, Columns], tokenizer):
        self._token, self._columns, self._tokenizer = found.tokens.token, columns, tokenizer
        self._made: dict[tuple[int, int], list[str]] = {}

    def tokens(self, side: int, feature: int) -> list[str]:
        """Tokens of a feature before (side 0) or after (side 1) attention."""
        if (side, feature) not in self._made:
            codes = self._columns[side].of(feature)[:-1]
            sums = np.bincount(self._token[codes > 0], codes[codes > 0])
            best = [i for i in np.argsort(-sums, kind="stable")[:TOKENS] if sums[i] > 0]
            self._made[side, feature] = list(self._tokenizer.token_strings(np.array(best, int)))
        return self._made[side, feature]

    def text(self, side: int, feature: int) -> str:
        """The same in one line."""
        return " ".join(map(shown, self.tokens(side, feature)))


def maps_table(maps: dict[str, TopEntries]) -> dict:
    """A head's entries for `maps.json`."""
    return {
        name: [
            {"row": int(row), "column": int(column), "value": float(value)}
            for value, row, column in zip(entries.values, entries.rows, entries.columns)
        ]
        for name, entries in maps.items()
    }


def report(flags, layer: int, before, found: AttentionCodes, explained: SamePosition, trios, checks, maps, labels):
    """The page."""
    data = before.data
    tables = [position_table(explained), least_table(explained, labels), check_table(checks), heads_table(found, trios)]
    for head in trios:
        tables += [trio_table(head, trios[head], labels), *map_tables(head, maps[head], flags.distance, labels)]
    charts = tuple(
        (
            histogram(values[np.isfinite(values)], title=f"R², {name}", x_label="R²", y_label="features of attn_out"),
            f"How much of each feature of attn_out a {name} map of the same position explains, held-out documents.",
        )
        for name, values in explained.r2.items()
        if name != "mean"
    )
    return Report(
        title=f"Attention of layer {layer}",
        subtitle=f"{data.flags.model}: {flags.before} to {flags.after}",
        facts=(
            ("tokens that count", f"{len(found):,}"),
            ("features before", f"{found.before.n_features:,}"),
            ("features of attn_out", f"{found.after.n_features:,}"),
            ("places kept of each token", str(flags.sources)),
        ),
        tables=tuple(tables),
        charts=charts,
        details=(Path(flags.out) / "config.json").read_text(encoding="utf8"),
    )


def position_table(explained: SamePosition) -> Table:
    """What the same position explains."""
    columns = ("pooled", "mean", "q10", "q25", "q50", "q75", "q90", "above 0.1", "above 0.5", "above 0.9")
    rows = tuple(
        (name, float(each["targets"]), *(each.get(column) for column in columns))
        for name, each in explained.summary().items()
    )
    return Table(
        "How much of attn_out's features the same position explains",
        ("map", "features", *columns),
        rows,
        f"R² on {explained.tokens:,} tokens of held-out documents, of features that fire on at least "
        f"{explained.least} of them: quantiles (q10 to q90) and shares of features above a value. Pooled: 1 - sum of "
        "squared errors / sum of variances. What no map of the same position explains, attention has moved.",
    )


def least_table(explained: SamePosition, labels: Labels) -> Table:
    """The features that the same position explains least."""
    best = "MLP" if "MLP" in explained.r2 else "linear"
    rows = tuple(
        (str(j), r2, float(explained.r2["linear"][j]), float(explained.fired[j]), labels.text(1, j))
        for j, r2 in by_target(explained.r2[best], LEAST_EXPLAINED)
    )
    return Table(
        "Features of attn_out that the same position explains least",
        ("feature", f"R², {best}", "R², linear", "firings", "tokens"),
        rows,
        "Tokens: those with the largest sum of the feature's codes.",
    )


def check_table(checks: dict[str, TrioCheck]) -> Table:
    """Predicted and found changes."""
    rows = []
    for what in next(iter(checks.values())).agreements():
        for name, made in checks.items():
            each = made.agreements()[what]
            numbers = (each.correlation, each.slope, each.mean_predicted, each.mean_found)
            rows.append((f"{what}: {name}", float(each.places), *(n if np.isfinite(n) else None for n in numbers)))
    return Table(
        "Trios checked by intervention",
        ("", "places", "correlation", "slope", "mean size, predicted", "mean size, found"),
        tuple(rows),
        "Output: the key feature is removed at its place (error kept) and the layer's attention run again; the change "
        "of the output feature's pre-activation at the query's place against attention x OV, of the head alone or of "
        "the whole layer, with the norm's scale live or as it was. Logit: the query feature is removed; the change of "
        "the attention logit against what the trio's pair gives, or the query feature with all of the key. Slope: of "
        "what was found on the prediction. Random: features active at random tokens and places they attend to.",
    )


def heads_table(found: AttentionCodes, trios) -> Table:
    """Where heads look."""
    rows = tuple(
        (f"head {head}", float(found.own[head]), float(found.uncounted[head]), float(found.kept[head]),
         float(np.abs(each.trios.strength).max(initial=0)), each.trios.bound, float(each.trios.certain))
        for head, each in trios.items()
    )  # fmt: skip
    return Table(
        "Heads",
        ("", "own position", "places that do not count", "kept", "strongest trio", "bound of the rest", "certain"),
        rows,
        "Mean attention to the own position, to places that the mask leaves out (the start of a row, separators), and "
        "to the places that were kept. Certain: so many of the listed trios are stronger than any other can be.",
    )


def trio_table(head: int, each, labels: Labels) -> Table:
    """A head's trios."""
    rows = []
    for k, figures in enumerate(each.figures):
        f, g, t = int(each.trios.query[k]), int(each.trios.key[k]), int(each.trios.output[k])
        rows.append(
            (f"{f} · {g} · {t}", float(each.trios.strength[k]), float(figures.places), figures.attention, figures.logit,
             figures.written, figures.distance, figures.own_share, labels.text(0, f), labels.text(0, g),
             labels.text(1, t))
        )  # fmt: skip
    return Table(
        f"Head {head}: trios of query, key and output feature",
        ("query · key · output", "strength", "places", "attention", "logit", "written", "distance", "own position",
         "query tokens", "key tokens", "output tokens"),
        tuple(rows),
        "Strength: mean over all tokens of attention x logit x written, where the output feature fires. Logit: what "
        "the query and the key feature add to the attention logit. Written: what the key feature writes on the output "
        "feature's pre-activation at attention 1. Both, attention and distance are means over the trio's places.",
    )  # fmt: skip


def map_tables(head: int, maps: dict[str, TopEntries], distance: int, labels: Labels) -> list[Table]:
    """The largest entries of a head's maps."""
    qk = tuple(
        (f"{f} · {g}", float(v), labels.text(0, int(f)), labels.text(0, int(g)))
        for v, f, g in zip(maps["qk"].values, maps["qk"].rows, maps["qk"].columns)
    )
    ov = tuple(
        (f"{g} · {t}", float(v), labels.text(0, int(g)), labels.text(1, int(t)))
        for v, g, t in zip(maps["ov"].values, maps["ov"].rows, maps["ov"].columns)
    )
    return [
        Table(
            f"Head {head}: largest QK entries at distance {distance}",
            ("query · key", "logit", "query tokens", "key tokens"),
            qk,
            "What the two features add to the logit at their mean codes where they fire and the norm's mean scale.",
        ),
        Table(
            f"Head {head}: largest OV entries",
            ("key · output", "written", "key tokens", "output tokens"),
            ov,
            "What the key feature, at its mean code where it fires and the norm's mean scale, writes on the output "
            "feature at attention 1, as a share of that feature's mean code where it fires.",
        ),
    ]
