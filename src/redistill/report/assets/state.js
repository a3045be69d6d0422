// What is shown and what the reader chose; the latter outlives every refresh.

const store = {
  data: JSON.parse($('data').textContent),
  range: null, // [first, last] step, null: all
  cursor: null, // a step
  smooth: 0,
  log: false,
  off: new Set(), // names of runs that are not drawn
};
const sections = {}; // name: draws that section from store.data
const COLOURS = 8;
const DASHES = ['', '7 3', '2 3', '9 3 2 3', '12 4', '4 2 1 2'];

const several = () => store.data.runs.length > 1;
const visible = () => store.data.runs.map((run, place) => ({ run, place })).filter(({ run }) => !store.off.has(run.name));
/** Of a method with several seeds one run stands for all, where single answers are shown. */
const firstOnly = () => (store.data.runs.some((run) => run.seeds > 1) ? ' Of each method: its first training seed.' : '');
const colour = (place) => `var(--s${place % COLOURS})`;
const dash = (place) => DASHES[place % DASHES.length] || null;

/** `fill`, after which the button that had the focus has it again. */
function refill(node, ...children) {
  const at = [...node.querySelectorAll('button')].indexOf(document.activeElement);
  fill(node, ...children);
  if (at >= 0) node.querySelectorAll('button')[at]?.focus({ preventScroll: true });
}
/** A labelled choice that remembers itself; `options` are [value, text]. */
function choice(label, options, value, changed) {
  const list = h('select', { 'aria-label': label, onchange: () => changed(list.value) }, options.map(([each, text]) => h('option', { value: each }, text)));
  list.value = value;
  return h('label', { class: 'field' }, h('span', {}, label), list);
}
function searchBox(label, changed) {
  let waiting = 0;
  const box = h('input', { type: 'search', placeholder: label, 'aria-label': label, spellcheck: 'false', oninput: () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => changed(box.value.trim().toLowerCase()), 120);
  } });
  return h('label', { class: 'field grow' }, box);
}
/** Replaces the options of a choice and keeps what was chosen, where it is still there. */
function reoption(field, options) {
  const list = field.querySelector('select'), chosen = list.value;
  fill(list, options.map(([each, text]) => h('option', { value: each }, text)));
  list.value = options.some(([each]) => each === chosen) ? chosen : options[0][0];
  field.hidden = options.length < 2;
  return list.value;
}
/** A choice among one thing is none. */
const trimmed = (options) => (options.length <= 2 ? options.slice(0, 1) : options);
const swatch = (place, pattern) => s('svg', { class: 'swatch', viewBox: '0 0 22 8', 'aria-hidden': 'true' },
  s('line', { x1: 1, x2: 21, y1: 4, y2: 4, stroke: colour(place), 'stroke-width': 2.5, 'stroke-dasharray': dash(pattern || 0) }));
const nothing = (text) => h('p', { class: 'empty' }, text);
