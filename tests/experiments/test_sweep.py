"""A sweep: its members, what it refuses, what it leaves behind, and that each member is what it would be alone."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import command, contexts, sweep, sweep_training, train_sae
from experiments.replacement import load_replacement, read_provenance
from experiments.sweep import Flags
from experiments.sweep_members import choices, knob
from sparse_jax.activations import Statistics
from sparse_jax.dictionaries import DICTIONARIES, L1, JumpReLU, TopK, load, read_card
from sparse_jax.errors import InputError
from sparse_jax.lm.load import load as load_model
from sparse_jax.training import member_state, run_ensemble

# 24 steps.
COMMON = {
    "context": 32, "batch": 128, "block_rows": 16, "tokens": 3072, "eval_tokens": 2048, "statistics_tokens": 2048,
    "holdout": 0.2, "compute_dtype": "float32", "log_every": 5, "checkpoint_every": 7, "reuse_memory": False,
    "resample_at": (0.25,), "dead_window": 100, "decoder_bias_start": "geometric-median",
}  # fmt: skip


def flags(model, text, out, dictionary=None, **changes) -> Flags:
    dictionary = dictionary or TopK(expansion=2)
    fields = {
        "model": str(model), "text": str(text), "out": Path(out), "sites": ("resid_post.0", "resid_post.1"),
        "seeds": (0, 1), "sparsities": (2.0, 4.0), "measure_tokens": 512, "measure_at": (0.5, 1.0),
        "learning_rates": (1e-3,), **COMMON,
    }  # fmt: skip
    return Flags(dictionary, **{**fields, **changes})


def test_members_are_all_combinations(tmp_path):
    given = flags("m", "t", tmp_path, learning_rates=(1e-3, 1e-4), expansions=(2, 4))
    made = choices(given)
    assert len(made) == 2 * 2 * 2 * 2 * 2
    assert len({(choice.site, choice.name) for choice in made}) == len(made)
    first, last = made[0], made[-1]
    assert (first.site, first.name) == ("resid_post.0", "k-2_2x_lr-0.001_seed-0")
    assert (first.dictionary, first.sparsity, first.target_l0) == (TopK(expansion=2, k=2), 2.0, None)
    assert (last.site, last.name) == ("resid_post.1", "k-4_4x_lr-0.0001_seed-1")
    assert (last.dictionary, last.seed, last.learning_rate) == (TopK(expansion=4, k=4), 1, 1e-4)


def test_a_wished_l0_leaves_the_coefficient_as_it_is(tmp_path):
    given = flags("m", "t", tmp_path, L1(l1=3.0, n_features=64), sparsities=(), target_l0s=(8.0, 16.0), seeds=(5,))
    made = [choice for choice in choices(given) if choice.site == "resid_post.0"]
    assert [(choice.target_l0, choice.sparsity, choice.dictionary.l1) for choice in made] == [
        (8, 8, 3.0),
        (16, 16, 3.0),
    ]
    assert made[0].name == "target-l0-8_n64_lr-0.001_seed-5"


@pytest.mark.parametrize("kind", sorted(set(DICTIONARIES) - {"pca", "neurons", "random"}))
def test_every_architecture_has_a_knob_at_its_own_value(kind, tmp_path):
    dictionary = DICTIONARIES[kind](expansion=2)
    (choice,) = choices(flags("m", "t", tmp_path, dictionary, sparsities=(), seeds=(0,), sites=("resid_post.0",)))
    coefficients = choice.dictionary.coefficients
    assert coefficients == dictionary.coefficients
    assert choice.sparsity in coefficients.values()
    (other,) = choices(flags("m", "t", tmp_path, dictionary, sparsities=(5.0,), seeds=(0,), sites=("resid_post.0",)))
    assert getattr(other.dictionary, knob(dictionary)) == 5
    assert other.dictionary.coefficients != coefficients


BAD = {
    "no site": ({"sites": ()}, "--sites: give at least one"),
    "no seed": ({"seeds": ()}, "--seeds: give at least one"),
    "no learning rate": ({"learning_rates": ()}, "--learning-rates: give at least one"),
    "a site twice": ({"sites": ("resid_post.0", "blocks.0.hook_resid_post")}, "there twice"),
    "a seed twice": ({"seeds": (1, 1)}, "--seeds 1 1"),
    "a sparsity twice": ({"sparsities": (4.0, 4.0)}, "--sparsities 4 4"),
    "a share twice": ({"measure_at": (0.5, 0.5)}, "--measure-at 0.5 0.5"),
    "two shares of one step": ({"measure_at": (0.5, 0.51, 1.0)}, "--measure-at 0.5 0.51: both are step 12 of the"),
    "two shares of the first step": ({"measure_at": (0.001, 0.04)}, "both are step 1 of the run's 24"),
    "a share beyond the end": ({"measure_at": (1.5,)}, "at most 1"),
    "a negative seed": ({"seeds": (-1,)}, "negative"),
    "half a feature": ({"sparsities": (2.5,)}, "whole number"),
    "no feature": ({"sparsities": (0.0,)}, "whole number"),
    "a negative rate": ({"learning_rates": (1e-3, -1.0)}, "--learning-rates 0.001 -1.0"),
    "no width": ({"expansions": (0,)}, "--expansions 0"),
    "two widths": ({"dictionary": TopK(n_features=64), "expansions": (2,)}, "give one of them"),
    "two sparsities": ({"dictionary": L1(), "target_l0s": (8.0,)}, "give one of them"),
    "a wished L0 without a coefficient": ({"sparsities": (), "target_l0s": (8.0,)}, "no sparsity coefficient"),
    "a negative coefficient": ({"dictionary": JumpReLU(), "sparsities": (-1.0,)}, "cannot be negative"),
    "a wished L0 of nothing": ({"dictionary": L1(), "sparsities": (), "target_l0s": (0.0,)}, "--target-l0s 0"),
    "k above the features": ({"dictionary": TopK(n_features=8), "sparsities": (4.0, 9.0)}, "exceeds the 8 features"),
    "k below where it anneals from": ({"dictionary": TopK(anneal_from=40), "sparsities": (48.0,)}, "--anneal-from"),
    "an unknown site": ({"sites": ("residual.0",)}, "give NAME.LAYER"),
    "tokens below a batch": ({"tokens": 100}, "below one batch"),
    "nothing to measure along the way": ({"measure_tokens": 0}, "--measure-tokens 0"),
    "a bias that is not there": ({"dictionary": L1(decoder_bias=False)}, "no decoder bias"),
    "a share at which nothing is resampled": ({"resample_at": (1.0,)}, "--resample-at"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_flags_are_refused_before_anything_is_loaded(case, tmp_path):
    """The model does not exist: it is not looked for."""
    changes, words = BAD[case]
    with pytest.raises(InputError) as caught:
        sweep.main(flags("./no/such/model", "no-text.txt", tmp_path / "out", **changes))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_only_the_model_decides_is_refused_before_training(model, text, tmp_path):
    for changes, words in (
        ({"sparsities": (33.0,)}, "exceeds the 32 features"),  # two times a width of 16
        ({"sites": ("resid_post.0", "resid_post.7")}, "layers 0 to 1"),
    ):
        with pytest.raises(InputError, match=words):
            sweep.main(flags(model, text, tmp_path / "out", **changes))
        assert not (tmp_path / "out").exists()


# Whole runs


def members_of(out: Path) -> dict[str, dict[str, np.ndarray]]:
    """SITE/NAME -> the parameters of each saved dictionary."""
    root = out / "dictionaries"
    return {str(path.parent.relative_to(root)): load_file(path) for path in root.glob("*/*/params.safetensors")}


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_bits(one: dict[str, np.ndarray], two: dict[str, np.ndarray], words: str) -> None:
    assert one.keys() == two.keys(), words
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=f"{words}: {name}")


@pytest.fixture(scope="module")
def finished(model, text, tmp_path_factory):
    """Two sites x two k x two seeds; `first_biases.npz` holds what each member's decoder bias was before any step."""
    out = tmp_path_factory.mktemp("sweeps") / "whole"

    def watched(states, steps, groups, *others, **options):
        biases = {
            member.name: np.array(member_state(own, i).params["b_dec"])
            for each, own in zip(groups, states)
            for i, member in enumerate(each.members)
        }
        np.savez(out / "first_biases.npz", **biases)
        return run_ensemble(states, steps, groups, *others, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_training, "run_ensemble", watched)
        assert sweep.main(flags(model, text, out)) == 0
    return out


