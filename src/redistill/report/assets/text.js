// Nodes and texts. Whatever a model or a file said becomes a text node here, never markup.

const SVG = 'http://www.w3.org/2000/svg';
// Marks that turn the direction of writing, characters without width, and controls: shown by their number.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufe00-\ufe0e\ufeff\uffa0\ufff9-\ufffb\u{e0000}-\u{e0fff}]/gu;
const IN_EMOJI = /\p{Extended_Pictographic}[\ufe0f\u{1f3fb}-\u{1f3ff}]*$/u;

function make(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (name === 'vars') for (const [key, each] of Object.entries(value)) node.style.setProperty(key, each);
    else if (name === 'value') node.value = value;
    else node.setAttribute(name, value === true ? '' : value);
  }
  node.append(...children.flat(9).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}
const h = (tag, attributes, ...children) => make(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) => make(document.createElementNS(SVG, tag), attributes, children);
const $ = (id) => document.getElementById(id);
const fill = (node, ...children) => { node.replaceChildren(...children.flat(9).filter(Boolean)); return node; };

/** A text as nodes: what cannot be seen is shown by its number, `found` (lower case) is marked. */
function shown(text, found) {
  const nodes = [];
  let from = 0;
  for (const match of text.matchAll(HIDDEN)) {
    if (match[0] === '\u200d' && IN_EMOJI.test(text.slice(Math.max(0, match.index - 4), match.index))) continue;
    nodes.push(...plain(text.slice(from, match.index), found), hiddenMark(match[0]));
    from = match.index + match[0].length;
  }
  return [...nodes, ...plain(text.slice(from), found)];
}
function hiddenMark(character) {
  const code = 'U+' + character.codePointAt(0).toString(16).toUpperCase().padStart(4, '0');
  return h('span', { class: 'hidden-mark', title: 'A character that cannot be seen: ' + code }, code);
}
function plain(text, found) {
  if (!text) return [];
  if (!found) return [text];
  const nodes = [], low = text.toLowerCase();
  if (low.length !== text.length) return [text];
  let from = 0;
  for (let at = low.indexOf(found); at >= 0; at = low.indexOf(found, from)) {
    nodes.push(text.slice(from, at), h('mark', {}, text.slice(at, at + found.length)));
    from = at + found.length;
  }
  return [...nodes, text.slice(from)];
}

/** A sentence of ours, in which `this` is code. */
const coded = (text) => text.split('`').map((part, n) => (n % 2 ? h('code', {}, shown(part)) : shown(part)));

/** One token: line breaks and blanks that are all of it are shown. */
function token(text) {
  if (text === '') return [h('span', { class: 'nothing' }, 'nothing')];
  if (/^\s+$/.test(text)) return [...text].map((c) => (c === '\n' ? '↵' : c === '\t' ? '⇥' : '␣'));
  return shown(text.replace(/\n/g, '↵'));
}
const control = (text) => /^<[|\w/:-]{1,40}[|\w]?>$/.test(text);

/** The question in a prompt that a chat template wrote, if it is one. */
function question(prompt) {
  const bare = prompt.replace(/<\|[^|<>]{1,40}\|>/g, '');
  const turns = /(?:^|\n)user\n([\s\S]*?)\n*(?:assistant\n*)?$/.exec(bare);
  return (turns ? turns[1] : bare).trim() || prompt.trim();
}

const digits = (value, most) => value.toLocaleString('en-US', { minimumFractionDigits: most, maximumFractionDigits: most });
/** A figure with as many decimals as it deserves. */
function figure(value) {
  if (value === null || value === undefined) return '–';
  const size = Math.abs(value);
  if (size >= 1e7) return value.toExponential(1);
  if (size >= 1000) return digits(value, 0);
  if (size >= 100) return digits(value, 1);
  if (size >= 1 || size === 0) return digits(value, 2);
  if (size >= 0.001) return digits(value, size >= 0.1 ? 3 : 4);
  return value.toExponential(1);
}
const fixed = (value, most) => (value === null || value === undefined ? '–' : digits(value, most));
const signed = (value, most) => (value === null || value === undefined ? '–' : (value > 0 ? '+' : value < 0 ? '−' : '±') + digits(Math.abs(value), most));
const percent = (value) => (value === null || value === undefined ? '–' : digits(100 * value, value < 0.1 ? 1 : 0) + ' %');
function count(value) {
  if (value === null || value === undefined) return '–';
  for (const [size, letter] of [[1e9, 'B'], [1e6, 'M'], [1e3, 'k']]) {
    if (value >= size * 0.99995) return digits(value / size, 1).replace(/\.0$/, '') + letter;
  }
  return String(value);
}
function duration(seconds) {
  if (seconds === null || seconds === undefined) return '–';
  if (seconds < 1) return fixed(seconds * 1000, 0) + ' ms';
  if (seconds < 120) return fixed(seconds, seconds < 10 ? 1 : 0) + ' s';
  return seconds < 7200 ? fixed(seconds / 60, 0) + ' min' : fixed(seconds / 3600, 1) + ' h';
}
const pText = (p) => (p < 0.001 ? 'p < 0.001' : 'p = ' + fixed(p, 3));
const plural = (number, one, many) => number.toLocaleString('en-US') + ' ' + (number === 1 ? one : many);
