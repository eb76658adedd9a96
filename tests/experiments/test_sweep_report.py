"""The report of a sweep, made from figures that are given: what it says, and how it looks in a browser."""

import re

import numpy as np
import pytest

from experiments.sweep_report import front_table, print_table, site_figures, usable, write_report
from sparse_jax.metrics import fronts

SITES = ("resid_post.2", "resid_post.3")


def member(site, n_features, rate, k, seed, share=1.0):
    rng = np.random.default_rng([n_features, k, seed])
    fvu = float(0.7 * k**-0.4 * (n_features / 512) ** -0.1 * (1.5 - share / 2) * np.exp(0.03 * rng.normal()))
    return {
        "name": f"k-{k}_{n_features // 64}x_lr-{rate:g}_seed-{seed}", "site": site, "n_features": n_features,
        "learning_rate": rate, "sparsity": k, "seed": seed, "share": share,
        "l0": float(k * np.exp(0.04 * rng.normal())), "fvu": fvu, "ce_increase": 2 * fvu,
        "ce_recovered": 0.98, "ce_recovered_mean": 0.95, "kl": fvu,
        "shrinkage": 1.01, "dead_fraction": 0.01, "tokens_evaluated": 212_992 if share == 1 else 32_768,
    }  # fmt: skip


def sweep_of(widths=(512, 2048), rates=(1e-3, 3e-4), seeds=(0, 1, 2), shares=(0.25, 0.5)):
    """(metrics.json, the measurements before the end)."""

    def all_of(share):
        return [
            member(site, n, rate, k, seed, share)
            for site in SITES for n in widths for rate in rates for k in (8, 16, 32, 64) for seed in seeds
        ]  # fmt: skip

    members = all_of(1.0)
    floors = [
        {**member(site, 64, 1.0, k, 0), "floor": floor, "k": k, "l0": k, "fvu": scale * k**-0.2}
        for site in SITES for floor, scale in (("pca", 0.9), ("neurons", 1.1), ("random", 2.0)) for k in (8, 64)
    ]  # fmt: skip
    final = {
        "dictionary": "topk", "knob": "k", "model": "novel-neox", "revision": None, "text": "embedded",
        "held_out": ["Emma"], "tokens_trained": 2_200_000, "epochs": 0.9, "tokens_evaluated": 212_992, "seeds": seeds,
        "normalise": "centre-scale", "mean_over_std": {SITES[0]: 0.5, SITES[1]: 1.25},
        "clean": {site: {"ce_clean": 4.1, "ce_zero": 12.0, "ce_mean": 7.0} for site in SITES}, "members": members,
        "floors": floors, "fronts": fronts(members),
    }  # fmt: skip
    return final, [line for share in shares for line in all_of(share)]


def test_fronts_are_told_apart_by_what_they_differ_in(capsys):
    final, _ = sweep_of()
    names = [row[0] for row in front_table(final).rows]
    assert names[0] == "resid_post.2, 512 features, lr 0.001, k 8"
    assert len(names) == len(set(names)) == 2 * 2 * 2 * 4
    final, _ = sweep_of(widths=(512,), rates=(1e-3,))
    assert front_table(final).rows[0][0] == "resid_post.2, topk, k 8"
    print_table(final)
    printed = capsys.readouterr().out
    fvu = final["fronts"][0]["points"][0]["fvu"]
    assert f"{fvu['mean']:.4f} ± {fvu['sd']:.4f}" in printed
    assert "PCA rotation, top 64" in printed


def test_figures_say_what_they_show():
    final, along = sweep_of()
    at_end, _, along_training, _ = site_figures("resid_post.3", final, along)
    assert "over 3 seeds" in at_end[1]
    assert "25 %, 50 % of the run and at its end" in along_training[1]
    assert "32,768" in along_training[1]
    bars = re.findall('class="e [^"]*" d="([^"]*)"', at_end[0])
    assert len(bars) == 16  # one pair for each point, none for floors
    assert all("H" in bar and "V" in bar for bar in bars)
    assert along_training[0].count('class="e ') == 0
    assert along_training[0].count("<g opacity=") == 8  # four fronts, at two shares
    assert "PCA" in at_end[0]
    final, along = sweep_of(seeds=(0,), shares=())
    figures = site_figures("resid_post.3", final, along)
    assert len(figures) == 2
    assert "One seed" in figures[0][1]
    assert 'class="e ' not in figures[0][0]


