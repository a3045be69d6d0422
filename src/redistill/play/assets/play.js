
// What `play/page.py` hands out, drawn inside a part of gradio's: `element`, `props` and `watch` are its own.
const STATES = { marked: 'what SCRG would correct', agreed: 'the teacher agrees with every token', revised: 'revised' };

function answers(found) {
  const { row, state } = found;
  const nothingSaid = !row.kept.length && !row.rejected && !row.new.length;
  const written = state === 'revised' ? sheet(row)
    : [h('div', { class: 'answer marked', dir: 'auto' }, nothingSaid ? h('span', { class: 'nothing' }, 'nothing') : [pieces(row.kept, ''), state === 'marked' ? fix(row) : null, pieces(row.old, '')]), penLegend(row), facts(row)];
  const rounds = found.rounds > 1 ? `, ${found.rounds} times` : '';
  return h('div', { class: 'turn' }, h('p', { class: 'asked', dir: 'auto' }, shown(found.prompt)),
    h('div', { class: 'both' },
      h('section', { class: 'sheet', 'aria-label': 'Student' }, h('h2', {}, 'Student', h('small', {}, STATES[state] + rounds + (found.done && state === 'revised' ? '; nothing more to correct' : ''))), written),
      h('section', { class: 'sheet teacher', 'aria-label': 'Teacher' }, h('h2', {}, 'Teacher'), h('div', { class: 'answer', dir: 'auto' }, found.teacher ? shown(found.teacher) : h('span', { class: 'nothing' }, 'nothing')))));
}
const title = ([student, teacher]) => h('header', { class: 'title' }, h('p', { class: 'brand' }, 'redistill play'),
  h('h1', {}, shown(teacher), h('span', { class: 'arrow', 'aria-label': ' teaches ' }, ' → '), shown(student)));

function draw() {
  const found = JSON.parse(props.value);
  element.classList.add('redistill');
  fill(element,
    found.problem ? h('p', { class: 'problem', role: 'alert' }, shown(found.problem)) : null,
    found.title ? title(found.title) : null,
    found.note ? h('p', { class: 'note', role: 'status' }, shown(found.note)) : null,
    found.state ? answers(found) : null);
}
watch('value', draw);
draw();
