// Teacher, student before and student after, side by side.

const reading = { set: 'all', seed: null, order: 'given', found: '', most: 10, off: new Set() };

const again = (name) => (value) => { reading[name] = value; reading.most = 10; sections.answers(); };
const answerSet = choice('Set', [['all', 'all']], 'all', again('set'));
const answerSeed = choice('Seed', [['all', 'all']], 'all', again('seed'));
const answerOrder = choice('Order', [['given', 'as in the data'], ['gain', 'largest gain in ROUGE-L'], ['loss', 'largest loss in ROUGE-L'], ['high', 'highest ROUGE-L'], ['low', 'lowest ROUGE-L']], 'given', again('order'));
const answerChips = h('div', { class: 'chips', role: 'group', 'aria-label': 'Models that are shown' });
fill($('answer-tools'), searchBox('Search prompts and answers', again('found')), answerSet, answerSeed, answerOrder, answerChips);
const answerCount = h('p', { class: 'note', role: 'status' });
const answerCards = h('div', {});
let cardsShown = '';
const answerMore = h('button', { type: 'button', class: 'wide-button', onclick: () => { reading.most += 20; sections.answers(); } });
fill($('answer-list'), answerCount, answerCards, answerMore);

sections.answers = () => {
  const { answers } = store.data, { columns, prompts } = answers;
  $('answer-tools').hidden = $('answer-list').hidden = !answers.rows.length;
  emptyNote('answers', !answers.rows.length && 'No answers are kept in this folder: a recipe with a section “evaluation” keeps them, and so does redistill evaluate.');
  if (!answers.rows.length) return;
  const options = (all, place) => [...new Set(answers.rows.map((row) => row[place]))].map((each) => [each, each || 'without a name']).reduce((list, each) => [...list, each], [['all', all]]);
  reading.set = reoption(answerSet, trimmed(options('all sets', 0)));
  const seeds = trimmed(options('all seeds', 1));
  if (reading.seed === null && seeds.length > 1) {
    reoption(answerSeed, seeds);
    answerSeed.querySelector('select').value = seeds[1][0];
  }
  reading.seed = reoption(answerSeed, seeds);
  if (columns.length > 3 && !reading.touched) columns.slice(3).forEach((column) => reading.off.add(column.name));
  refill(answerChips, columns.length > 1 && columns.map((column) => h('button', { type: 'button', class: 'chip', 'aria-pressed': String(!reading.off.has(column.name)), onclick: () => {
    reading.touched = true;
    if (!reading.off.delete(column.name)) reading.off.add(column.name);
    sections.answers();
  } }, shown(column.name))));
  const places = columns.map((column, place) => place).filter((place) => !reading.off.has(columns[place].name));
  const found = reading.found, has = (text) => text.toLowerCase().includes(found);
  let rows = answers.rows.filter(([set, seed, , prompt, cells]) => (reading.set === 'all' || set === reading.set) && (reading.seed === 'all' || seed === reading.seed) &&
    (!found || has(prompts[prompt][0]) || prompts[prompt][1].some(has) || places.some((place) => cells[place] && has(cells[place][0]))));
  rows = ordered(rows, columns);
  answerCount.textContent = `${reading.seed === 'all' && seeds.length > 1 ? plural(rows.length, 'answer', 'answers') + ' of each model' : plural(rows.length, 'prompt', 'prompts')}` +
    (answers.rows.length < answers.total ? `. The page holds ${answers.rows.length.toLocaleString('en-US')} of ${answers.total.toLocaleString('en-US')} answers of each model; all are in the folder.` : '');
  // Cards that would be the same stay, with what the reader has opened in them.
  const cards = JSON.stringify([rows.length, answers.total, columns, places, reading]);
  if (cards !== cardsShown) fill(answerCards, rows.slice(0, reading.most).map((row) => card(row, places, found)));
  cardsShown = cards;
  answerMore.hidden = rows.length <= reading.most;
  answerMore.textContent = `Show more (${(rows.length - reading.most).toLocaleString('en-US')} left)`;
};

function ordered(rows, columns) {
  const last = columns.findLastIndex((column) => column.role === 'after'), first = columns.findIndex((column) => column.role === 'before');
  const target = last >= 0 ? last : columns.length - 1;
  const score = (row, place) => row[4][place]?.[1] ?? null;
  const gain = (row) => (first < 0 || score(row, target) === null || score(row, first) === null ? null : score(row, target) - score(row, first));
  const keys = { gain, loss: (row) => { const value = gain(row); return value === null ? null : -value; }, high: (row) => score(row, target), low: (row) => { const value = score(row, target); return value === null ? null : -value; } };
  const key = keys[reading.order];
  return key ? [...rows].sort((a, b) => (key(b) ?? -Infinity) - (key(a) ?? -Infinity)) : rows;
}
function card([set, seed, index, prompt, cells], places, found) {
  const { columns, prompts } = store.data.answers, [text, references] = prompts[prompt];
  return h('article', { class: 'card' },
    h('p', { class: 'card-head' }, [set, `prompt ${index + 1}`, seed === 'greedy' ? 'greedy' : 'seed ' + seed].filter(Boolean).join(' · ')),
    promptBlock(text, found),
    h('div', { class: 'columns' }, places.map((place) => h('section', { class: 'said role-' + columns[place].role, 'aria-label': columns[place].name },
      h('h4', {}, shown(columns[place].name), cells[place] && cells[place][1] !== null ? h('span', { class: 'score' }, (cells[place][2] ? '= reference · ' : '') + 'ROUGE-L ' + fixed(cells[place][1], 1)) : null),
      cells[place] ? (cells[place][0].trim() ? h('div', { class: 'answer', dir: 'auto' }, shown(cells[place][0], found)) : nothing('An empty answer.')) : nothing('Not asked.')))),
    references.length > 0 && h('details', {}, h('summary', {}, references.length > 1 ? 'References' : 'Reference'), references.map((each) => h('div', { class: 'answer', dir: 'auto' }, shown(each, found)))));
}
