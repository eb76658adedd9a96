"""Search by task: the feature that carries the answer comes first; estimates and ablations against brute force."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_jax.features.prompts import make_prompts
from sparse_jax.features.search_task import Task, ablate, attribute, search_task
from sparse_jax.lm import Edit, Site, forward, put
from tests.features import planted as p

TALL, SHORT = p.token(" tall"), p.token(" short")


@pytest.fixture(scope="module")
def made():
    return p.planted()


def task_of(texts, right=TALL, wrong=SHORT):
    prompts = make_prompts(p.Words().encode(texts), longest=p.CONTEXT, length=12)
    return Task(prompts, np.full(len(texts), right, np.int32), np.full(len(texts), wrong, np.int32))


@pytest.fixture(scope="module")
def task():
    words = [s for s in p.strings()[40:] if s.startswith(" ")]
    generator = np.random.default_rng(0)
    return task_of(["".join(generator.choice(words, generator.integers(1, 9))) + " Anna is" for _ in range(11)])


def brute_force(made, task, feature, last_only, site=p.SITE):
    """`[prompts, 3]` changes of logit difference, cross-entropy and KL: whole passes, the activation put in by hand."""
    prompts, coder = task.prompts, made.coder
    clean = forward(made.lm, prompts.tokens, capture=[site])
    value = np.asarray(clean.captured[str(site)])
    codes = np.asarray(coder.encode(jnp.array(value.reshape(-1, p.D))))[:, feature].reshape(prompts.tokens.shape)
    codes = np.maximum(codes, 0) * prompts.mask
    if last_only:
        codes = codes * (np.arange(codes.shape[1]) == prompts.last[:, None])
    taken = codes[..., None] * np.asarray(coder.directions())[feature]
    new = jnp.array(value - taken.reshape(value.shape), jnp.float32)
    edited = forward(made.lm, prompts.tokens, edits=[Edit(site, put, (new,))])
    found = []
    for i, (last, right, wrong) in enumerate(zip(prompts.last, task.right, task.wrong)):
        before, after = (np.array(jax.nn.log_softmax(o.logits[i, last]), np.float64) for o in (clean, edited))
        difference = (after[right] - after[wrong]) - (before[right] - before[wrong])
        found.append([difference, before[right] - after[right], np.sum(np.exp(before) * (before - after))])
    return np.array(found)


def test_padding_behind_a_prompt_changes_nothing(made, task):
    i = int(np.argmin(task.prompts.last))
    row = task.prompts.tokens[i]
    whole, cut = (forward(made.lm, row[None, :end]).logits[0] for end in (None, task.prompts.last[i] + 1))
    assert len(cut) < len(whole)
    np.testing.assert_allclose(whole[: len(cut)], cut, atol=1e-5)


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("by", ["logit_difference", "cross_entropy", "kl"])
def test_the_planted_feature_is_first(made, task, by, last_only):
    found = search_task(made.lm, made.coder, p.SITE, task, by=by, verify=12, last_only=last_only)
    assert found.features[0] == p.ANSWER
    assert len(found.features) == min(12, (found.attribution.active > 0).sum())
    harm = -found.changes.logit_difference if by == "logit_difference" else getattr(found.changes, by)
    assert (np.diff(harm) <= 0).all()
    if by != "kl":
        assert harm[0] > 0 > harm[list(found.features).index(p.WRONG)]
    # What fires at the same places, three times as strongly, and causes nothing is not taken for a cause.
    every = search_task(made.lm, made.coder, p.SITE, task, by=by, verify=None, last_only=last_only)
    assert every.features[0] == p.ANSWER
    twin = list(every.features).index(p.TWIN)
    assert abs(every.changes.logit_difference[twin]) < 0.2 * abs(every.changes.logit_difference[0])


def test_every_active_feature_is_ablated(made, task):
    found = search_task(made.lm, made.coder, p.SITE, task, verify=None)
    assert set(found.features) == set(np.flatnonzero(found.attribution.active))
    assert 10 < len(found.features) < p.N_FEATURES
    assert found.attribution.active[p.ANSWER] == found.attribution.active[p.TWIN] == len(task.prompts)
    assert found.attribution.active[p.TOKEN] == 0


@pytest.mark.parametrize("last_only", [False, True])
def test_true_ablation_is_brute_force(made, task, last_only):
    features = [p.ANSWER, p.WRONG, p.TWIN, p.POSITION, *range(0, 80, 7), p.TOKEN]
    changes, errors = ablate(made.lm, made.coder, p.SITE, task, features, last_only=last_only)
    moved = 0
    for i, feature in enumerate(features):
        due = brute_force(made, task, feature, last_only)
        np.testing.assert_allclose([c[i] for c in changes], due.mean(axis=0), atol=2e-5)
        error = due.std(axis=0, ddof=1) / np.sqrt(len(due))
        np.testing.assert_allclose([c[i] for c in errors], error, atol=2e-5)
        moved += abs(due[:, 0]).max() > 1e-3
    assert moved >= 4
    assert changes.kl[0] > 0.05


@pytest.mark.parametrize("last_only", [False, True])
def test_estimates_are_derivatives(made, task, last_only):
    """- sum c d.g is the slope along - c d: taking out a hundredth of each feature changes a hundredth of it."""
    estimate = attribute(made.lm, made.coder, p.SITE, task, last_only=last_only)
    share, features = 0.02, [p.ANSWER, p.WRONG, p.TWIN, *range(3, 80, 12)]
    for feature in features:
        slopes = []
        for sign in (1, -1):
            W_dec = made.coder.params["W_dec"] * sign * share
            part = dataclasses.replace(made.coder, params=made.coder.params | {"W_dec": W_dec})
            slopes.append(ablate(made.lm, part, p.SITE, task, [feature], last_only=last_only)[0])
        for figure in ("logit_difference", "cross_entropy"):
            up, down = (getattr(s, figure)[0] for s in slopes)
            due = (up - down) / (2 * share)
            np.testing.assert_allclose(getattr(estimate, figure)[feature], due, rtol=2e-3, atol=3e-5)
    assert abs(estimate.logit_difference[p.ANSWER]) > 0.1


def test_clean_figures(made, task):
    estimate = attribute(made.lm, made.coder, p.SITE, task)
    logs = []
    for tokens, last in zip(task.prompts.tokens, task.prompts.last):
        logits = forward(made.lm, jnp.array(tokens[None, : last + 1])).logits[0, -1]
        logs.append(np.asarray(jax.nn.log_softmax(logits))[[TALL, SHORT]])
    logs = np.array(logs)
    np.testing.assert_allclose(estimate.clean_logit_difference, (logs[:, 0] - logs[:, 1]).mean(), rtol=1e-5)
    np.testing.assert_allclose(estimate.clean_cross_entropy, -logs[:, 0].mean(), rtol=1e-5)


def test_a_site_inside_a_block(made, task):
    """Heads are taken apart again, and the rest of the block is run."""
    site = Site("attn_z", 1)
    coder = made.coder  # reads 160 numbers, as many as two heads of 80 have
    features = [3, 7, 11, 15]
    changes, _ = ablate(made.lm, coder, site, task, features)
    for i, feature in enumerate(features):
        due = brute_force(made, task, feature, False, site).mean(axis=0)
        np.testing.assert_allclose([c[i] for c in changes], due, atol=1e-5)
    assert np.abs(changes.logit_difference).max() > 1e-4


def test_masked_places_are_not_ablated(made):
    """At the first position nothing is taken out, nor where the activation's norm is too large."""
    task = task_of([" bade bade", " bade is"])
    none = dataclasses.replace(task.prompts, mask=np.zeros_like(task.prompts.mask))
    changes, _ = ablate(made.lm, made.coder, p.SITE, task._replace(prompts=none), [p.WRONG])
    assert changes.kl[0] == pytest.approx(0, abs=1e-7)
    for limit, moves in ((1e-3, False), (1e3, True)):
        changes, _ = ablate(made.lm, made.coder, p.SITE, task, [p.WRONG], max_norm=limit)
        assert (abs(changes.logit_difference[0]) > 0.01) == moves


def test_a_single_prompt_has_no_error(made):
    task = task_of([" bade Anna is"])
    found = search_task(made.lm, made.coder, p.SITE, task)
    assert found.features[0] == p.ANSWER
    assert np.isnan(found.errors.logit_difference).all()
