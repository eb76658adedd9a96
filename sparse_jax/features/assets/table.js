// The table of all features: sorting, searching, and the rows in sight.

function sortBy(field) {
  const same = sorting.field === field;
  sorting = { field, down: same ? !sorting.down : Boolean(fields[field].down) };
  refresh();
}

function sorted(places) {
  const { value } = fields[sorting.field];
  const sign = sorting.down ? -1 : 1;
  const keys = places.map(value);
  const compare = (a, b) => {
    const [x, y] = [keys[a], keys[b]];
    if (x === y) return a - b;
    if (x === null || y === null) return x === null ? 1 : -1; // what was not measured comes last either way
    return (x < y ? -1 : 1) * sign;
  };
  return places.map((_, i) => i).sort(compare).map((i) => places[i]);
}

function fitting() {
  const asked = search.value.trim().toLowerCase();
  const words = asked.split(/\s+/).filter(Boolean);
  const [alive, without] = [get("alive").checked, get("outliers").checked ? new Set(data.outliers) : null];
  const exact = /^[#f]?(\d+)$/.exec(asked);
  const number = exact && place.get(Number(exact[1]));
  const fits = (at) => !(alive && !data.density[at]) && !without?.has(at) &&
    (!words.length || at === number || words.every((word) => found[at].includes(word)));
  return data.numbers.map((_, at) => at).filter(fits);
}

function refresh() {
  order = sorted(fitting());
  // The feature that was asked for by its number stands first.
  const exact = /^[#f]?(\d+)$/.exec(search.value.trim().toLowerCase());
  const at = exact ? order.indexOf(place.get(Number(exact[1]))) : -1;
  if (at > 0) order.unshift(...order.splice(at, 1));
  cursor = 0;
  [...head.rows[0].cells].forEach((cell, i) => i === sorting.field
    ? cell.setAttribute("aria-sort", sorting.down ? "descending" : "ascending") : cell.removeAttribute("aria-sort"));
  const all = data.numbers.length;
  get("count").textContent = order.length === all ? `${short(all)} ${data.noun[1]}`
    : `${short(order.length)} of ${short(all)} ${data.noun[1]}`;
  get("empty").hidden = order.length > 0;
  table.setAttribute("aria-rowcount", order.length + 1);
  drawnRows.clear();
  body.replaceChildren();
  rows.scrollTop = 0;
  drawRows();
  markSteps();
}

// Only rows near those in sight exist; empty ones above and below hold their place.

function makeRow(row) {
  const at = order[row];
  const made = element("tr", { "aria-rowindex": row + 2, on: { click: (event) => {
    if (event.defaultPrevented || event.target.closest("a") || String(getSelection())) return;
    cursor = row;
    go(data.numbers[at]);
  } } }, ...fields.map((field, i) => {
    const cell = element(i ? "td" : "th", { class: field.extra ? `${field.kind} extra` : field.kind,
      scope: i ? undefined : "row" }, field.cell(at));
    return cell;
  }));
  return made;
}

function drawRows() {
  const from = Math.max(0, Math.floor(rows.scrollTop / rowHeight) - AHEAD);
  const to = Math.min(order.length, Math.ceil((rows.scrollTop + rows.clientHeight) / rowHeight) + AHEAD);
  for (const [row, made] of drawnRows) {
    if (row >= from && row < to) continue;
    made.remove();
    drawnRows.delete(row);
  }
  body.querySelectorAll(".gap").forEach((gap) => gap.remove());
  let below = null; // rows that stay are not moved: one of them may have the focus
  for (let row = to - 1; row >= from; row--) {
    if (!drawnRows.has(row)) drawnRows.set(row, body.insertBefore(makeRow(row), below));
    below = drawnRows.get(row);
  }
  const gap = (count, side) => {
    if (count <= 0) return;
    const made = element("tr", { class: "gap", "aria-hidden": "true" }, element("td"));
    made.style.setProperty("height", `${count * rowHeight}px`);
    body[side](made);
  };
  gap(from, "prepend");
  gap(order.length - to, "append");
  markRows();
  const height = drawnRows.values().next().value?.getBoundingClientRect().height;
  if (height && Math.abs(height - rowHeight) > 0.01) {
    rowHeight = height;
    drawRows();
  }
}

function markRows() {
  for (const [row, made] of drawnRows) {
    const anchor = made.querySelector("a");
    anchor.tabIndex = row === cursor ? 0 : -1;
    made.classList.toggle("cursor", row === cursor);
    if (data.numbers[order[row]] === opened) made.setAttribute("aria-current", "true");
    else made.removeAttribute("aria-current");
  }
}

function showRow(row) {
  const above = head.getBoundingClientRect().height;
  const top = row * rowHeight;
  if (top < rows.scrollTop) rows.scrollTop = top;
  else if (top + rowHeight + above > rows.scrollTop + rows.clientHeight) {
    rows.scrollTop = top + rowHeight + above - rows.clientHeight;
  }
  drawRows();
}

function moveTo(row, focus = true) {
  if (!order.length) return;
  cursor = Math.max(0, Math.min(order.length - 1, row));
  showRow(cursor);
  if (focus) drawnRows.get(cursor)?.querySelector("a").focus({ preventScroll: true });
}
