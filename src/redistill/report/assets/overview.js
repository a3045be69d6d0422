// The first screen: what was distilled into what, the sentence, four figures, the table.

const ROLES = { teacher: 'Teacher', before: 'Before', after: 'After', method: '' };
const MAIN = [
  ['parameters', 'Parameters', count],
  ['rougeL_mean', 'ROUGE-L, sampled', (value, row) => fixed(value, 2) + (row.rougeL_std === null ? '' : ' ± ' + fixed(row.rougeL_std, 2))],
  ['rougeL_greedy', 'ROUGE-L, greedy', (value) => fixed(value, 2)],
  ['kl_to_teacher', 'KL to teacher', (value) => fixed(value, 3)],
  ['perplexity', 'Perplexity', figure],
  ['tokens_per_second', 'Tokens/s', (value) => fixed(value, 0)],
];
const FURTHER = [
  ['exact_match', 'Exact %', (value) => fixed(value, 1)],
  ['distinct_4', 'Distinct-4', (value) => fixed(value, 2)],
  ['self_repetition', 'Repeats itself', percent],
  ['mean_tokens', 'Tokens', (value) => fixed(value, 1)],
  ['share_cut', 'Cut off', percent],
  ['excess_error', 'ExAccErr %', (value) => fixed(value, 1)],
  ['runs', 'Runs', (value) => fixed(value, 0)],
  ['steps', 'Steps', (value) => fixed(value, 0)],
  ['train_seconds', 'Training', duration],
  ['peak_memory_bytes', 'Memory', (value) => (value === null ? '–' : fixed(value / 1e9, 1) + ' GB')],
];
const LESS = new Set(['kl_to_teacher', 'perplexity']);
const chosenTable = { all: false };

sections.overview = () => {
  const { data } = store, single = data.runs.length === 1 ? data.runs[0] : null;
  $('eyebrow').textContent = [data.title, single && progressText(single.state), 'read ' + data.made].filter(Boolean).join('  ·  ');
  fill($('heading'), headline(data, single));
  $('verdict').textContent = data.verdict.sentence;
  fill($('more'), data.verdict.more.map((each) => h('p', {}, coded(each))));
  fill($('facts'), data.verdict.facts.map(([label, value, note]) => h('div', {}, h('dt', {}, label), h('dd', {}, h('b', {}, value), h('span', {}, shown(note))))));
  refill($('table'), [...new Set(data.table.map((row) => row.set))].map((name) => table(data.table.filter((row) => row.set === name), name)));
  fill($('missing'), missing(data));
};

function progressText(state) {
  if (state.finished) return `finished after ${plural(state.done, 'step', 'steps')} in ${duration(state.seconds)}`;
  if (!state.done) return 'not begun';
  return `step ${state.done.toLocaleString('en-US')}${state.steps ? ' of ' + state.steps.toLocaleString('en-US') : ''}`;
}
function headline(data, single) {
  const names = single && single.names;
  if (names && names[0] && names[1]) return [...shown(names[0]), h('span', { class: 'arrow', 'aria-label': ' distilled into ' }, ' → '), ...shown(names[1])];
  if (data.kinds.every((kind) => kind === 'comparison')) return `${plural(data.runs.length, 'method', 'methods')}, ${plural(data.runs.reduce((sum, run) => sum + run.seeds, 0), 'run', 'runs')}`;
  return data.kinds.every((kind) => kind === 'evaluation') ? shown(data.title) : data.runs.length > 1 ? `${data.runs.length} runs side by side` : shown(data.title);
}

