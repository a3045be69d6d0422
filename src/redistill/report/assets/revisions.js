// Revisions as a teacher's red pen, one at a time.

const pen = { run: 'all', kind: 'all', order: 'newest', found: '', chosen: null, shade: true };

const revisionRun = choice('Run', [['all', 'all runs']], 'all', (value) => { pen.run = value; sections.revisions(); });
fill($('revision-tools'),
  searchBox('Search revisions', (text) => { pen.found = text; sections.revisions(); }), revisionRun,
  choice('Show', [['all', 'all'], ['helped', 'that helped'], ['hurt', 'that hurt']], 'all', (value) => { pen.kind = value; pen.chosen = null; sections.revisions(); }),
  choice('Order', [['newest', 'newest first'], ['oldest', 'oldest first'], ['best', 'largest gain'], ['worst', 'largest loss'], ['kl', 'largest KL']], 'newest', (value) => { pen.order = value; pen.chosen = null; sections.revisions(); }),
  h('label', { class: 'field' }, h('input', { type: 'checkbox', checked: true, onchange: (event) => { pen.shade = event.target.checked; $('revision-split').classList.toggle('unshaded', !pen.shade); } }), h('span', {}, 'Shade by KL')));

const revisionList = h('ol', { class: 'list', 'aria-label': 'Revisions' });
const revisionDetail = h('article', { class: 'sheet', 'aria-live': 'polite' });
const revisionCount = h('p', { class: 'note' });
const stepBack = h('button', { type: 'button', onclick: () => stepRevision(-1) }, '← Previous');
const stepOn = h('button', { type: 'button', onclick: () => stepRevision(1) }, 'Next →');
const revisionPlace = h('span', { class: 'range-text' });
fill($('revision-split'), h('div', { class: 'side' }, revisionCount, revisionList),
  h('div', {}, h('div', { class: 'stepper' }, stepBack, revisionPlace, stepOn, h('span', { class: 'hint' }, 'or the arrow keys')), revisionDetail));

let revisionRows = [], revisionShown = null;
const revisionKey = (row) => row.run + '/' + row.number;

sections.revisions = () => {
  const { data } = store;
  pen.run = reoption(revisionRun, trimmed([['all', 'all runs'], ...data.runs.filter((run) => run.revisions.total).map((run) => [run.name, run.name])]));
  const all = data.runs.filter((run) => pen.run === 'all' || run.name === pen.run).flatMap((run) => run.revisions.shown.map((row) => ({ ...row, run: run.name })));
  const inText = (row) => !pen.found || [row.prompt, row.source, row.rejected, row.replacement, ...[row.kept, row.old, row.new].map((part) => part.map(([piece]) => piece).join(''))].some((text) => text.toLowerCase().includes(pen.found));
  const kinds = { all: () => true, helped: (row) => row.gain > 0, hurt: (row) => row.gain !== null && row.gain <= 0 };
  const newest = (a, b) => (b.step ?? 0) - (a.step ?? 0) || b.number - a.number;
  const by = (value) => (a, b) => (value(b) ?? -Infinity) - (value(a) ?? -Infinity) || newest(a, b);
  const orders = { newest, oldest: (a, b) => newest(b, a), best: by((row) => row.gain), worst: by((row) => (row.gain === null ? null : -row.gain)), kl: by((row) => row.kl) };
  revisionRows = all.filter((row) => kinds[pen.kind](row) && inText(row)).sort(orders[pen.order]);
  const chosenRuns = data.runs.filter((run) => pen.run === 'all' || run.name === pen.run), total = chosenRuns.reduce((sum, run) => sum + run.revisions.total, 0);
  const helped = chosenRuns.reduce((sum, run) => sum + run.revisions.helped, 0);
  $('revision-split').hidden = $('revision-tools').hidden = !total;
  emptyNote('revisions', !total && 'No revision was recorded: SCRG writes them when an answer of the student is corrected.');
  revisionCount.textContent = `${plural(revisionRows.length, 'revision', 'revisions')} listed` + (all.length < total ? ` of ${total.toLocaleString('en-US')}: the newest, and those that helped and hurt most` : '') +
    `. The teacher’s log-likelihood rose in ${helped.toLocaleString('en-US')} of all ${total.toLocaleString('en-US')}.` + firstOnly();
  if (!revisionRows.some((row) => revisionKey(row) === pen.chosen)) pen.chosen = revisionRows.length ? revisionKey(revisionRows[0]) : null;
  fill(revisionList, revisionRows.map((row) => h('li', {}, h('button', { type: 'button', 'aria-current': String(revisionKey(row) === pen.chosen), onclick: () => choose(row) },
    h('span', { class: 'line' }, h('span', {}, `step ${row.step ?? '–'}` + (several() ? ' · ' + row.run : '')), gainText(row)),
    h('span', { class: 'clip2', dir: 'auto' }, shown(question(row.prompt).slice(0, 160), pen.found))))));
  showRevision();
};

function choose(row) {
  pen.chosen = revisionKey(row);
  revisionList.querySelectorAll('button').forEach((button, n) => button.setAttribute('aria-current', String(revisionRows[n] === row)));
  showRevision();
}
function stepRevision(by) {
  const at = revisionRows.findIndex((row) => revisionKey(row) === pen.chosen) + by;
  if (at < 0 || at >= revisionRows.length) return;
  choose(revisionRows[at]);
  const button = revisionList.children[at].firstChild, list = revisionList;
  if (button.offsetTop < list.scrollTop || button.offsetTop + button.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = button.offsetTop - list.clientHeight / 3;
}
$('revisions').addEventListener('keydown', (event) => {
  if (event.target.matches('input, select') || event.altKey || event.ctrlKey || event.metaKey) return;
  const by = { ArrowRight: 1, ArrowDown: 1, j: 1, ArrowLeft: -1, ArrowUp: -1, k: -1 }[event.key];
  if (!by) return;
  event.preventDefault();
  stepRevision(by);
});

function showRevision() {
  const at = revisionRows.findIndex((row) => revisionKey(row) === pen.chosen), row = revisionRows[at];
  stepBack.disabled = at <= 0;
  stepOn.disabled = at < 0 || at >= revisionRows.length - 1;
  revisionPlace.textContent = row ? `${at + 1} of ${revisionRows.length}` : '';
  const now = row ? JSON.stringify(row) + pen.found : '';
  if (now === revisionShown) return;
  revisionShown = now;
  if (!row) { fill(revisionDetail, nothing('No revision fits.')); return; }
  fill(revisionDetail, promptBlock(row.prompt, pen.found), sheet(row, pen.found));
}
/** A sentence in place of a section that has nothing to show. */
function emptyNote(id, text) {
  const section = $(id), old = section.querySelector(':scope > .empty');
  if (old) old.remove();
  if (text) section.append(nothing(text));
}