def test_a_member_without_figures_has_no_place_in_a_front(capsys, tmp_path):
    final, along = sweep_of()
    lost = final["members"][0]
    lost["fvu"] = lost["ce_increase"] = None  # as metrics.json has what is not finite
    assert usable(final["members"]) == final["members"][1:]
    final["fronts"] = fronts(usable(final["members"]))
    print_table(final)
    assert f"not finite, and in no mean: {lost['site']}/{lost['name']}\n" in capsys.readouterr().out
    for member in final["members"]:
        if member["site"] == SITES[0]:
            member["fvu"] = None
    final["fronts"] = fronts(usable(final["members"]))
    assert site_figures(SITES[0], final, along) == []
    assert len(site_figures(SITES[1], final, along)) == 4
    (tmp_path / "config.json").write_text("{}")
    write_report(tmp_path, final, along)
    assert "–" in (tmp_path / "report.html").read_text()


def test_captions_say_who_is_left_out():
    final, _ = sweep_of()

    def caption_without(lost):
        for member in final["members"]:
            member["fvu"] = None if lost(member) else 0.5
        final["fronts"] = fronts(usable(final["members"]))
        return site_figures(SITES[0], final, [])[0][1]

    here = 2 * 2 * 4 * 3
    assert caption_without(lambda member: member["site"] == SITES[1]).startswith("Means over 3 seeds; bars")
    first, second = (m["name"] for m in final["members"][:2])
    caption = caption_without(lambda m: m["site"] == SITES[0] and m["name"] in (first, second))
    assert caption.startswith("Means over up to 3 seeds; bars")
    assert f" Left out: 2 of {here} dictionaries, whose figures are not finite." in caption
    caption = caption_without(lambda member: member["seed"] == 1)
    assert caption.startswith("Means over 2 seeds; bars")
    assert f"Left out: {here // 3} of {here}" in caption
    caption = caption_without(lambda member: member["seed"] > 0)
    assert caption.startswith(f"One seed. Left out: {2 * here // 3} of {here}")


def test_a_ce_increase_below_zero_is_drawn():
    final, _ = sweep_of()
    for each in final["members"]:
        each["ce_increase"] -= 0.4
    final["fronts"] = fronts(final["members"])
    figure, _ = site_figures("resid_post.2", final, [])[1]
    assert figure.count("<title>512 features, lr 0.001:") == 4
    assert "−0." in figure


@pytest.fixture(params=["one front", "four fronts"])
def path(request, tmp_path):
    narrow = {"widths": (512,), "rates": (1e-3,)} if request.param == "one front" else {}
    (tmp_path / "config.json").write_text("{}")
    write_report(tmp_path, *sweep_of(**narrow))
    return tmp_path / "report.html"


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_the_report_in_a_browser(width, scheme, path, browser):
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    tab = context.new_page()
    said, asked = [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda sent: asked.append(sent.url))
    tab.goto(path.as_uri())
    tab.wait_for_load_state("networkidle")
    assert (said, asked) == ([], [path.as_uri()])
    assert tab.locator("figure svg").count() == 8
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    overlaps = """[...document.querySelectorAll('figure svg')].flatMap(svg => {
        const texts = [...svg.querySelectorAll('text')], boxes = texts.map(text => text.getBoundingClientRect())
        return boxes.flatMap((a, i) => boxes.slice(i + 1).flatMap((b, j) =>
            a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3
            ? [texts[i].textContent + ' over ' + texts[i + 1 + j].textContent] : []))})"""
    assert tab.evaluate(overlaps) == []
    outside = """[...document.querySelectorAll('figure svg')].filter(svg => [...svg.querySelectorAll('text')].some(t =>
        t.getBoundingClientRect().right > svg.getBoundingClientRect().right + 1)).length"""
    assert tab.evaluate(outside) == 0
    context.close()
