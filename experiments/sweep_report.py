"""The report of a sweep: fronts over seeds beside their floors, the same along training, and every member."""

from pathlib import Path

import numpy as np

from experiments.train_sae_report import HEADINGS, NAMES, epochs_of, held_out
from sparse_jax.features import Curve, Report, Table, curve_chart, write
from sparse_jax.metrics import fronts

# What a floor is drawn for; the others are in the table: far from any dictionary, they would flatten its curve.
DRAWN_FLOORS = {"pca": "PCA rotation, top k", "neurons": "neurons, top k"}
MEASURES = (("fvu", "FVU"), ("ce_increase", "CE increase"))
COLUMNS = ("l0", "fvu", "ce_increase", "ce_recovered", "ce_recovered_mean", "kl", "shrinkage", "dead_fraction")
COLUMN_HEADINGS = ("L0", "FVU", "CE increase", *HEADINGS[3:], "dead")


def usable(members: list[dict]) -> list[dict]:
    """Members whose figures are numbers: one that diverged has none, and no place in a front."""
    return [member for member in members if None not in (member["l0"], *(member[name] for name, _ in MEASURES))]


def write_report(out: Path, final: dict, along: list[dict]) -> None:
    """`report.html` in the run folder.

    Args:
        out: the run folder; its config.json is shown at the end of the page.
        final: the content of metrics.json.
        along: the measurements before the end, as lines of metrics.jsonl.
    """
    sites = list(dict.fromkeys(member["site"] for member in final["members"]))
    figures = []
    for site in sites:
        figures += site_figures(site, final, along)
    report = Report(
        title=f"{final['dictionary']} sweep of {', '.join(sites)}",
        subtitle=f"{final['model']}, {len(final['members'])} dictionaries, {final['tokens_trained']:,} training tokens",
        facts=facts(final),
        figures=tuple(figures),
        tables=(front_table(final), member_table(final), floor_table(final)),
        details=(out / "config.json").read_text(encoding="utf8"),
    )
    write(report, out / "report.html")


def site_figures(site: str, final: dict, along: list[dict]) -> list[tuple[str, str]]:
    """FVU and CE increase against L0 at the end of training, then both along training, each with its caption."""
    at_end = [front for front in final["fronts"] if front["site"] == site]
    if not at_end:  # every member here has diverged
        return []
    labels = front_labels(final)
    floors = [floor for floor in final["floors"] if floor["site"] == site]
    seeds = max(point["l0"]["count"] for front in at_end for point in front["points"])
    over = what_points_are(at_end, [member for member in final["members"] if member["site"] == site])
    made = []
    for name, heading in MEASURES:
        curves = [curve(front, name, labels) for front in at_end] + floor_curves(floors, name)
        caption = f"{over} Held-out tokens; lower and further left is better. Grey: floors on the same tokens."
        made.append((chart(curves, name, heading, f"{heading} against L0, {site}"), caption))
    earlier = [line for line in along if line["site"] == site]
    if not earlier:
        return made
    shares = sorted({line["share"] for line in earlier})
    for name, heading in MEASURES:
        curves = []
        for i, share in enumerate(shares):
            strength = 0.35 + 0.4 * i / len(shares)
            then = fronts([line for line in earlier if line["share"] == share])
            curves += [curve(front, name, labels, bars=False, strength=strength) for front in then]
        curves += [curve(front, name, labels, bars=False) for front in at_end]
        caption = (
            f"From faint to full: at {', '.join(f'{100 * share:g} %' for share in shares)} of the run and at its end. "
            f"{'Means over seeds. ' if seeds > 1 else ''}Before the end on {earlier[0]['tokens_evaluated']:,} held-out "
            "tokens, where warm-ups and the decay of the learning rate may not be over."
        )
        made.append((chart(curves, name, heading, f"{heading} along training, {site}"), caption))
    return made


def what_points_are(at_end: list[dict], members: list[dict]) -> str:
    """Over how many seeds the points of a site's fronts are means, and how many of its members have no part in them."""
    counts = {point["l0"]["count"] for front in at_end for point in front["points"]}
    seeds = f"{'up to ' if len(counts) > 1 else ''}{max(counts)} seeds"
    words = f"Means over {seeds}; bars reach from the lowest to the highest." if max(counts) > 1 else "One seed."
    if lost := len(members) - len(usable(members)):
        words += f" Left out: {lost} of {len(members)} dictionaries, whose figures are not finite."
    return words


def chart(curves: list[Curve], name: str, heading: str, title: str) -> str:
    """One figure; the y axis is logarithmic unless a value is zero or less (a CE increase may be)."""
    lows = [low for each in curves for low in (*each.y, *(each.y_range[0] if each.y_range else ()))]
    unit = "share of variance" if name == "fvu" else "nats"
    return curve_chart(
        curves, title=title, x_label="L0: active features per token", y_label=f"{heading}, {unit}", log_x=True,
        log_y=min(lows) > 0,
    )  # fmt: skip


def curve(front: dict, name: str, labels: dict[tuple, str], bars: bool = True, strength: float = 1.0) -> Curve:
    """A front as a curve of `name` against L0."""
    place = front["n_features"], front["learning_rate"]

    def values(measure: str, which: str) -> np.ndarray:
        return np.array([point[measure][which] for point in front["points"]], np.float64)

    def ends(measure: str) -> tuple[np.ndarray, np.ndarray] | None:
        several = bars and any(point["l0"]["count"] > 1 for point in front["points"])
        return (values(measure, "low"), values(measure, "high")) if several else None

    return Curve(
        name=labels[place],
        x=values("l0", "mean"),
        y=values(name, "mean"),
        x_range=ends("l0"),
        y_range=ends(name),
        hue=list(labels).index(place),
        strength=strength,
    )


