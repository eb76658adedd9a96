// The panel of a feature. Parts that were not measured are absent from its data, and not shown.

const block = (title, note, ...children) => element("section", { class: "part" }, element("h3", { text: title }),
  note ? element("p", { class: "note", text: note }) : null, ...children);

// Buttons of which one is chosen; `choose` draws what it stands for.
function choice(label, names, choose) {
  const buttons = names.map((name, i) => element("button", { type: "button", text: name, "aria-pressed": String(!i),
    on: { click: () => pick(i) } }));
  const pick = (chosen) => {
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(i === chosen)));
    choose(chosen);
  };
  return element("div", { class: "choice", role: "group", "aria-label": label }, ...buttons);
}

const largestOf = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value ?? 0)), 0);

// Tokens, or links, with a bar as long as their value is large.
function bars(rows, format, name, kind = "bars", largest = largestOf(rows.map((row) => row.value))) {
  return element("ol", { class: kind, "aria-label": name }, ...rows.map(({ label, value, more, end }) => {
    const bar = element("span", { class: value < 0 ? "bar neg" : "bar", "aria-hidden": "true" });
    bar.style.setProperty("--w", largest ? Math.abs(value ?? 0) / largest : 0);
    return element("li", {}, element("span", { class: "what" }, label, more ?? null), end ?? null, bar,
      element("span", { class: "n", text: format(value, largest) }));
  }));
}

const tokenBars = (pairs, strings, name, largest) => bars(
  pairs.map(([token, value]) => ({ label: element("bdi", { class: "tok", text: visible(strings[token]) }), value })),
  (value) => (value > 0 ? "+" : "") + aligned(value, largest), name, "bars", largest);

// Columns of counts in layers, the first at the bottom. `shares`: every column is as high as the others.
function columns(edges, layers, shares) {
  const bins = edges.length - 1;
  const sums = Array.from({ length: bins }, (_, bin) => layers.reduce((sum, layer) => sum + layer.counts[bin], 0));
  const highest = Math.max(...sums, 1);
  const plot = element("div", { class: "plot", "aria-hidden": "true" });
  sums.forEach((sum, bin) => {
    const from = `${short(edges[bin])} to ${short(edges[bin + 1])}: ${short(sum)}`;
    const parts = layers.filter((layer) => layer.name && layer.counts[bin])
      .map((layer) => `${layer.name} ${short(layer.counts[bin])}`);
    const column = element("div", { class: "column", title: [from, ...parts].join("\n") });
    layers.forEach((layer) => {
      if (!layer.counts[bin]) return;
      const piece = element("i", { class: layer.colour });
      piece.style.setProperty("height", `${100 * layer.counts[bin] / (shares ? sum : highest)}%`);
      column.append(piece);
    });
    plot.append(column);
  });
  const axis = element("div", { class: "axis", "aria-hidden": "true" });
  for (let tick = 0; tick <= 4; tick++) {
    const edge = Math.round(tick * bins / 4);
    if (tick && edge === Math.round((tick - 1) * bins / 4)) continue;
    const label = element("span", { text: short(edges[edge]) });
    label.style.setProperty("left", `${100 * edge / bins}%`);
    axis.append(label);
  }
  return element("div", { class: "columns" }, element("span", { class: "high", "aria-hidden": "true",
    text: shares ? "100 %" : short(highest) }), plot, axis);
}

function histogramOf(edges, layers, name, tokens) {
  const total = layers.reduce((sum, layer) => sum + layer.counts.reduce((a, b) => a + b, 0), 0);
  const said = `${name}: ${short(total)} from ${short(edges[0])} to ${short(edges.at(-1))}.`;
  const hold = element("div", { role: "img", "aria-label": [said, ...layers.filter((layer) => layer.name).map((layer) =>
    `${layer.name}: ${short(layer.counts.reduce((a, b) => a + b, 0))}.`)].join(" ") });
  const draw = (shares) => hold.replaceChildren(columns(edges, layers, Boolean(shares)));
  draw(0);
  const made = element("div", { class: "histogram" }, hold);
  if (tokens) {
    made.prepend(choice("height of the columns", ["counts", "shares"], draw));
    made.append(element("ul", { class: "legend" }, ...layers.map((layer) => element("li", {},
      element("i", { class: layer.colour }), element("bdi", { class: "tok", text: layer.name })))));
  }
  return made;
}

