"""Pages of connections: what they say against plain counting, and hostile tokens as inert data."""

import dataclasses
import json
import re

import numpy as np
import pytest

from sparse_jax.connectors.code_columns import hidden_columns
from sparse_jax.connectors.code_panels import ReadText, column_panels
from sparse_jax.connectors.connection import connections
from sparse_jax.connectors.connection_pages import connection_panel, label_tag, used_inputs, write_connection_pages
from sparse_jax.connectors.mlp import MLP
from sparse_jax.connectors.paired_codes import Tokens
from sparse_jax.errors import InputError
from sparse_jax.features.panel_html import panel_html
from sparse_jax.features.sections import Cells, Line, Texts
from tests.connectors.connection_texts import CONTEXT, HOSTILE, SITES, input_panels, made, strings


@pytest.fixture(scope="module")
def panels():
    m = made()
    its = input_panels()
    return [
        connection_panel(panel, connection, its, m.read, m.fires)
        for panel, connection in zip(column_panels(m.fires, m.read), m.connections)
    ]


def test_connections_are_counted():
    m = made()
    on, fires = m.inputs.toarray() > 0, m.fires.toarray() > 0
    assert [c.label for c in m.connections] == ["OR", "AND-NOT", "no inputs", "weighted sum"]
    for j, connection in enumerate(m.connections):
        assert connection.fired == fires[:, j].sum()
        for term, use in zip(connection.formula.terms, connection.uses, strict=True):
            codes = m.inputs.toarray()[:, term.row]
            assert (use.tokens, use.both) == (on[:, term.row].sum(), (on[:, term.row] & fires[:, j]).sum())
            assert use.mean == pytest.approx(codes[codes > 0].mean(), rel=1e-5)
    assert m.connections[0].formula.text() == "OF 0 = 0.26 resid_pre.3 IF 0 + 0.23 <b>mlp</b> IF 1"
    assert m.connections[1].overlap == pytest.approx((on[:, 1] & on[:, 2]).sum() / on[:, 2].sum())
    assert (m.connections[2].r2, m.connections[0].r2) == (None, 0.9)
    assert m.connections[0].outputs == (("OF 0", 0.5), ("OF 1", -0.25))
    assert used_inputs(m.connections).tolist() == [0, 1, 2, 3, 6]
    assert used_inputs(m.connections, 1).tolist() == [0, 2, 3]


def test_panels_are_those_of_the_codes():
    m = made()
    codes = m.inputs.toarray()
    tokens, _, mask, documents = m.text[np.arange(len(m.text))]
    grid = np.zeros((*mask.shape, 8), np.float32)
    grid[mask] = codes
    for panel in column_panels(m.inputs, m.read, [6, 1]):
        its = codes[:, panel.index]
        assert panel.density == pytest.approx((its > 0).mean())
        assert (panel.maximum, panel.mean) == (its.max(), pytest.approx(its[its > 0].mean(), rel=1e-5))
        assert panel.contexts[0].context.activations[panel.contexts[0].context.peak] == its.max()
        rows = set()
        for passage in panel.contexts:
            c = passage.context
            row, position = np.argwhere(grid[..., panel.index] == np.float32(c.activations[c.peak]))[0]
            shown = slice(max(0, position - 14), min(CONTEXT, position + 7))
            assert c.tokens == tuple(strings(tokens[row, shown]))
            np.testing.assert_array_equal(np.float32(c.activations), grid[row, shown, panel.index])
            assert c.source == m.text.documents[documents[row, position]]
            rows.add(row)
        assert len(rows) == len(panel.contexts) == 11
        ids = tokens[mask]
        sums = {i: its[ids == i].sum() for i in np.unique(ids)}
        best = sorted(sums, key=lambda i: -sums[i])[:8]
        assert [token for token, _ in panel.top_tokens] == strings(best)
        assert panel.top_tokens[0][1] == pytest.approx(its[(ids == best[0]) & (its > 0)].mean(), rel=1e-5)