function table(rows, name) {
  const known = ([key]) => rows.some((row) => row[key] !== null);
  const further = FURTHER.filter(known), columns = [...MAIN.filter(known), ...(chosenTable.all ? further : [])];
  const tested = rows.some((row) => tests(row).length), of = new Set(rows.map((row) => row.of).filter(Boolean)).size > 1;
  const against = new Set(rows.flatMap((row) => tests(row).map(([, test]) => test.against)));
  const students = rows.filter((row) => row.role === 'after' || row.role === 'method');
  const best = (key) => {
    const values = students.map((row) => row[key]).filter((value) => value !== null);
    if (values.length < 2 || new Set(values).size < 2) return null;
    return LESS.has(key) ? Math.min(...values) : Math.max(...values);
  };
  const leaders = Object.fromEntries(['rougeL_mean', 'rougeL_greedy', 'kl_to_teacher', 'perplexity'].map((key) => [key, best(key)]));
  const scale = rows.reduce((most, row) => Math.max(most, (row.rougeL_mean ?? 0) + (row.rougeL_std ?? 0), row.rougeL_greedy ?? 0), 0);
  const goal = rows.find((row) => row.role === 'teacher');
  // Methods that lie close together are told apart by their difference from the baseline, not on a line from 0.
  const widest = Math.max(0, ...rows.filter((row) => row.role === 'method').map((row) => row.tests.rougeL_mean).filter(Boolean).flatMap((test) => [Math.abs(test.low ?? 0), Math.abs(test.high ?? 0)]));
  const plot = (row) => (widest ? changePlot(row.tests.rougeL_mean, widest) : rangePlot(row, scale, goal));
  const head = h('tr', {}, h('th', { scope: 'col' }, 'Model'), columns.map(([, title]) => h('th', { scope: 'col', class: 'n' }, title)),
    scale > 0 && h('th', { scope: 'col', class: 'plot' }, widest ? 'Change in ROUGE-L' : 'ROUGE-L'), tested && h('th', { scope: 'col', class: 'change' }, against.size === 1 ? ['Change from ', shown([...against][0])] : 'Change'));
  const body = rows.map((row) => h('tr', { class: 'role-' + row.role },
    h('th', { scope: 'row' }, shown(row.name), of && row.of ? h('small', { class: 'of' }, shown(row.of)) : null, row.baseline ? h('small', {}, ' baseline') : null, row.failed ? h('small', { class: 'bad' }, ` ${row.failed} failed`) : null),
    columns.map(([key, , format]) => h('td', { class: 'n' + (leaders[key] !== null && leaders[key] === row[key] && students.includes(row) ? ' best' : '') }, row[key] === null ? '–' : format(row[key], row), mark(row, key))),
    scale > 0 && h('td', { class: 'plot' }, plot(row)),
    tested && h('td', { class: 'change' }, change(row, against.size > 1))));
  return [
    name && h('h3', {}, shown(name)),
    h('div', { class: 'wide', tabindex: 0, role: 'region', 'aria-label': 'Scores' + (name ? ' on ' + name : '') }, h('table', { class: 'scores' }, h('caption', { class: 'sr' }, 'Scores of teacher and students'), h('thead', {}, head), h('tbody', {}, body))),
    h('p', { class: 'note' }, tableNote(rows, tested, leaders),
      further.length > 0 && h('button', { type: 'button', class: 'link', 'aria-expanded': String(chosenTable.all), onclick: () => { chosenTable.all = !chosenTable.all; sections.overview(); } }, chosenTable.all ? 'Fewer columns' : `${further.length} more columns`)),
  ];
}
function tableNote(rows, tested, leaders) {
  const said = [];
  if (rows.some((row) => row.rougeL_std !== null)) said.push(rows.some((row) => row.runs > 1) ? '± is the standard deviation over training seeds.' : '± is the standard deviation over the seeds of sampling.');
  if (rows.some((row) => row.role === 'method' && row.tests.rougeL_mean)) said.push('The line is the 95 % interval of the difference in ROUGE-L from the baseline (dashed), the dot filled where it is significant.');
  if (tested) said.push('▲ better, ▼ worse at 5 %, by paired bootstrap over prompts with Holm’s correction.');
  if (Object.values(leaders).some((each) => each !== null)) said.push('Bold: the best student.');
  said.push('KL in nats per token. ');
  return said.join(' ');
}
const mark = (row, key) => (row.tests[key] ? arrow(key, row.tests[key]) : null);
function arrow(key, test) {
  if (test.p === null || test.p > 0.05 || !test.difference) return null;
  const better = (test.difference < 0) === LESS.has(key);
  return h('span', { class: better ? 'up' : 'down', title: `${better ? 'better' : 'worse'} than ${test.against}, ${pText(test.p)}`, 'aria-label': better ? ' better' : ' worse' }, better ? ' ▲' : ' ▼');
}
/** A row's tests: against the student before, then against the first of several runs. */
const tests = (row) => [...Object.entries(row.tests), ...Object.entries(row.between)].filter(([, test]) => test.difference !== null);
const decimals = (key) => (key === 'kl_to_teacher' ? 3 : 2);
function change(row, named) {
  return tests(row).map(([key, test], n, all) => h('div', {}, named && (n === 0 || all[n - 1][1].against !== test.against) && h('small', {}, 'against ', shown(test.against)),
    h('b', {}, ({ rougeL_mean: 'ROUGE-L', rougeL_greedy: 'ROUGE-L greedy', kl_to_teacher: 'KL', exact_match: 'Exact' }[key] || key) + ' ' + signed(test.difference, decimals(key))),
    h('span', {}, ` [${signed(test.low, decimals(key))}, ${signed(test.high, decimals(key))}] ${test.p === null ? '' : pText(test.p)}`), named && arrow(key, test)));
}
/** A difference and its interval about 0, filled where it is significant; `widest`: what reaches the edge. */
function changePlot(test, widest) {
  if (!test || test.difference === null) return null;
  const wide = 120, x = (each) => wide / 2 + (each / widest) * (wide / 2 - 8), sure = test.p !== null && test.p <= 0.05;
  return s('svg', { class: 'range', viewBox: `0 0 ${wide} 20`, role: 'img', 'aria-label': `ROUGE-L ${signed(test.difference, 2)}, from ${signed(test.low, 2)} to ${signed(test.high, 2)}` },
    s('line', { class: 'goal', x1: x(0), x2: x(0), y1: 1, y2: 19 }),
    test.low !== null && s('line', { class: 'spread', x1: x(test.low), x2: x(test.high), y1: 10, y2: 10 }),
    s('circle', { class: sure ? 'mean' : 'mean unsure', cx: x(test.difference), cy: 10, r: 4 }));
}
/** Mean and spread on a line from 0, the teacher's mean as a dashed line. */
function rangePlot(row, scale, goal) {
  const key = row.rougeL_mean === null ? 'rougeL_greedy' : 'rougeL_mean', value = row[key], wide = 120;
  if (value === null) return null;
  const x = (each) => 6 + (each / (scale * 1.04)) * (wide - 12), std = key === 'rougeL_mean' ? row.rougeL_std ?? 0 : 0;
  const said = `ROUGE-L ${fixed(value, 2)}` + (std ? `, plus or minus ${fixed(std, 2)}` : '');
  return s('svg', { class: 'range', viewBox: `0 0 ${wide} 20`, role: 'img', 'aria-label': said },
    s('line', { class: 'base', x1: 6, x2: wide - 6, y1: 10, y2: 10 }),
    goal && goal[key] !== null && s('line', { class: 'goal', x1: x(goal[key]), x2: x(goal[key]), y1: 1, y2: 19 }),
    std > 0 && s('line', { class: 'spread', x1: x(Math.max(0, value - std)), x2: x(value + std), y1: 10, y2: 10 }),
    s('circle', { class: 'mean', cx: x(value), cy: 10, r: 4.5 }));
}
function missing(data) {
  const runs = data.runs.filter((run) => run.missing.length);
  if (!runs.length) return null;
  const count = runs.reduce((sum, run) => sum + run.missing.length, 0);
  const open = $('missing').querySelector('details')?.open ?? (data.runs.length === 1 && !data.table.length);
  return h('details', { class: 'missing', open }, h('summary', {}, `Not in ${data.runs.length > 1 ? 'these folders' : 'this folder'} (${count})`),
    runs.map((run) => [data.runs.length > 1 && h('h4', {}, shown(run.name)), h('ul', {}, run.missing.map((each) => h('li', {}, coded(each))))]));
}
