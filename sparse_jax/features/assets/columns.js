// What the columns are: how they sort, what a cell holds.

const dots = (tokens) => element("span", { class: "tokens" }, ...tokens.map((token) =>
  element("bdi", { class: "tok", text: visible(data.strings[token]) })));
const first = (at) => data.tops[at].length ? data.strings[data.tops[at][0]].trim().toLowerCase() : null;

function densityCell(at, [low, high]) {
  const value = data.density[at];
  const cell = element("span", { class: "gauge", text: value ? percent(value) : "never" });
  const share = value > 0 ? 0.06 + 0.94 * Math.log(value / low) / Math.log(high / low || 2) : 0;
  cell.style.setProperty("--w", Math.max(0, Math.min(1, high > low ? share : value > 0 ? 1 : 0)).toFixed(3));
  return cell;
}

// The size of a typical value: it decides how many decimals all of its column have.
function middle(values) {
  const sizes = values.filter(Boolean).map(Math.abs).sort((a, b) => a - b);
  return sizes.length ? sizes[sizes.length >> 1] : 0;
}

function describeFields() {
  const positive = data.density.filter((value) => value > 0);
  const range = [positive.reduce((a, b) => Math.min(a, b), Infinity), positive.reduce((a, b) => Math.max(a, b), 0)];
  const outliers = new Set(data.outliers);
  const hints = new Map(data.scoreHints);
  const numeric = (name, values, hint) => {
    const typical = middle(values);
    return { name, hint, kind: "n", down: true, value: (at) => values[at], cell: (at) => aligned(values[at], typical) };
  };
  const called = ([name, values]) => {
    const texts = values.map((value) => value === null ? null : data.strings[value]);
    const wide = texts.some((text) => text !== null && text.length > 14);
    return { name: plain(name), hint: hints.get(name), kind: wide ? "wider" : "tag", extra: true,
      value: (at) => texts[at]?.toLowerCase() ?? null, cell: (at) => texts[at] === null ? "–"
        : element("span", { title: plain(texts[at]), dir: "auto", text: plain(texts[at]) }) };
  };
  const tags = data.tags.map(called);
  const whole = (values) => values.every((value) => value === null || Number.isInteger(value));
  const scores = data.scores.map(([name, values]) => ({ ...numeric(plain(name), values, hints.get(name)), extra: true,
    ...whole(values) ? { cell: (at) => short(values[at]) } : {} }));
  return [
    { name: data.noun[0], kind: "id", value: (at) => data.numbers[at], cell: (at) => link(data.numbers[at]) },
    ...tags.filter(({ kind }) => kind === "tag"),
    ...tags.length ? scores : [], // where there are names, figures stand beside them
    ...tags.filter(({ kind }) => kind === "wider"),
    data.tops.some((tops) => tops.length) && { name: "Top tokens", kind: "wide", value: first,
      cell: (at) => dots(data.tops[at]) },
    data.explanations && { name: "Explanation", kind: "wider", extra: true,
      value: (at) => data.explanations[at].toLowerCase() || null,
      cell: (at) => element("span", { title: plain(data.explanations[at]), dir: "auto",
        text: plain(data.explanations[at]) }) },
    { name: "Density", hint: "share of tokens on which it fires; the bar is logarithmic", kind: "n", down: true,
      value: (at) => data.density[at], cell: (at) => densityCell(at, range) },
    numeric("Max", data.maximum, "largest activation"),
    data.effect && { ...numeric(plain(data.effectName), data.effect, data.effectHint), extra: true },
    ...tags.length ? [] : scores,
    data.outliers.length && { name: "Outlier", kind: "n", down: true, extra: true, value: (at) => outliers.has(at) ? 1 : 0,
      cell: (at) => outliers.has(at) ? element("span", { class: "flag", text: "outlier" }) : "" },
  ].filter(Boolean);
}

function drawHead() {
  table.prepend(element("colgroup", {}, ...fields.map(({ kind, extra }) =>
    element("col", { class: extra ? `${kind} extra` : kind }))));
  head.append(element("tr", {}, ...fields.map(({ name, hint, kind, extra }, i) => element("th",
    { scope: "col", class: extra ? `${kind} extra` : kind, title: hint && plain(hint) },
    element("button", { type: "button", text: name, on: { click: () => sortBy(i) } })))));
  // No narrower than its columns need, in rem: wide screens and narrow ones.
  const least = (widths) => fields.reduce((sum, { kind }) => sum + widths[kind], 0);
  table.style.setProperty("--least", least({ id: 6.2, n: 6.6, tag: 8.6, wide: 16, wider: 16 }));
  table.style.setProperty("--least-narrow", least({ id: 5.4, n: 6, tag: 7, wide: 11, wider: 0 }));
}
