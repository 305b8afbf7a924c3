// Elements and words. Every text that reaches the page goes through textContent, and `visible` before: what a model
// generated may be anything.

const MOST = 20000; // characters of one text

const HIDDEN = new RegExp(
  "[\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f\\u00ad\\u061c\\u180e\\u200b\\u200e\\u200f\\u2028-\\u202e" +
    "\\u2060-\\u206f\\ufeff\\ufff9-\\ufffb\\p{Cs}\\u{e0000}-\\u{e007f}]", "gu");

/** A text whose control characters, direction overrides and lone surrogates are seen rather than obeyed. */
function visible(value, most = MOST) {
  let text = typeof value === "string" ? value : value === null || value === undefined ? "" : String(value);
  const left = text.length - most;
  if (left > 0) text = text.slice(0, most);
  text = text.replace(HIDDEN, (character) => {
    const code = character.codePointAt(0);
    if (code < 0x20) return String.fromCodePoint(0x2400 + code);
    return code === 0x7f ? "\u2421" : `\u27e8U+${code.toString(16).toUpperCase().padStart(4, "0")}\u27e9`;
  });
  return left > 0 ? `${text}\u2026 ${count(left)} more characters` : text;
}

/** el("p", {class: "x", onclick: f}, "text", node): children that are no nodes become text. */
function el(tag, attributes, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function svg(tag, attributes, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : name === "d" ? value : visible(value, 2000)); // d: of a path
  }
  for (const child of children.flat()) {
    if (child === null || child === undefined || child === false) continue;
    node.append(child instanceof Node ? child : document.createTextNode(visible(child)));
  }
  return node;
}

const by = (id) => document.getElementById(id);

/** Set a node's text, where it differs: selections and screen readers are left alone. */
function put(node, value) {
  const text = visible(value);
  if (node.textContent !== text) node.textContent = text;
}

function mark(node, name, value) {
  if (node.getAttribute(name) !== value) node.setAttribute(name, value);
}

function show(node, yes) {
  if (node.hidden === yes) node.hidden = !yes;
}

/** Make the children of `parent` those of `items`, in order, keeping the nodes of those that stay. */
function listed(parent, items, key, make, update) {
  const known = parent.nodesByKey || (parent.nodesByKey = new Map());
  const wanted = new Set(items.map(key));
  for (const [name, node] of known) {
    if (!wanted.has(name)) {
      node.remove();
      known.delete(name);
    }
  }
  let at = parent.firstChild;
  for (const item of items) {
    const name = key(item);
    let node = known.get(name);
    if (!node) known.set(name, (node = make(item)));
    if (update) update(node, item);
    if (node === at) at = at.nextSibling;
    else parent.insertBefore(node, at);
  }
}

// ---------------------------------------------------------------- numbers and times

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

function count(value) {
  return isNumber(value) ? value.toLocaleString("en-US", { maximumFractionDigits: 0 }) : known(value);
}

/** A number in about four characters. */
function figure(value, digits = 3) {
  if (!isNumber(value)) return known(value);
  if (Number.isInteger(value)) return count(value);
  const size = Math.abs(value);
  if (size >= 1000) return count(value);
  if (size > 0 && size < 0.001) return value.toExponential(1);
  return value.toLocaleString("en-US", { maximumFractionDigits: size >= 100 ? 1 : size >= 10 ? 2 : digits });
}

function known(value) {
  return value === null || value === undefined ? "\u2013" : String(value);
}

function bytes(value) {
  if (!isNumber(value)) return known(value);
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let at = 0;
  while (Math.abs(value) >= 1000 && at < units.length - 1) [value, at] = [value / 1000, at + 1];
  return `${figure(at ? Number(value.toPrecision(3)) : value)} ${units[at]}`;
}

function seconds(value) {
  if (!isNumber(value)) return known(value);
  const size = Math.abs(value);
  if (size === 0) return "0 s";
  if (size < 0.9995) return `${Math.round(1000 * value)} ms`;
  if (size < 10) return `${value.toFixed(1)} s`;
  if (size < 120) return `${Math.round(value)} s`;
  if (size < 7200) return `${Math.round(value / 60)} min`;
  return size < 172800 ? `${(value / 3600).toFixed(1)} h` : `${(value / 86400).toFixed(1)} d`;
}

const two = (n) => String(n).padStart(2, "0");

/** Time of day, here; with the date where it is another day than that of `now`. */
function clock(wall, now = Date.now() / 1000) {
  if (!isNumber(wall) || wall <= 0) return "\u2013";
  const at = new Date(1000 * wall), today = new Date(1000 * now);
  const time = `${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}`;
  return at.toDateString() === today.toDateString() ? time : `${date(at)} ${time}`;
}

function date(at) {
  return `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())}`;
}

const share = (value) => (isNumber(value) ? `${Math.round(100 * value)} %` : "\u2013");
const plural = (n, word, words = `${word}s`) => `${count(n)} ${n === 1 ? word : words}`;
