// Text, numbers and elements. Nothing here, or after, makes markup out of data.

// White space and an empty token would not be seen; a line break would tear the row of text apart.
const VISIBLE = new Map([["\n", "↵"], ["\r", "␍"], ["\t", "⇥"], ["\u00a0", "⍽"], ["\u200b", "␣"], ["\u2028", "↵"],
  ["\u2029", "↵"]]);
// What cannot be shown, halves of surrogate pairs, and signs that reverse the text after them.
const UNPRINTABLE = /[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufffe\uffff]|\p{Surrogate}/gu;

const plain = (text) => text.replace(UNPRINTABLE, "\ufffd");
const visible = (token) => token === "" ? "∅"
  : plain(token.replace(/[\n\r\t\u00a0\u200b\u2028\u2029]/g, (sign) => VISIBLE.get(sign)));

// An element with attributes and children; a child that is a string is text.
function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (key === "text") made.textContent = value;
    else if (key === "on") for (const [event, act] of Object.entries(value)) made.addEventListener(event, act);
    else made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function drawn(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// A number as people write it: 0.0312, 8.3, 12,480, 3.1e-5; a dash where there is none.
function short(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  let text;
  if (size >= 1000 && size < 1e9) text = Math.round(value).toLocaleString("en-US");
  else if (size !== 0 && (size < 1e-4 || size >= 1e9)) {
    text = value.toExponential(digits - 1).replace(/\.?0+e/, "e").replace("e+", "e");
  } else text = String(Number(value.toPrecision(digits)));
  return text.replace("-", "−").replace("e−", "e-");
}

const percent = (share) => share === null || share === undefined ? "–" : `${short(100 * share, 2)} %`;
const signed = (value) => value > 0 ? `+${short(value)}` : short(value);

// With as many decimals as give the largest three digits, so that numbers below each other align.
function aligned(value, largest) {
  if (value === null || value === undefined) return "–";
  if (!(largest > 0)) return short(value);
  const decimals = Math.min(Math.max(2 - Math.floor(Math.log10(largest)), 0), 4);
  if (value !== 0 && Math.abs(value) < 0.5 * 10 ** -decimals) return short(value, 2);
  return value.toFixed(decimals).replace("-", "−");
}

// A token behind which its value is shaded: the weakest is still seen, silence has no shade, blue is below zero.
function shaded(token, value, largest, title, peak) {
  const made = element("span", { title, text: visible(token) });
  const share = largest > 0 && value ? Math.max(-1, Math.min(1, value / largest)) : 0;
  if (share) {
    made.classList.add(share < 0 ? "neg" : "pos");
    made.style.setProperty("--a", (0.1 + 0.8 * Math.abs(share)).toFixed(2));
  }
  if (peak) made.classList.add("pk");
  return made;
}