function tokenHistogram({ edges, tokens, counts, rest }, strings) {
  const layers = tokens.map((token, i) => ({ name: visible(strings[token]), counts: counts[i], colour: `s${i}` }));
  if (rest.some(Boolean)) layers.push({ name: "other tokens", counts: rest, colour: "rest" });
  return block("Activations", null, histogramOf(edges, layers, "firings by activation", true));
}

// Lines of text in groups of one label. `line` gives the value that stands before each and the shaded tokens.
function texts(contexts, strings, line) {
  const groups = [];
  for (const context of contexts) {
    if (groups.at(-1)?.label !== context[0]) groups.push({ label: context[0], contexts: [] });
    groups.at(-1).contexts.push(context);
  }
  return element("div", { class: "texts" }, ...groups.map(({ label, contexts: some }) => {
    const lines = some.map((context) => {
      const { value, spans } = line(context);
      const source = plain(strings[context[4]]);
      return element("li", {}, element("span", { class: "act", text: value }), element("p", { class: "txt" }, ...spans),
        source ? element("span", { class: "src", title: source, text: source }) : null);
    });
    return element("div", { class: "group" }, element("h4", { text: plain(strings[label]) }),
      element("ol", { class: "ctx" }, ...lines));
  }));
}

function shades(low, high) {
  const steps = [0.25, 0.5, 1].map((share) => shaded(`${share}`, share, 1));
  return element("p", { class: "key", "aria-hidden": "true" },
    low ? element("span", {}, shaded("−", -0.6, 1), ` ${low} `) : null,
    ...(low ? [shaded("+", 0.6, 1)] : steps), ` ${high}`);
}

function contextsBlock(panel, strings) {
  const { contexts, maximum } = panel;
  const largest = largestOf(contexts.flatMap((context) => context[5] ?? []));
  const byActivation = ([, peak, tokens, values]) => ({ value: aligned(values[peak], maximum),
    spans: tokens.map((token, i) => shaded(strings[token], values[i], maximum, short(values[i]), i === peak)) });
  const byEffect = ([, peak, tokens, values, , effects]) => ({
    value: effects ? aligned(effects[peak], largest) : "–",
    spans: tokens.map((token, i) => shaded(strings[token], effects?.[i] ?? 0, largest, effects
      ? `${signed(effects[i])} nats for the next token; activation ${short(values[i])}` : short(values[i]), i === peak)) });
  const hold = element("div", {});
  const draw = (effects) => hold.replaceChildren(
    effects ? shades("next token less likely without the feature", "more likely, change of log p")
      : shades(null, "of the feature's maximum; underlined: the place that was drawn"),
    texts(contexts, strings, effects ? byEffect : byActivation));
  draw(0);
  const switched = largest ? choice("what is shaded", ["activation", "effect of ablating"], draw) : null;
  return block("Texts", null, switched, hold);
}

function needsBlock({ needs, maximum }, strings) {
  const line = ([, peak, tokens, values]) => {
    const largest = largestOf(values.filter((_, i) => i !== peak));
    return { value: aligned(values[peak], maximum), spans: tokens.map((token, i) => i === peak
      ? shaded(strings[token], 0, 1, `activation ${short(values[i])}`, true)
      : shaded(strings[token], values[i], largest, `without it ${signed(values[i] && -values[i])}`)) };
  };
  const made = block("What of the context it needs", "What the activation at the underlined token loses when each " +
    "other is taken away, as a share of the largest change in its text.",
    shades("fires more strongly without", "needed"), texts(needs, strings, line));
  made.classList.add("needs");
  return made;
}

function link(number) {
  if (!place.has(number)) return element("span", { text: String(number) }); // the page of a few features lacks it
  return element("a", { href: `#f${number}`, text: String(number) });
}