@pytest.mark.slow
def test_a_run_leaves_all_that_is_promised(finished):
    final = json.loads((finished / "metrics.json").read_text())
    names = [f"k-{k}_2x_lr-0.001_seed-{seed}" for k in (2, 4) for seed in (0, 1)]
    sites = ("resid_post.0", "resid_post.1")
    assert [(m["site"], m["name"]) for m in final["members"]] == [(site, name) for site in sites for name in names]
    assert set(members_of(finished)) == {f"{site}/{name}" for site in sites for name in names}
    for member in final["members"]:
        assert {"fvu", "l0", "ce_increase", "dead_fraction", "unmasked", "kl", "shrinkage"} <= set(member)
        assert member["l0"] == pytest.approx(member["sparsity"], abs=0.5)
        folder = finished / "dictionaries" / member["site"] / member["name"]
        card = read_card(folder)["provenance"]
        assert (card["site"], card["seed"], card["order_seed"]) == (member["site"], member["seed"], 0)
        assert load(folder).dictionary.k == member["sparsity"]
    assert [(front["site"], len(front["points"])) for front in final["fronts"]] == [(site, 2) for site in sites]
    point = final["fronts"][0]["points"][1]
    pair = [m["fvu"] for m in final["members"] if m["site"] == sites[0] and m["sparsity"] == point["sparsity"]]
    assert point["fvu"]["mean"] == pytest.approx(np.mean(pair))
    assert (point["fvu"]["count"], point["seeds"]) == (2, [0, 1])
    floors = {(floor["site"], floor["floor"], floor["k"]) for floor in final["floors"]}
    at = [(name, k) for name in ("pca", "neurons", "random") for k in (2, 4)] + [("token_mean", 1)]
    assert floors == {(site, *floor) for site in sites for floor in at}
    along = [line for line in lines_of(finished) if "share" in line]
    assert [(line["step"], line["share"], line["site"], line["name"]) for line in along] == [
        (12, 0.5, site, name) for site in sites for name in names
    ]
    assert along[0]["tokens_evaluated"] < final["members"][0]["tokens_evaluated"]
    config = json.loads((finished / "config.json").read_text())
    assert len(config["resolved"]["members"]) == 8
    page = (finished / "report.html").read_text()
    for site in sites:
        ratio = Statistics.load(finished / "dictionaries" / site / "statistics.npz").mean_over_std
        assert final["mean_over_std"][site] == pytest.approx(ratio)
        assert f"centre-scale; raw ||mean|| / ||std|| {ratio:.3f}" in page
    assert page.count("<svg") == 8  # FVU and CE increase, at the end and along training, for two sites
    assert not list(finished.rglob("*.tmp*"))


