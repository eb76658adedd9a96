// What the page holds, and the data files beside it.

const get = (id) => document.getElementById(id);
const [page, rows, table, search, panel] = ["main", "rows", "table", "search", "panel"].map(get);
const [head, body] = [table.tHead, table.tBodies[0]];
const title = document.title;
const KEPT = 8; // files of panels in memory
const AHEAD = 8; // rows drawn above and below those in sight

let data; // the columns of the index
let place; // number of a feature -> its place in the columns
let fields; // columns of the table
let found; // a text to search in, for each place
let order = []; // places, as shown
let sorting = { field: 0, down: false };
let cursor = 0; // a row of `order`
let opened = null; // number of the feature in the panel
let rowHeight = 38;
const drawnRows = new Map(); // row -> its element
const files = new Map(); // file of panels -> promise of [strings, panels]
const waiting = new Map(); // file -> what to do with what it brings

// Files beside this page come by script tags: what they call is defined here.

const policy = window.trustedTypes?.createPolicy("sparse-jax-data", { createScriptURL: (name) => {
  if (!/^(index-data|shard-\d+)\.js$/.test(name)) throw new TypeError(`no file of this page: ${name}`);
  return name;
} });

function fetchScript(name) {
  return new Promise((done, failed) => {
    const tag = document.createElement("script");
    tag.src = policy ? policy.createScriptURL(name) : name;
    tag.addEventListener("load", () => { tag.remove(); done(); });
    tag.addEventListener("error", () => { tag.remove(); failed(new Error(`${name} is missing beside this page`)); });
    document.head.append(tag);
  });
}

window.sparseJaxShard = (count, strings, panels) => waiting.get(count)?.([strings, panels]);
window.sparseJaxIndex = (columns) => { data = columns; };

function panelFile(count) {
  const known = files.get(count);
  files.delete(count);
  const promise = known ?? new Promise((done, failed) => {
    waiting.set(count, done);
    fetchScript(`shard-${String(count).padStart(3, "0")}.js`)
      .then(() => failed(new Error("a file of panels is damaged"))).catch(failed);
  }).finally(() => waiting.delete(count));
  files.set(count, promise);
  promise.catch(() => files.delete(count));
  if (files.size > KEPT) files.delete(files.keys().next().value);
  return promise;
}
