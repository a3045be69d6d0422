// Settings, navigation, light and dark, and new data while a run goes on.

sections.settings = () => {
  const runs = store.data.runs.filter((run) => Object.keys(run.recipe).length);
  emptyNote('settings', !runs.length && 'There is no recipe.yaml: the settings are not known.');
  if (!runs.length) { fill($('settings-body')); return; }
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.recipe)))];
  const differ = names.filter((name) => runs.length > 1 && name !== 'training.output_dir' && new Set(runs.map((run) => run.recipe[name])).size > 1);
  const open = $('settings-body').querySelector('details')?.open;
  const rows = (list) => h('div', { class: 'wide', tabindex: 0, role: 'region', 'aria-label': 'Settings' }, h('table', { class: 'settings' }, h('caption', { class: 'sr' }, 'Settings by run'),
    h('thead', {}, h('tr', {}, h('th', { scope: 'col' }, 'Setting'), runs.map((run) => h('th', { scope: 'col' }, runs.length > 1 ? shown(run.name) : 'Value')))),
    h('tbody', {}, list.map((name) => h('tr', {}, h('th', { scope: 'row' }, name), runs.map((run) => h('td', {}, run.recipe[name] === undefined ? '–' : shown(run.recipe[name]))))))));
  fill($('settings-body'),
    runs.length > 1 && [h('p', { class: 'lead' }, differ.length ? `${plural(differ.length, 'setting differs', 'settings differ')} between these runs.` : 'The runs have the same settings.', firstOnly()), differ.length > 0 && rows(differ)],
    h('details', { open }, h('summary', {}, `All ${names.length} settings`), rows(names)));
};

function showNavigation() {
  const list = [...document.querySelectorAll('main > section')];
  fill($('nav'), list.map((section) => h('a', { href: '#' + section.id }, section.dataset.title)));
  const links = new Map(list.map((section, n) => [section, $('nav').children[n]]));
  const spy = () => {
    const at = list.findLast((section) => section.getBoundingClientRect().top < 140) || list[0];
    links.forEach((link, section) => (section === at ? link.setAttribute('aria-current', 'true') : link.removeAttribute('aria-current')));
    const link = links.get(at), nav = $('nav');
    if (link.offsetLeft < nav.scrollLeft + nav.offsetLeft || link.offsetLeft + link.offsetWidth > nav.scrollLeft + nav.offsetLeft + nav.clientWidth) nav.scrollLeft = link.offsetLeft - nav.offsetLeft - 40;
  };
  addEventListener('scroll', spy, { passive: true });
  spy();
}

function themes() {
  const root = document.documentElement, dark = matchMedia('(prefers-color-scheme: dark)');
  const keep = (value) => { try { localStorage.setItem('redistill-theme', value); } catch { /* a page from a file may not keep anything */ } };
  try { if (localStorage.getItem('redistill-theme')) root.dataset.theme = localStorage.getItem('redistill-theme'); } catch { /* likewise */ }
  $('theme').addEventListener('click', () => {
    root.dataset.theme = (root.dataset.theme || (dark.matches ? 'dark' : 'light')) === 'dark' ? 'light' : 'dark';
    keep(root.dataset.theme);
  });
}

function drawAll() {
  for (const [name, section] of Object.entries(sections)) {
    try { section(); } catch (problem) {
      // One strange record must not take the rest of the page with it.
      console.error(name, problem);
      emptyNote(name, 'This part could not be drawn: ' + problem.message);
    }
  }
  fill($('foot'), `redistill report · made ${store.data.made} from ${plural(store.data.kinds.length, 'folder', 'folders')}. Natural logarithms: the unit is the nat.`);
}

// Live: the server answers "not modified" while nothing was written.
function follow() {
  const light = $('live');
  let version = store.data.version, read = Date.now(), failed = false;
  light.hidden = false;
  const say = () => {
    light.classList.toggle('off', failed);
    const ago = Math.round((Date.now() - read) / 1000);
    const text = failed ? 'the server has ended; what is shown stays' : ago < 8 ? 'live' : `live, unchanged for ${duration(ago)}`;
    if (light.textContent !== text) light.textContent = text;
  };
  const ask = async () => {
    try {
      const answer = await fetch('data.json', { headers: { 'If-None-Match': version }, cache: 'no-store' });
      failed = !(answer.ok || answer.status === 304);
      if (answer.status === 200) {
        store.data = await answer.json();
        ({ version } = store.data);
        read = Date.now();
        inPlace(drawAll);
      }
    } catch { failed = true; }
    say();
    setTimeout(ask, failed ? 5000 : 2000);
  };
  ask();
}
/** Draws, and puts what the reader was looking at back to where it stood. */
function inPlace(draw) {
  const looked = [...document.querySelectorAll('main > section')].findLast((section) => section.getBoundingClientRect().top <= 80);
  const before = looked && looked.getBoundingClientRect().top, lists = revisionList.scrollTop;
  const focused = document.activeElement && document.activeElement.closest('#revision-split') && pen.chosen;
  draw();
  revisionList.scrollTop = lists;
  if (focused) revisionList.querySelector('[aria-current="true"]')?.focus({ preventScroll: true });
  if (looked) scrollBy({ top: looked.getBoundingClientRect().top - before, behavior: 'instant' });
}

showNavigation();
themes();
drawAll();
if ('live' in document.documentElement.dataset) follow();
