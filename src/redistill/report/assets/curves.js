// All curves: panels of one or several runs, and where the time went.

const curvePanels = new Map();
const PHASES = 'seconds_';

const smoothField = h('label', { class: 'field' }, h('span', {}, 'Smoothing'),
  h('input', { type: 'range', min: 0, max: 0.98, step: 0.02, value: 0, 'aria-label': 'Smoothing of the curves', oninput: (event) => {
    store.smooth = Number(event.target.value);
    smoothField.querySelector('output').textContent = store.smooth ? fixed(store.smooth, 2) : 'off';
    redraw();
  } }), h('output', {}, 'off'));
const logField = h('label', { class: 'field' }, h('input', { type: 'checkbox', onchange: (event) => { store.log = event.target.checked; redraw(); } }), h('span', {}, 'Logarithmic'));
const rangeText = h('span', { class: 'range-text' });
const wholeButton = h('button', { type: 'button', onclick: () => setRange(null) }, 'Whole run');
const runChips = h('div', { class: 'chips', role: 'group', 'aria-label': 'Runs that are drawn' });
const curveNote = h('p', { class: 'note' });
store.data.runs.slice(COLOURS).forEach((run) => store.off.add(run.name)); // two of one colour are not told apart
fill($('curve-tools'), smoothField, logField, h('div', { class: 'field' },
  h('button', { type: 'button', 'aria-label': 'Zoom in', onclick: () => zoom(0.6, null) }, '+'),
  h('button', { type: 'button', 'aria-label': 'Zoom out', onclick: () => zoom(1 / 0.6, null) }, '−'), wholeButton, rangeText), runChips, curveNote);

function showRange() {
  wholeButton.disabled = !store.range;
  rangeText.textContent = store.range ? `steps ${Math.ceil(store.range[0])} to ${Math.floor(store.range[1])}` : '';
}

sections.curves = () => {
  const { data } = store;
  refill(runChips, several() && data.runs.map((run, place) => h('button', { type: 'button', class: 'chip', 'aria-pressed': String(!store.off.has(run.name)), onclick: () => {
    if (!store.off.delete(run.name)) store.off.add(run.name);
    sections.curves();
  } }, swatch(place, 0), shown(run.name))));
  curveNote.textContent = [store.off.size > 0 && `${visible().length} of ${data.runs.length} are drawn: choose above.`,
    data.runs.some((run) => run.seeds > 1) && 'Of each method the mean over its training seeds, with a band from the least to the greatest.'].filter(Boolean).join(' ');
  const known = new Set(data.panels.flatMap((panel) => [...Object.keys(panel.keys), ...Object.keys(panel.points)]));
  const rest = new Set(data.runs.flatMap((run) => Object.keys(run.curves.y)).filter((key) => !known.has(key) && !key.startsWith(PHASES) && key !== 'seconds'));
  const panels = [...data.panels, ...[...rest].map((key) => ({ title: key, unit: '', about: 'A key of steps.jsonl that this page has no words for.', keys: { [key]: key }, points: {} }))];
  let drawn = 0;
  for (const panel of panels) drawn += draw(panel, seriesOf(panel), false);
  drawn += draw({ title: 'Seconds by phase', unit: 'seconds per step', about: 'From drawing a step’s samples to its end; what lies between the phases is not drawn.', keys: {}, points: {} }, phaseSeries(), visible().length === 1);
  let empty = $('panels').querySelector('.empty');
  if (!drawn && !empty) $('panels').append(nothing('No step was logged yet.'));
  else if (drawn && empty) empty.remove();
  $('curve-tools').hidden = !drawn;
  showRange();
  phases();
};

function draw(panel, series, stacked) {
  const id = panel.title + (stacked ? '|stacked' : '');
  const lost = Object.keys(panel.keys).reduce((sum, key) => sum + visible().reduce((all, { run }) => all + (run.curves.lost[key] || 0), 0), 0);
  for (const [key, chart] of curvePanels) if (key.split('|')[0] === panel.title && (key !== id || !series.length)) { chart.node.remove(); charts.delete(chart); curvePanels.delete(key); }
  if (!series.length) return 0;
  if (!curvePanels.has(id)) {
    curvePanels.set(id, new Chart(panel, stacked));
    $('panels').append(curvePanels.get(id).node);
  }
  curvePanels.get(id).update(series, lost);
  return 1;
}
/** One run: a colour for each key. Several: a colour for each run, a pattern for each key. */
function seriesOf(panel) {
  const found = [], many = several(), keys = Object.entries(panel.keys), points = Object.entries(panel.points);
  for (const { run, place } of visible()) {
    for (const [source, entries, dotted] of [[run.curves, keys, false], [run.evaluations, points, true]]) {
      entries.forEach(([key, label], n) => {
        const column = source.y[key];
        if (!column || column.mean.every((value) => value === null)) return;
        found.push({ label: many ? (keys.length + points.length > 1 ? `${run.name}, ${label}` : run.name) : label,
          place: many ? place : n + (dotted ? keys.length : 0), pattern: many ? n : (dotted ? 0 : n), points: dotted, x: source.x, ...column });
      });
    }
  }
  return found;
}
function phaseSeries() {
  const shownRuns = visible();
  if (shownRuns.length === 1) {
    const { run } = shownRuns[0];
    return Object.keys(run.curves.y).filter((key) => key.startsWith(PHASES)).map((key, n) => ({ label: key.slice(PHASES.length), place: n, pattern: 0, x: run.curves.x, mean: run.curves.y[key].mean }));
  }
  return shownRuns.filter(({ run }) => run.curves.y.seconds).map(({ run, place }) => ({ label: run.name, place, pattern: 0, x: run.curves.x, ...run.curves.y.seconds }));
}

/** Share of the time of all steps, one bar for each run. */
function phases() {
  const names = [...new Set(visible().flatMap(({ run }) => Object.keys(run.spent.phases)))];
  if (!names.length) { $('phases-h').hidden = true; fill($('phases')); return; }
  $('phases-h').hidden = false;
  const longest = Math.max(...visible().map(({ run }) => run.spent.whole || 0));
  fill($('phases'),
    h('ul', { class: 'legend wide-legend' }, names.map((name, n) => h('li', {}, s('svg', { class: 'swatch', viewBox: '0 0 22 8', 'aria-hidden': 'true' }, s('rect', { width: 22, height: 8, rx: 2, fill: colour(n) })), h('span', {}, name)))),
    visible().map(({ run }) => {
      const whole = run.spent.whole || 1;
      return h('div', { class: 'bar-row' }, h('span', { class: 'bar-name' }, several() ? shown(run.name) : 'all steps', h('small', {}, ' ' + duration(run.spent.whole))),
        h('div', { class: 'stacked', role: 'img', 'aria-label': names.map((name) => `${name} ${percent((run.spent.phases[name] || 0) / whole)}`).join(', '), vars: { '--w': (100 * whole) / longest + '%' } },
          names.map((name, n) => h('span', { class: 'piece', title: `${name}: ${duration(run.spent.phases[name])}, ${percent((run.spent.phases[name] || 0) / whole)}`, vars: { '--w': (100 * (run.spent.phases[name] || 0)) / whole + '%', '--c': colour(n) } }))));
    }));
}
