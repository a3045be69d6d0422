// One answer seen closely: the distributions at a token with DAC-KL's clip, and the phrases with their distances.

const lens = { run: null, key: null, position: null };
const LEAST = 1e-6; // probabilities below are drawn there

const lensRun = choice('Run', [['', '']], '', (value) => { lens.run = value; lens.key = null; sections.views(); });
const lensView = choice('Answer of', [['', '']], '', (value) => { lens.key = value; lens.position = null; sections.views(); });
const lensBack = h('button', { type: 'button', 'aria-label': 'Earlier answer', onclick: () => turn(-1) }, '←');
const lensOn = h('button', { type: 'button', 'aria-label': 'Later answer', onclick: () => turn(1) }, '→');
fill($('view-tools'), lensRun, lensBack, lensView, lensOn);

const origins = { rollout: 'just written', replay: 'replayed', reference: 'reference' };
const lensViews = () => store.data.runs.find((run) => run.name === lens.run)?.views.shown ?? [];

sections.views = () => {
  const runs = store.data.runs.filter((run) => run.views.shown.length), any = runs.length > 0;
  for (const id of ['view-tools', 'view-text', 'dac-h', 'dac', 'spans-h', 'spans']) $(id).hidden = !any;
  const why = store.data.runs.map((run) => run.views.missing).find(Boolean) || 'A run with a teacher writes them into views.jsonl, the first after its first step.';
  emptyNote('views', !any && 'No answer was seen closely in this folder. ' + why);
  if (!any) return;
  if (!runs.some((run) => run.name === lens.run)) { lens.run = runs[0].name; lens.key = null; }
  reoption(lensRun, runs.map((run) => [run.name, run.name]));
  lensRun.querySelector('select').value = lens.run;
  const views = lensViews();
  // The last one, and it stays the last one while a run goes on, until another is chosen.
  const view = views.find((each) => String(each.step) === lens.key) || views[views.length - 1];
  lensView.hidden = false;
  const list = lensView.querySelector('select');
  fill(list, views.map((each) => h('option', { value: each.step }, `step ${each.step.toLocaleString('en-US')}, ${origins[each.origin] || each.origin}`)));
  list.value = String(view.step);
  lensBack.disabled = view === views[0];
  lensOn.disabled = view === views[views.length - 1];
  if (!view.positions.some((each) => each.position === lens.position)) {
    lens.position = view.positions.reduce((best, each) => ((each.kl ?? 0) > (best?.kl ?? -1) ? each : best), null)?.position ?? null;
  }
  refill($('view-text'), viewSheet(view));
  fill($('dac'), dac(view));
  fill($('spans'), phrases(view));
};

function turn(by) {
  const views = lensViews(), at = lens.key === null ? views.length - 1 : views.findIndex((each) => String(each.step) === lens.key);
  const next = views[at + by];
  if (!next) return;
  lens.key = String(next.step);
  lens.position = null;
  sections.views();
}

function viewSheet(view) {
  const seen = new Map(view.positions.map((each) => [each.position, each]));
  const text = view.tokens.map(([piece, kl], place) => {
    const at = seen.get(place), shade_ = kl === null ? {} : { '--k': shade(kl) };
    if (!at) return kl === null ? shown(piece) : h('span', { class: 'tk', title: `KL ${fixed(kl, 3)} nats`, vars: shade_ }, shown(piece));
    return h('button', { type: 'button', class: 'tk pick' + (piece === '' ? ' control' : ''), 'aria-pressed': String(place === lens.position), title: `KL ${fixed(kl, 3)} nats; show the distributions`, vars: shade_, onclick: () => { lens.position = place; sections.views(); } },
      piece === '' ? shown(at.token) : /^\s+$/.test(piece) ? token(piece) : shown(piece));
  });
  return h('article', { class: 'sheet' }, promptBlock(view.prompt, ''), h('div', { class: 'answer lens', dir: 'auto' }, text),
    h('ul', { class: 'legend pen-legend' }, h('li', {}, h('span', { class: 'ramp', 'aria-hidden': 'true' }), ` KL per token, 0 to ${MOST_KL} nats`), h('li', {}, h('span', { class: 'tk pick sample' }, 'framed'), ' a token whose distributions were kept: choose it'), view.source && h('li', { title: view.source }, shown(lastPart(view.source)))));
}

function dac(view) {
  const at = view.positions.find((each) => each.position === lens.position);
  if (!at) return nothing('No distribution was kept for this answer.');
  const clips = at.kept.length > 0;
  const said = ['At token ', String(at.position + 1), ', ', h('q', {}, token(at.token)), `, the KL is ${fixed(at.kl, 3)} nats. `,
    clips ? `DAC-KL keeps ${figure(at.retained_classes)} of ${view.vocabulary === null ? 'the' : view.vocabulary.toLocaleString('en-US')} classes with ${percent(at.retained_mass)} of the teacher’s mass; the clipped divergence is ${fixed(at.divergence, 3)} nats. What is left out, ${percent(at.bucket_teacher)} of the teacher and ${percent(at.bucket_student)} of the student, ${rest()}.`
      : 'This run’s token loss does not clip, so there are no bounds and no bucket.', at.tail > 0 && ' The teacher told its most probable classes only; all others count as one, the tail.'];
  return [h('p', { class: 'lead' }, said), clips && ranked() === 'mass' && axis(at), classTable(at, clips)];
}
const setting = (name) => store.data.runs.find((run) => run.name === lens.run)?.recipe[name];
const ranked = () => setting('objective.dac.quantile') || 'mass';
const rest = () => ({ drop: 'is dropped', renormalize: 'is dropped and the kept part renormalised' }[setting('objective.dac.rest')] || 'went into the bucket as one class');