def floor_curves(floors: list[dict], name: str) -> list[Curve]:
    """PCA and neurons over the k they were measured at."""
    made = []
    for i, (kind, label) in enumerate(DRAWN_FLOORS.items()):
        rows = [floor for floor in floors if floor["floor"] == kind]
        made.append(Curve(label, [row["l0"] for row in rows], [row[name] for row in rows], hue=i, floor=True))
    return made


def front_labels(final: dict) -> dict[tuple, str]:
    """(n_features, learning rate) -> the name of its fronts: what they differ in."""
    places = list(dict.fromkeys((front["n_features"], front["learning_rate"]) for front in final["fronts"]))
    widths, rates = ({place[i] for place in places} for i in (0, 1))
    made = {}
    for n_features, rate in places:
        parts = [f"{n_features:,} features"] if len(widths) > 1 else []
        parts += [f"lr {rate:g}"] if len(rates) > 1 else []
        made[n_features, rate] = ", ".join(parts) or final["dictionary"]
    return made


def facts(final: dict) -> tuple[tuple[str, str], ...]:
    """The figures that stand alone at the head of the report."""
    made = [
        ("model", final["model"] + (f" @ {final['revision']}" if final["revision"] else "")),
        ("text", final["text"]),
        ("held out", held_out(tuple(final["held_out"]))),
        ("tokens trained", f"{final['tokens_trained']:,} ({epochs_of(final)}), the same for all"),
        ("tokens evaluated", f"{final['tokens_evaluated']:,}"),
        ("seeds", ", ".join(map(str, final["seeds"]))),
    ]
    for site, ratio in final["mean_over_std"].items():
        made.append((f"normaliser at {site}", f"{final['normalise']}; raw ||mean|| / ||std|| {ratio:.3f}"))
    for site, clean in final["clean"].items():
        ablated = f"zero {clean['ce_zero']:.3f}, mean {clean['ce_mean']:.3f}"
        made.append((f"CE at {site}", f"clean {clean['ce_clean']:.4f}, ablated {ablated} nats"))
    return tuple(made)


def front_table(final: dict) -> Table:
    """Every point of the fronts: means over seeds and their standard deviations."""
    labels, rows = front_labels(final), []
    for front in final["fronts"]:
        label = labels[front["n_features"], front["learning_rate"]]
        for point in front["points"]:
            cells = [
                point[name][part] for name in ("l0", "fvu", "ce_increase", "dead_fraction") for part in ("mean", "sd")
            ]
            name = f"{front['site']}, {label}, {final['knob']} {point['sparsity']:g}"
            rows.append((name, *cells, point["l0"]["count"]))
    columns = ("", "L0", "± sd", "FVU", "± sd", "CE increase", "± sd", "dead", "± sd", "seeds")
    note = "Means over seeds and the standard deviation of one seed (divisor: seeds - 1); a dash: a single seed."
    return Table("Fronts", columns, tuple(rows), note)


def member_table(final: dict) -> Table:
    """Every dictionary's own figures."""
    rows = []
    for member in final["members"]:
        name = f"{member['site']}, {member['name']}"
        rows.append((name, *(member[column] for column in COLUMNS)))
    note = "Saved in dictionaries/SITE/NAME. Shrinkage is E||x_hat||² / E[x_hat · x] about the mean; 1 is unbiased."
    return Table("Every dictionary, on the same held-out tokens", ("", *COLUMN_HEADINGS), tuple(rows), note)


def floor_table(final: dict) -> Table:
    """The floors at each k."""
    rows = [
        (
            f"{floor['site']}, {NAMES[floor['floor']].format(k=floor['k'])}",
            *(floor.get(column) for column in COLUMNS[:-1]),
        )
        for floor in final["floors"]
    ]
    note = (
        "On the same tokens, at a few k between the smallest and the largest L0 of the site's dictionaries. The random "
        "dictionary is as wide as the widest of them."
    )
    return Table("Floors", ("", *COLUMN_HEADINGS[:-1]), tuple(rows), note)


def print_table(final: dict) -> None:
    """The fronts, for the terminal."""
    table = front_table(final)
    floors = [
        (f"{floor['site']}, {NAMES[floor['floor']].format(k=floor['k'])}", floor)
        for floor in final["floors"]
        if floor["floor"] in DRAWN_FLOORS
    ]
    width = max(len(name) for name, *_ in (*table.rows, *floors)) + 2
    print(f"\n{'':{width}}{'L0':>15}{'FVU':>18}{'CE increase':>18}{'dead':>8}{'seeds':>7}")
    for name, l0, l0_sd, fvu, fvu_sd, increase, increase_sd, dead, _, seeds in table.rows:
        cells = (_with_sd(l0, l0_sd, 1), _with_sd(fvu, fvu_sd, 4), _with_sd(increase, increase_sd, 4))
        print(f"{name:{width}}{cells[0]:>15}{cells[1]:>18}{cells[2]:>18}{100 * dead:>6.1f} %{seeds:>7}")
    for name, floor in floors:
        print(f"{name:{width}}{floor['l0']:>15.1f}{floor['fvu']:>18.4f}{floor['ce_increase']:>18.4f}")
    if lost := [f"{m['site']}/{m['name']}" for m in final["members"] if m not in usable(final["members"])]:
        print(f"\nnot finite, and in no mean: {', '.join(lost)}")


def _with_sd(mean: float, sd: float | None, digits: int) -> str:
    return f"{mean:.{digits}f}" if sd is None else f"{mean:.{digits}f} ± {sd:.{digits}f}"
