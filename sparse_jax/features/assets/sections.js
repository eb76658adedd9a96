// Parts of a panel that are not of every feature: a shaded line, a table, texts of another feature behind a fold.

// `folds`: title -> the texts that a piece of the line opens.
function lineSection({ title, note, pieces }, strings, folds) {
  const largest = largestOf(pieces.map(([, value]) => value));
  const line = pieces.map(([text, value, opens]) => {
    const piece = shaded(strings[text], value, largest, value ? signed(value) : undefined);
    if (opens === "" || !folds.has(opens)) return piece;
    return element("button", { type: "button", class: "piece", on: { click: () => {
      const fold = folds.get(opens);
      fold.open = true;
      fold.scrollIntoView({ block: "nearest" });
      fold.querySelector("summary").focus({ preventScroll: true });
    } } }, piece);
  });
  const spaced = line.flatMap((piece, i) => i ? [" ", piece] : [piece]);
  return block(plain(strings[title]), note === undefined ? null : plain(strings[note]),
    element("p", { class: "line" }, ...spaced));
}

function cellsSection({ title, note, columns: names, rows: lines, shaded: shade }, strings) {
  const numbers = (row) => row.filter((cell) => typeof cell === "number");
  const largest = largestOf(lines.flatMap(numbers));
  const text = (cell) => Array.isArray(cell);
  const written = (cell) => text(cell) ? element("bdi", { text: visible(strings[cell[0]]) })
    : shade && cell !== null ? shaded(short(cell), cell, largest) : short(cell);
  // Numbers of a column have equally many decimals; whole ones have none.
  const scales = names.map((_, i) => lines.map((row) => row[i]).filter((each) => typeof each === "number"))
    .map((column) => column.every(Number.isInteger) || shade ? null : largestOf(column));
  const numeric = names.map((_, i) => i > 0 && !lines.some((row) => text(row[i])));
  const inColumn = (each, i) => scales[i] !== null && typeof each === "number" ? aligned(each, scales[i]) : written(each);
  const cell = (tag, content, i) => element(tag, { class: numeric[i] ? "n" : undefined,
    scope: tag === "th" ? "row" : undefined }, content);
  const head = element("tr", {}, ...names.map((name, i) => element("th", { scope: "col",
    class: numeric[i] ? "n" : undefined, text: plain(strings[name]) })));
  const made = element("table", { class: "cells", "aria-label": plain(strings[title]) }, element("thead", {}, head),
    element("tbody", {}, ...lines.map((row) => element("tr", {}, ...row.map((each, i) =>
      cell(i ? "td" : "th", inColumn(each, i), i))))));
  return block(plain(strings[title]), note === undefined ? null : plain(strings[note]),
    element("div", { class: "scroll", tabindex: "0" }, made));
}

// The texts are drawn when they are first opened.
function foldedTexts({ title, note, contexts, maximum, open }, strings) {
  const line = ([, peak, tokens, values]) => ({ value: aligned(values[peak], maximum),
    spans: tokens.map((token, i) => shaded(strings[token], values[i], maximum, short(values[i]), i === peak)) });
  const fold = element("details", { class: "fold" }, element("summary", {}, element("bdi", { class: "folded",
    text: plain(strings[title]) }), note === undefined ? null
    : element("bdi", { class: "note", text: ` ${plain(strings[note])}` })));
  const draw = () => {
    if (fold.open && fold.children.length === 1) fold.append(texts(contexts, strings, line));
  };
  fold.addEventListener("toggle", draw);
  if (open) fold.open = true;
  draw();
  return fold;
}

// All sections of a panel: those that stand above its texts, and those below.
function sectionsOf(panel, strings) {
  const all = [...panel.lead ?? [], ...panel.sections ?? []];
  const folds = new Map(all.filter(({ kind }) => kind === "texts").map((each) =>
    [each.title, foldedTexts(each, strings)]));
  const made = (each) => each.kind === "line" ? lineSection(each, strings, folds)
    : each.kind === "cells" ? cellsSection(each, strings) : folds.get(each.title);
  return [(panel.lead ?? []).map(made), (panel.sections ?? []).map(made)];
}