/** The teacher's classes from the least to the most probable, each as wide as its probability, with the clip over them. */
function axis(at) {
  const wide = 1000, high = 92, x = (share) => 10 + share * (wide - 20), parts = [];
  let right = 1;
  at.classes.forEach((name, n) => {
    const p = at.teacher[n] ?? 0, left = right - p, kept = at.kept[n] ?? 0;
    if (p * wide > 0.6) {
      parts.push(s('rect', { class: 'slice' + (kept >= 0.999 ? '' : kept > 0.001 ? ' edge' : ' out'), x: x(left), y: 26, width: Math.max(0.5, x(right) - x(left) - 1), height: 34 }));
      const label = name === '' ? '∅' : /^\s+$/.test(name) ? (name.includes('\n') ? '↵' : '␣') : name.trim().replace(HIDDEN, '·');
      if (p * wide > 9 * Math.min(label.length, 18)) parts.push(s('text', { class: 'slice-name' + (kept > 0.001 ? '' : ' out'), x: (x(left) + x(right)) / 2, y: 47, 'text-anchor': 'middle' }, label.slice(0, 18)));
    }
    right = left;
  });
  if (right > 0.0005) parts.push(s('rect', { class: 'slice many', x: x(0), y: 26, width: Math.max(0.5, x(right) - x(0) - 1), height: 34 }));
  if (right > 0.09) parts.push(s('text', { class: 'slice-name many', x: x(right / 2), y: 47, 'text-anchor': 'middle' }, 'all other classes'));
  const bound = (level, name, side) => level === null ? [] : [s('line', { class: 'bound', x1: x(level), x2: x(level), y1: 18, y2: 68 }),
    s('text', { class: 'bound-name', x: Math.min(Math.max(x(level), 4), wide - 4), y: side < 0 ? 84 : 13, 'text-anchor': level < 0.12 ? 'start' : level > 0.88 ? 'end' : 'middle' }, `${name} = ${fixed(level, 3)}`)];
  const clipped = at.lower === null || at.upper === null ? [] : [s('rect', { class: 'veil', x: x(0), y: 26, width: Math.max(0, x(at.lower) - x(0)), height: 34 }), s('rect', { class: 'veil', x: x(at.upper), y: 26, width: Math.max(0, x(1) - x(at.upper)), height: 34 })];
  return h('figure', { class: 'panel axis' }, h('figcaption', {}, h('span', { class: 'title' }, 'The teacher’s distribution as an axis'), h('span', { class: 'unit' }, 'least to most probable, each class as wide as its probability')),
    h('div', { class: 'roll', tabindex: 0, role: 'region', 'aria-label': 'The axis' }, s('svg', { viewBox: `0 0 ${wide} ${high}`, role: 'img', 'aria-label': `Clip from the quantile ${fixed(at.lower, 3)} to ${fixed(at.upper, 3)}` },
      s('defs', {}, s('pattern', { id: 'hatch', width: 7, height: 7, patternUnits: 'userSpaceOnUse', patternTransform: 'rotate(45)' }, s('line', { class: 'hatch', x1: 0, x2: 0, y1: 0, y2: 7 }))), clipped, parts, bound(at.lower, 'l', -1), bound(at.upper, 'u', 1))),
    h('p', { class: 'about' }, 'What lies between l and u is kept, hatched is clipped; the teacher’s most probable class is always kept unless the recipe says otherwise.'));
}