function figures(panel, names, strings) {
  const tags = (panel.tags ?? []).map(([name, text]) => [plain(strings[name]), plain(strings[text])]);
  const scores = (panel.scores ?? []).map(([name, value]) => [plain(strings[name]), short(value)]);
  const shown = [...tags.filter(([, text]) => text.length <= 24), ["fires on", panel.density === 0 ? "no token" : `${percent(panel.density)} of tokens`],
    ["maximum", short(panel.maximum)], ["mean where it fires", panel.mean], [names.effect, panel.effect],
    ...scores, ["variance", panel.variance], ["skew", panel.skew], ["kurtosis", panel.kurtosis]];
  return element("dl", { class: "facts" }, ...shown.filter(([, value]) => value !== undefined).map(([name, value]) =>
    element("div", {}, element("dt", { text: name }),
      element("dd", { text: typeof value === "number" ? short(value) : value }))));
}

function topTokens(panel, strings) {
  return block("Top tokens", null, element("ul", { class: "tops", "aria-label": "with the mean activation on each" },
    ...panel.tops.map(([token, value]) => element("li", {}, element("bdi", {}, shaded(strings[token], value,
      panel.maximum, short(value))), aligned(value, panel.maximum)))));
}

const pair = (...parts) => parts.some(Boolean) ? element("div", { class: "pair" }, ...parts.filter(Boolean)) : null;

function twoLists(title, note, up, down, strings) {
  if (!up && !down) return null;
  const largest = largestOf([...up ?? [], ...down ?? []].map(([, value]) => value)); // both to one scale
  const list = (pairs, name) => pairs ? tokenBars(pairs, strings, `${title}: ${name}`, largest) : null;
  return block(title, note, element("div", { class: "two" }, list(up, "raised"), list(down, "lowered")));
}

// All of a feature below its heading. `about(number)`: what the index says of another feature, a short text or "".
function panelBody(panel, strings, names, about) {
  const angle = (cosine) => cosine === null ? null : element("span", { class: "angle", text: `∠ ${short(cosine, 2)}` });
  const other = (number, where, cosine) => ({ label: where
    ? element("span", { class: "tok", text: `${where} ${number}` }) : link(number), more: element("span", {},
    where ? "" : element("bdi", { class: "about", text: about(number) })), end: angle(cosine) });
  const coactive = panel.coactive && block("Fires together with", "Tokens on which both fire; ∠: cosine of the firings.",
    bars(panel.coactive.map(([number, count, cosine]) => ({ value: count, ...other(number, "", cosine) })),
      (value) => short(value), "co-active features", "bars even"));
  const causes = panel.causes && block("Caused by", "How far it falls where the earlier feature is ablated; ∠: cosine " +
    "of the directions.", bars(panel.causes.map(([number, drop, cosine, where]) => ({ value: drop,
    ...other(number, plain(strings[where]), cosine) })), (value, largest) => aligned(value, largest), "earlier features",
    "bars even"));
  const drops = panel.drops && block("Logit drops", "Of the next token, where the feature is ablated.", histogramOf(
    panel.drops.edges, [{ name: "", counts: panel.drops.counts, colour: "s0" }], "places by drop of the logit", false));
  const [lead, further] = sectionsOf(panel, strings);
  const parts = [
    panel.explanation ? element("p", { class: "explained", dir: "auto", text: plain(panel.explanation) }) : null,
    figures(panel, names, strings),
    ...lead,
    panel.tops ? topTokens(panel, strings) : null,
    pair(panel.histogram && tokenHistogram(panel.histogram, strings),
      twoLists("Logits", "Raised and lowered most by its direction.", panel.raised, panel.lowered, strings)),
    panel.contexts ? contextsBlock(panel, strings) : null,
    ...further,
    pair(twoLists("Ablated", "Tokens whose log p rises and falls most without it.", panel.ablationRaised,
      panel.ablationLowered, strings), drops),
    panel.needs ? needsBlock(panel, strings) : null,
    pair(coactive, causes)];
  return parts.filter(Boolean);
}
