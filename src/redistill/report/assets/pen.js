// One revision as a teacher's red pen draws it: for any page that has a row of `revisions.py`.

const MOST_KL = 3; // nats; darker it does not get

/** The answer as it is now, what stood there before, how to read it, and its figures. */
function sheet(row, found) {
  return [h('div', { class: 'answer marked', dir: 'auto' }, pieces(row.kept, '', found), fix(row), pieces(row.new, 'rewritten', found)),
    h('details', { class: 'before', open: true }, h('summary', {}, 'What the student had written from there on'),
      h('div', { class: 'answer old', dir: 'auto' }, row.rejected ? h('del', {}, token(row.rejected.replace(/^ (?=\S)/, ''))) : null, pieces(row.old, '', found), !row.rejected && !row.old.some(([text]) => text) ? h('span', { class: 'nothing' }, 'nothing') : null)),
    penLegend(row), facts(row)];
}
const gainText = (row) => row.gain === null ? null : h('span', { class: row.gain > 0 ? 'up' : 'down' }, (row.gain > 0 ? '▲ ' : '▼ ') + signed(row.gain, 2));
function fix(row) {
  if (!row.tokens) return h('span', { class: 'seam', title: 'From here on the answer was written anew' }, '│');
  const blank = /^ \S/.test(row.rejected) ? ' ' : '';
  return [blank, h('ruby', { class: 'fix', title: row.kl === null ? null : `KL ${fixed(row.kl, 2)} nats` }, h('del', {}, token(row.rejected.slice(blank.length))),
    h('rt', {}, h('ins', { class: control(row.replacement) ? 'control' : null }, h('span', { class: 'sr' }, 'the teacher: '), token(row.replacement.replace(/^ (?=\S)/, '')))))];
}
/** Tokens with their KL as a shade; a token without a value has none. */
function pieces(parts, kind, found) {
  return parts.map(([text, kl]) => (kl === null ? (kind ? h('span', { class: kind }, shown(text, found)) : shown(text, found))
    : h('span', { class: 'tk ' + kind, title: `KL ${fixed(kl, 3)} nats`, vars: { '--k': shade(kl) } }, shown(text, found))));
}
const shade = (kl) => Math.sqrt(Math.min(Math.max(kl, 0), MOST_KL) / MOST_KL).toFixed(3);
function promptBlock(prompt, found) {
  const asked = question(prompt);
  return h('div', { class: 'prompt' }, h('p', { class: 'asked', dir: 'auto' }, shown(asked, found)),
    asked !== prompt.trim() && h('details', {}, h('summary', {}, 'Whole prompt'), h('pre', { dir: 'auto' }, shown(prompt))));
}
function penLegend(row) {
  const legend = [h('li', {}, h('del', {}, 'struck out'), ' the student’s'), h('li', {}, h('span', { class: 'ink' }, 'red'), ' the teacher’s'), h('li', {}, h('span', { class: 'rewritten' }, 'underlined'), ' written anew')];
  if (row.tokens) legend.push(h('li', {}, h('span', { class: 'ramp', 'aria-hidden': 'true' }), ` KL per token, 0 to ${MOST_KL} nats`));
  else legend.push(h('li', {}, 'Where tokens end was not recorded in this run, so there is no shade by token.'));
  return h('ul', { class: 'legend pen-legend' }, legend);
}
function facts(row) {
  const said = [['Step', row.step], ['Token', row.position === null ? null : `${row.position + 1}${row.length ? ' of ' + row.length : ''}`],
    ['KL there', row.kl === null ? null : fixed(row.kl, 2) + ' nats'],
    ['Teacher’s log-likelihood', row.was === null ? null : [minus(row.was), row.now === null ? null : [' → ', minus(row.now)], ' per token ', gainText(row)]],
    ['Source', row.source && h('span', { title: row.source }, shown(lastPart(row.source)))]];
  return h('dl', { class: 'row-facts' }, said.filter(([, value]) => value !== null && value !== '').map(([label, value]) => h('div', {}, h('dt', {}, label), h('dd', {}, value))));
}
const minus = (value) => fixed(value, 2).replace('-', '−');
const lastPart = (path) => path.split(/[\\/]/).pop();