const tailName = (at) => `the tail, ${at.tail.toLocaleString('en-US')} classes as one`;
function classTable(at, clips) {
  const places = at.classes.map((_, n) => n), sum = (column) => places.reduce((all, n) => all + (column[n] ?? 0), 0);
  const wide = 420, log = (p) => 8 + (1 - Math.log10(Math.max(p ?? 0, LEAST)) / Math.log10(LEAST)) * (wide - 16);
  const dumbbell = (p, q, kind) => s('svg', { class: 'dumbbell ' + (kind || ''), viewBox: `0 0 ${wide} 18`, 'aria-hidden': 'true' },
    [1e-6, 1e-4, 1e-2, 1].map((each) => s('line', { class: 'grid', x1: log(each), x2: log(each), y1: 0, y2: 18 })),
    s('line', { class: 'link', x1: log(p), x2: log(q), y1: 9, y2: 9 }), s('rect', { class: 'q', x: log(q) - 4, y: 5, width: 8, height: 8 }), s('circle', { class: 'p', cx: log(p), cy: 9, r: 4.5 }));
  const row = (name, p, q, kept, kind) => h('tr', { class: kind || (clips && kept < 0.001 ? 'out' : null) }, h('th', { scope: 'row' }, name), h('td', { class: 'plot' }, dumbbell(p, q, kind)),
    h('td', { class: 'n' }, probability(p)), h('td', { class: 'n' }, probability(q)),
    clips && h('td', {}, kind === 'bucket' ? 'as one class' : kind === 'others' ? '' : kept >= 0.999 ? 'kept' : kept > 0.001 ? `edge, ${percent(kept)} kept` : rest() === 'went into the bucket as one class' ? 'in the bucket' : 'left out'));
  const others = [Math.max(0, 1 - sum(at.teacher) - (at.tail_teacher ?? 0)), Math.max(0, 1 - sum(at.student) - (at.tail_student ?? 0))];
  const listed = others[0] + others[1] > 1e-4 || at.tail === null;
  return h('div', { class: 'wide', tabindex: 0, role: 'region', 'aria-label': 'The most probable classes' }, h('table', { class: 'classes' }, h('caption', { class: 'sr' }, 'Probabilities of teacher and student'),
    h('thead', {}, h('tr', {}, h('th', { scope: 'col' }, 'Token'), h('th', { scope: 'col' }, h('span', { class: 'key-p' }, '● teacher'), ' ', h('span', { class: 'key-q' }, '■ student'), ' from 10⁻⁶ to 1'), h('th', { scope: 'col', class: 'n' }, 'Teacher'), h('th', { scope: 'col', class: 'n' }, 'Student'), clips && h('th', { scope: 'col' }, 'DAC-KL'))),
    h('tbody', {}, places.map((n) => row(h('code', { class: at.classes[n] === at.token ? 'said-here' : null, title: at.classes[n] === at.token ? 'the token of the answer' : null }, token(at.classes[n])), at.teacher[n], at.student[n], at.kept[n])),
      listed && row(at.tail === null ? 'all other classes' : 'other classes that the teacher told', others[0], others[1], null, 'others'), at.tail > 0 && row(tailName(at), at.tail_teacher, at.tail_student, at.tail_kept), clips && rest() === 'went into the bucket as one class' && row('the bucket', at.bucket_teacher, at.bucket_student, null, 'bucket'))));
}
const probability = (p) => (p === null ? '–' : p >= 0.001 ? digits(p, 3) : p === 0 ? '0' : p.toExponential(0));

/** Runs of one span number, with the mean distance of their neighbours. */
function phrasesOf(view) {
  const found = [];
  view.spans.forEach((span, place) => {
    if (span < 0) return;
    if (place && view.spans[place - 1] === span) found[found.length - 1].to = place + 1;
    else found.push({ from: place, to: place + 1 });
  });
  for (const each of found) {
    const gaps = view.gaps.slice(each.from, each.to - 1).filter((gap) => gap !== null);
    each.text = view.tokens.slice(each.from, each.to).map(([piece]) => piece).join('');
    each.gaps = gaps;
    each.distance = gaps.length ? gaps.reduce((sum, gap) => sum + gap, 0) / gaps.length : null;
  }
  return found.filter((each) => each.distance !== null);
}
const distance = (value) => (value > 0 && value < 0.0005 ? '< 0.001' : fixed(value, 3));
function phrases(view) {
  const found = phrasesOf(view);
  if (!found.length) return nothing('This answer has no phrase of two tokens or more, or the run no span loss.');
  const most = Math.max(...found.map((each) => each.distance)) || 1, starts = new Map(found.map((each) => [each.from, each])), text = [];
  for (let place = 0; place < view.tokens.length; place++) {
    const phrase = starts.get(place);
    if (!phrase) { text.push(...shown(view.tokens[place][0])); continue; }
    text.push(h('span', { class: 'phrase', tabindex: 0, vars: { '--k': (phrase.distance / most).toFixed(3) }, title: `distances ${phrase.gaps.map((gap) => fixed(gap, 3)).join(', ')}`, 'aria-label': `${phrase.text}, distance ${fixed(phrase.distance, 3)}` }, shown(phrase.text), h('small', {}, distance(phrase.distance))));
    place = phrase.to - 1;
  }
  const worst = [...found].sort((a, b) => b.distance - a.distance).slice(0, 8);
  return [h('p', { class: 'lead' }, `The phrases of the span loss. The number is how far apart the two models’ correlations of neighbouring tokens are, mean over the phrase: 0 is alike${{ cosine: ', 1 is unrelated', squared: ', 2 is the most' }[setting('objective.span.distance')] ?? ', √2 is the most'}.`),
    h('div', { class: 'sheet spans' }, h('div', { class: 'answer', dir: 'auto' }, text),
      h('ol', { class: 'worst', 'aria-label': 'Phrases that are furthest apart' }, worst.map((each) => h('li', {}, h('span', { class: 'clip2', dir: 'auto' }, shown(each.text.trim())), h('span', { class: 'bar', vars: { '--w': (100 * each.distance) / most + '%' } }), h('b', {}, distance(each.distance))))))];
}
