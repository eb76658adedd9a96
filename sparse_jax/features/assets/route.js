// The panel follows the address: `#f123` is open.

const narrow = () => getComputedStyle(get("list")).display === "none";

function about(number) {
  const at = place.get(number);
  if (at === undefined) return "";
  return plain(data.explanations?.[at] || data.tops[at].map((token) => visible(data.strings[token])).join("  "));
}

// Opens a feature, or closes the panel; the address says which, and is followed at once, however fast the keys come.
function go(number) {
  location.hash = number === null ? "" : `f${number}`;
  follow();
}

function step(by) {
  const now = order.findIndex((at) => data.numbers[at] === opened);
  const next = now < 0 ? cursor : now + by;
  if (next < 0 || next >= order.length) return;
  moveTo(next, false);
  go(data.numbers[order[next]]);
}

function close() {
  if (opened !== null) go(null);
}

function panelHead(number, flags) {
  const button = (text, label, act) => element("button", { type: "button", class: "icon", text, "aria-label": label,
    title: label, on: { click: act } });
  const made = element("header", { class: "head" }, element("h2", { id: "panel-name", tabindex: "-1" },
    element("span", { class: "kind", text: `${data.noun[0]} ` }), String(number)), ...flags.map((flag) =>
    element("span", { class: "flag", text: flag })), element("span", { class: "steps" },
    button("‹", "previous feature", () => step(-1)), button("›", "next feature", () => step(1)),
    button("×", "close", close)));
  return made;
}

function markSteps() {
  const now = order.findIndex((at) => data.numbers[at] === opened);
  const [before, after] = panel.querySelectorAll(".steps button");
  if (!before) return;
  before.disabled = now === 0 || !order.length;
  after.disabled = now === order.length - 1;
}

async function follow() {
  const asked = /^#f(\d{1,15})$/.exec(location.hash);
  const before = opened;
  opened = asked ? Number(asked[1]) : null;
  if (opened === before) return; // it was followed already
  page.classList.toggle("split", opened !== null);
  panel.hidden = opened === null;
  document.title = opened === null ? title : `${opened} · ${title}`;
  if (opened === null) {
    panel.replaceChildren();
    drawRows();
    const row = order.findIndex((at) => data.numbers[at] === before);
    if (before !== null) moveTo(row < 0 ? cursor : row);
    return;
  }
  const row = order.findIndex((at) => data.numbers[at] === opened);
  if (row >= 0) moveTo(row, false);
  else drawRows();
  await fill(opened);
}

async function fill(number) {
  const at = place.get(number);
  const show = (flags, ...children) => {
    panel.replaceChildren(panelHead(number, flags), ...children);
    panel.scrollTop = 0;
    markSteps();
    get("panel-name").focus({ preventScroll: true });
  };
  if (at === undefined) return show([], element("p", { class: "empty", text: "There is no such feature here." }));
  try {
    const [strings, panels] = await panelFile(Math.floor(at / data.perShard));
    if (opened !== number) return undefined;
    const its = panels[at % data.perShard];
    if (its?.index !== number) throw new Error("the files beside this page are newer than it: reload it");
    const flags = [its.outlier && "outlier", its.density === 0 && "never fires"].filter(Boolean);
    return show(flags, ...panelBody(its, strings, { effect: plain(data.effectName) }, about));
  } catch (error) {
    if (opened === number) show([], element("p", { class: "empty", text: `Not shown: ${error.message}.` }));
    return undefined;
  }
}

// Keys.

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const typing = event.target === search;
  const inPanel = panel.contains(event.target);
  const act = (deed) => { event.preventDefault(); deed(); };
  if (typing) {
    if (event.key === "Escape") act(() => search.value ? clear() : search.blur());
    else if (event.key === "ArrowDown") act(() => moveTo(cursor));
    else if (event.key === "Enter" && order.length) act(() => go(data.numbers[order[cursor]]));
    return;
  }
  // The first step from outside the list is to where it stands.
  const idle = opened === null && !body.contains(document.activeElement);
  const move = (by) => narrow() ? step(by) : moveTo(idle ? cursor : cursor + by);
  const screen = Math.max(1, Math.floor(rows.clientHeight / rowHeight) - 2);
  const keys = { "/": () => { if (narrow()) close(); search.focus(); search.select(); }, j: () => move(1),
    k: () => move(-1), "[": () => step(-1), "]": () => step(1), Escape: close };
  const inList = { ArrowDown: () => move(1), ArrowUp: () => move(-1), PageDown: () => move(screen),
    PageUp: () => move(-screen), Home: () => moveTo(0), End: () => moveTo(order.length - 1) };
  const onButton = event.target.closest?.("button, input, summary");
  if (Object.hasOwn(keys, event.key)) act(keys[event.key]);
  else if (!inPanel && !onButton && Object.hasOwn(inList, event.key)) act(inList[event.key]);
  else if (event.key === "Enter" && !inPanel && !onButton && !event.target.closest?.("a") && order.length) {
    act(() => go(data.numbers[order[cursor]]));
  }
}

function clear() {
  search.value = "";
  refresh();
}

function start() {
  place = new Map(data.numbers.map((number, at) => [number, at]));
  fields = describeFields();
  found = data.numbers.map((_, at) => [...data.tops[at].map((token) => data.strings[token]),
    data.explanations?.[at] ?? "", ...data.tags.map(([, values]) => data.strings[values[at]] ?? "")].join("\n").toLowerCase());
  get("alive-label").hidden = !data.density.some((value) => !value);
  get("outliers-label").hidden = !data.outliers.length;
  drawHead();
  refresh();
  search.addEventListener("input", refresh);
  for (const box of ["alive", "outliers"]) get(box).addEventListener("change", refresh);
  rows.addEventListener("scroll", drawRows, { passive: true });
  new ResizeObserver(drawRows).observe(rows);
  document.addEventListener("keydown", onKey);
  window.addEventListener("hashchange", follow);
  follow();
}

fetchScript("index-data.js").then(() => {
  if (!data) throw new Error("index-data.js is damaged");
  start();
}).catch((error) => {
  get("empty").textContent = `Nothing to show: ${error.message}.`;
  get("empty").hidden = false;
});