def test_codes_in_any_order_of_tokens_are_found():
    m = made()
    order = np.random.default_rng(0).permutation(len(m.pair))
    read = ReadText(
        Tokens(*(getattr(m.pair.tokens, n)[order] for n in ("token", "document", "row", "position"))), m.text, strings
    )
    column = m.inputs.toarray()[:, 6]
    chosen = np.array([5, 700])
    inverse = np.argsort(order)
    assert m.read.contexts(column, chosen, ["a", "b"]) == read.contexts(column[order], inverse[chosen], ["a", "b"])


def test_a_feature_that_never_fires_has_a_panel(panels):
    assert (panels[3].density, panels[3].contexts, panels[3].top_tokens, panels[3].mean) == (0, (), (), None)


def test_removal_and_needs_stand_beside_the_texts():
    m = made()
    changes = np.arange(CONTEXT) / 10
    panel, = column_panels(
        m.fires, m.read, [0], changes_of=lambda feature, rows: {int(row): changes + row for row in rows},
        needs_of=lambda feature, rows, positions: ((feature, rows.tolist(), positions.tolist()),),
    )  # fmt: skip
    rows = m.pair.tokens.row[np.argsort(-m.fires.toarray()[:, 0], kind="stable")]
    first = panel.contexts[0]
    at = int(m.pair.tokens.position[m.fires.toarray()[:, 0].argmax()])
    assert first.effects[first.context.peak] == pytest.approx(changes[at] + rows[0])
    assert len(first.effects) == len(first.context.tokens)
    feature, its, positions = panel.needs[0]
    assert (feature, its[0], positions[0], len(its)) == (0, rows[0], at, 2)


def test_the_sections(panels):
    line, label = panels[0].lead
    assert isinstance(line, Line)
    assert [piece[0] for piece in line.pieces] == ["OF 0 =", "0.26 resid_pre.3 IF 0", "+ 0.23 <b>mlp</b> IF 1"]
    assert [piece[1] for piece in line.pieces] == [0, 0.26, 0.23]
    texts = [s for s in panels[0].sections if isinstance(s, Texts)]
    assert [piece[2] for piece in line.pieces] == ["", texts[0].title, texts[1].title]
    its = input_panels()
    assert texts[0].contexts == tuple(p.context for p in its[0].contexts[:4])
    assert texts[1].maximum == its[6].maximum
    assert label.rows[0][:3] == ("no positive input", float(made().connections[0].evidence[0].tokens), 0.0)
    assert "g = 0.3, interval 0.2 to 0.4." in panels[1].lead[0].note
    assert "P(A | B) = " in panels[1].lead[1].note
    assert dict(panels[1].tags) | {"formula": ""} == {"label": "AND-NOT", "class": "nonlinear", "formula": ""}
    assert dict(panels[1].scores) == {"R²": 0.5, "g": 0.3, "inputs": 2, "+": 1, "−": 1}
    assert [p[0] for p in panels[1].lead[0].pieces] == [
        "OF 1 =",
        "− 5.00 resid_pre.3 IF 2",
        "+ 1.50 resid_pre.3 IF 1",
        "− 0.20",
    ]
    assert [p[0] for p in panels[2].lead[0].pieces] == ["OF 2 =", "0.10"]
    ways = [s for s in panels[1].sections if isinstance(s, Cells) and s.shaded]
    assert len(ways[0].rows) == len(made().connections[1].clusters.clusters) >= 2
    # Texts of a cluster are shaded by the target.
    stopped = [s for s in panels[1].sections if isinstance(s, Texts) and "stopped" in s.title]
    assert all(c.activations[c.peak] == 0 for c in stopped[0].contexts)
    few = dataclasses.replace(made().connections[3], note="too few tokens for OR")
    assert (label_tag(few), label_tag(made().connections[3])) == ("weighted sum *", "weighted sum")