@pytest.mark.slow
def test_every_member_of_a_site_starts_at_its_median(finished):
    with np.load(finished / "first_biases.npz") as biases:
        assert len(biases) == 8
        of = {
            site: [biases[name] for name in biases if name.startswith(site)]
            for site in ("resid_post.0", "resid_post.1")
        }
    for one, *others in of.values():
        assert len(others) == 3
        assert np.linalg.norm(one) > 1e-3
        assert all((one == other).all() for other in others)
    assert np.abs(of["resid_post.0"][0] - of["resid_post.1"][0]).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("site", "k", "seed"), [("resid_post.0", 4, 0), ("resid_post.1", 2, 1)])
def test_a_member_is_what_train_sae_makes_of_its_flags(site, k, seed, finished, model, text, tmp_path):
    """Also with a k below the group's largest, another seed than the data's, and features started again on the way."""
    name = f"k-{k}_2x_lr-0.001_seed-{seed}"
    resampled = [line for line in lines_of(finished) if "resampled" in line and line["member"] == f"{site}/{name}"]
    assert [line["step"] for line in resampled] == [6]
    assert resampled[0]["resampled"] > 0 or k == 4  # with that many active, no feature is silent for long
    given = train_sae.Flags(
        TopK(expansion=2, k=k), model=str(model), text=str(text), out=tmp_path / "alone", site=site, seed=seed,
        learning_rate=1e-3, order_seed=0, report_features=0, **COMMON,
    )  # fmt: skip
    assert train_sae.main(given) == 0
    alone = load_file(tmp_path / "alone" / "dictionaries" / site / "params.safetensors")
    assert_same_bits(members_of(finished)[f"{site}/{name}"], alone, name)
    final = json.loads((finished / "metrics.json").read_text())
    (member,) = (m for m in final["members"] if (m["site"], m["name"]) == (site, name))
    single = json.loads((tmp_path / "alone" / "metrics.json").read_text())
    for figure in ("fvu", "l0", "ce_increase", "kl", "dead_fraction", "tokens_evaluated", "tokens_trained"):
        assert member[figure] == pytest.approx(single[figure], rel=1e-5, abs=1e-6), figure
    assert member["unmasked"]["fvu"] == pytest.approx(single["unmasked"]["fvu"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [5, 13])
def test_an_interrupted_sweep_ends_with_the_same_bits(steps, finished, model, text, tmp_path, monkeypatch, capsys):
    """Stopped before and after the measurement half-way, not at a checkpoint's step."""
    out, asked = tmp_path / "stopped", iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(command.StopRequest, "__call__", lambda self: next(asked) >= steps)
        assert sweep.main(flags(model, text, out)) == command.EXIT_INTERRUPTED
    assert f"saved at step {steps} of 24; continue with --resume" in capsys.readouterr().out
    assert not (out / "metrics.json").exists()
    with pytest.raises(InputError, match=r"seeds: \[0, 1\] there, \[0, 2\] now"):
        sweep.main(flags(model, text, out, resume=True, seeds=(0, 2)))
    with pytest.raises(InputError, match="already holds a run"):
        sweep.main(flags(model, text, out))
    assert sweep.main(flags(model, text, out, resume=True)) == 0
    whole, resumed = members_of(finished), members_of(out)
    assert whole.keys() == resumed.keys()
    for name in whole:
        assert_same_bits(whole[name], resumed[name], name)
    assert [line for line in lines_of(out) if "share" in line] == [
        line for line in lines_of(finished) if "share" in line
    ]
    one, two = (json.loads((folder / "metrics.json").read_text()) for folder in (finished, out))
    assert one["members"] == two["members"]
    assert one["floors"] == two["floors"]


@pytest.mark.slow
def test_coefficients_are_moved_to_wished_l0s(model, text, tmp_path):
    given = flags(
        model, text, tmp_path / "out", L1(expansion=4, l1=0.5), sites=("resid_post.0",), sparsities=(),
        target_l0s=(6.0, 12.0), tokens=16_384, measure_at=(1.0,),
        drop_outliers=True, learning_rates=(1e-2,),
    )  # fmt: skip
    assert sweep.main(given) == 0
    final = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert final["knob"] == "target L0"
    (front,) = final["fronts"]
    assert [point["sparsity"] for point in front["points"]] == [6.0, 12.0]
    assert front["points"][0]["l0"]["high"] < front["points"][1]["l0"]["low"]
    card = read_card(tmp_path / "out" / "dictionaries" / "resid_post.0" / "target-l0-6_4x_lr-0.01_seed-0")
    assert card["provenance"]["max_norm"] == pytest.approx(final["masks"]["resid_post.0"]["outlier_norm"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "along training" not in page


@pytest.mark.slow
def test_a_member_can_stand_in_for_its_site_with_the_mean_of_its_training(finished, model):
    folder = finished / "dictionaries" / "resid_post.1" / "k-4_2x_lr-0.001_seed-1"
    config = load_model(str(model)).config
    read = load_replacement(folder, read_provenance(folder), config, "", allow_other=True)
    statistics = Statistics.load(finished / "dictionaries" / "resid_post.1" / "statistics.npz")
    assert str(read.site) == "resid_post.1"
    np.testing.assert_array_equal(read.mean, statistics.mean)


@pytest.mark.slow
def test_what_a_sweep_has_saved_is_named_where_one_dictionary_is_wanted(finished):
    with pytest.raises(InputError, match="holds 8 dictionaries; give one of"):
        load(finished)
    with pytest.raises(InputError, match="no run of train_sae: its flags have expansions"):
        contexts.main(contexts.Flags(run=finished))