def test_the_pages_hold_it_inert(tmp_path, panels):
    m = made()
    path = write_connection_pages(
        tmp_path / "pages", HOSTILE[0], zip(column_panels(m.fires, m.read), m.connections), input_panels(),
        read=m.read, fires=m.fires,
    )  # fmt: skip
    for file in path.parent.iterdir():
        text = file.read_text("ascii" if file.suffix == ".js" else "utf-8")
        assert "<img src" not in text
        assert HOSTILE[0] not in text
    shard = (path.parent / "shard-000.js").read_text("ascii")
    assert "<" not in shard
    _, strings_, packed = json.loads("[" + re.fullmatch(r"\w+\((.*)\);\n", shard)[1] + "]")
    line = packed[0]["lead"][0]
    assert [strings_[piece[0]] for piece in line["pieces"]][1] == "0.26 resid_pre.3 IF 0"
    index = json.loads(re.search(r"\((.*)\);\n", (path.parent / "index-data.js").read_text("ascii"))[1])
    columns = {name: [None if i is None else index["strings"][i] for i in values] for name, values in index["tags"]}
    assert columns["label"] == ["OR", "AND-NOT", "no inputs", "weighted sum"]
    assert columns["class"] == ["linear", "nonlinear", "unexplained", None]
    assert index["noun"] == ["Target", "targets"]


def test_a_notebook_shows_it_escaped(panels):
    shown = panel_html(panels[1])
    assert "<img" not in shown
    assert "<b>mlp" not in panel_html(panels[0])
    assert "AND-NOT: it fires" in shown
    assert "− 5.00 resid_pre.3 IF 2" in shown
    assert shown.count("<details") == sum(isinstance(s, Texts) for s in panels[1].sections)


def test_hidden_units_are_targets():
    import jax

    m = made()
    mlp = MLP(n_features=6, d_in=8, d_out=4)
    params = mlp.init(jax.random.key(0))
    params["b_enc"] = params["b_enc"] - 0.1
    hidden = hidden_columns(mlp, params, m.pair.inputs)
    expected = np.maximum(m.inputs.toarray() @ np.asarray(params["W_enc"]) + np.asarray(params["b_enc"]), 0)
    np.testing.assert_allclose(hidden.toarray(), expected, atol=1e-5)
    some = hidden_columns(mlp, params, m.pair.inputs, np.array([4, 1]))
    np.testing.assert_allclose(some.toarray(), expected[:, [4, 1]], atol=1e-5)
    with pytest.raises(InputError, match="hidden units 0 to 6"):
        hidden_columns(mlp, params, m.pair.inputs, np.array([0, 6]))
    found = connections(
        np.asarray(params["W_enc"]), m.inputs, hidden, SITES, target="hidden", bias=np.asarray(params["b_enc"]),
        relu=True, outputs=np.asarray(params["W_dec"]), targets=[2],
    )  # fmt: skip
    panel = connection_panel(next(iter(column_panels(hidden, m.read, [2]))), found[0], input_panels())
    assert panel.lead[0].pieces[0][0] == "hidden 2 = ReLU("
    assert panel.lead[0].pieces[-1][0] == ")"
    assert [s.title for s in panel.sections][:2] == ["Inputs", "Targets"]


def test_input_that_does_not_fit_is_refused():
    m = made()
    with pytest.raises(InputError, match="fit"):
        connections(m.W.T, m.inputs, m.fires, SITES)
    with pytest.raises(InputError, match="r2"):
        connections(m.W, m.inputs, m.fires, SITES, r2=np.ones(3))
    with pytest.raises(InputError, match="connection of 1"):
        connection_panel(next(iter(column_panels(m.fires, m.read, [0]))), m.connections[1], {})
    with pytest.raises(InputError, match="features 4"):
        next(iter(column_panels(m.fires, m.read, [4])))
    with pytest.raises(InputError, match="rows"):
        ReadText(m.pair.tokens, _shorter(m.text), strings)


def _shorter(text):

    return dataclasses.replace(text, stream=text.stream[: 10 * CONTEXT + 1])
