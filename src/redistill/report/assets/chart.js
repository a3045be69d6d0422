// One chart: lines (or stacked areas) over steps, with a reading under the pointer, zoom by dragging, and keys.

const EDGE = { left: 46, right: 10, top: 8, bottom: 22 };
const charts = new Set();
const inSight = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    entry.target.chart.seen = entry.isIntersecting;
    if (entry.isIntersecting && entry.target.chart.stale) entry.target.chart.draw();
  }
}, { rootMargin: '200px' });
const resized = new ResizeObserver((entries) => entries.forEach((entry) => entry.target.chart.draw()));

function redraw() { charts.forEach((chart) => chart.draw()); }
function read() { charts.forEach((chart) => chart.read()); }

class Chart {
  /** panel: title, unit, about, share. stacked: areas on top of each other. */
  constructor(panel, stacked) {
    this.panel = panel; this.stacked = stacked; this.series = []; this.seen = false; this.stale = true;
    this.svg = s('svg', { class: 'chart', tabindex: 0, role: 'img' });
    this.legend = h('ul', { class: 'legend' });
    this.notes = h('p', { class: 'lost' });
    this.node = h('figure', { class: 'panel' },
      h('figcaption', {}, h('span', { class: 'title' }, panel.title), h('span', { class: 'unit' }, panel.unit)),
      h('p', { class: 'about' }, panel.about), this.svg, this.legend, this.notes);
    this.svg.chart = this;
    inSight.observe(this.svg); resized.observe(this.svg); charts.add(this);
    this.listen();
  }

  /** series: [{label, place, pattern, x, mean, low, high, points}] */
  update(series, lost) {
    this.series = series;
    this.whole = series.map((each) => each.x).filter((x) => x.length).reduce((all, x) => [Math.min(all[0], x[0]), Math.max(all[1], x[x.length - 1])], [Infinity, -Infinity]);
    this.notes.textContent = lost ? plural(lost, 'value is', 'values are') + ' not finite and not drawn.' : '';
    this.notes.hidden = !lost;
    this.values = series.map(() => h('b', {}));
    fill(this.legend, series.map((each, n) => h('li', {}, each.points ? this.dot(each) : this.stacked ? this.block(each) : swatch(each.place, each.pattern), h('span', {}, each.label), this.values[n])));
    this.svg.setAttribute('aria-label', this.spoken());
    this.draw();
  }
  dot(each) { return s('svg', { class: 'swatch', viewBox: '0 0 22 8', 'aria-hidden': 'true' }, s('circle', { cx: 11, cy: 4, r: 3, fill: 'var(--paper)', stroke: colour(each.place), 'stroke-width': 2 })); }
  block(each) { return s('svg', { class: 'swatch', viewBox: '0 0 22 8', 'aria-hidden': 'true' }, s('rect', { width: 22, height: 8, rx: 2, fill: colour(each.place) })); }
  spoken() {
    const said = this.series.map((each) => {
      const known = each.mean.filter((value) => value !== null);
      return known.length ? `${each.label}: from ${figure(known[0])} to ${figure(known[known.length - 1])}, lowest ${figure(Math.min(...known))}, highest ${figure(Math.max(...known))}` : '';
    });
    return `${this.panel.title}, ${this.panel.unit}, over steps. ${said.filter(Boolean).join('; ')}. Arrow keys read values, plus and minus zoom, 0 shows all.`;
  }

  get span() {
    const [first, last] = store.range || this.whole;
    return first < last ? [first, last] : [first - 1, last + 1];
  }

  draw() {
    this.stale = !this.seen;
    const width = this.svg.clientWidth, height = this.svg.clientHeight;
    if (this.stale || !width || !this.series.length) return;
    this.svg.setAttribute('viewBox', `0 0 ${width} ${height}`);
    const [x0, x1] = this.span;
    this.x = (step) => EDGE.left + ((step - x0) / (x1 - x0)) * (width - EDGE.left - EDGE.right);
    this.step = (pixel) => x0 + ((pixel - EDGE.left) / (width - EDGE.left - EDGE.right)) * (x1 - x0);
    this.drawn = this.stacked ? this.stack() : this.series.map((each) => ({ ...each, line: smoothed(each.mean, each.points ? 0 : store.smooth) }));
    this.scale(height);
    const parts = [this.axes(width, height), ...(this.stacked ? this.areas() : this.lines())];
    this.rule = s('line', { class: 'rule', y1: EDGE.top, y2: height - EDGE.bottom });
    this.marks = this.drawn.map((each) => s('circle', { class: 'mark', r: 3.5, fill: colour(each.place) }));
    this.brush = s('rect', { class: 'brush', y: EDGE.top, height: height - EDGE.top - EDGE.bottom, width: 0 });
    fill(this.svg, ...parts, this.rule, ...this.marks, this.brush);
    this.read();
  }
  /** The places of a series that are in sight, with one more on either side. */
  inside(each) {
    const [x0, x1] = this.span;
    return [Math.max(0, each.x.findIndex((x) => x >= x0) - 1), (each.x.findLastIndex((x) => x <= x1) + 2) || each.x.length];
  }
  scale(height) {
    let low = Infinity, high = -Infinity;
    for (const each of this.drawn) {
      const [from, to] = this.inside(each);
      for (let at = from; at < to && at < each.x.length; at++) {
        const bounds = this.stacked ? [0, each.line[at]] : [each.line[at], ...(store.smooth ? [] : [each.low?.[at], each.high?.[at]])];
        for (const value of bounds) if (value !== null && value !== undefined) { low = Math.min(low, value); high = Math.max(high, value); }
      }
    }
    if (low > high) { low = 0; high = 1; }
    this.logarithmic = store.log && !this.stacked && !this.panel.share && low > 0;
    if (this.panel.share) { low = 0; high = Math.max(1, high); }
    else if (this.logarithmic) { if (low === high) { low /= 2; high *= 2; } }
    else { const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1; low = low >= 0 && low - room < 0 ? 0 : low - room * (low !== 0); high += room; }
    const inner = height - EDGE.top - EDGE.bottom, f = this.logarithmic ? Math.log : (v) => v;
    this.bounds = [low, high];
    this.y = (value) => EDGE.top + inner * (1 - (f(Math.max(value, this.logarithmic ? low / 10 : -Infinity)) - f(low)) / (f(high) - f(low)));
  }
  axes(width, height) {
    const [low, high] = this.bounds, group = s('g', { class: 'axes' });
    for (const at of this.logarithmic ? logTicks(low, high) : ticks(low, high, 4)) {
      group.append(s('line', { x1: EDGE.left, x2: width - EDGE.right, y1: this.y(at), y2: this.y(at) }),
        s('text', { x: EDGE.left - 7, y: this.y(at) + 3.5, 'text-anchor': 'end' }, tickText(at)));
    }
    for (const at of ticks(...this.span, Math.max(2, Math.floor(width / 90)))) {
      if (at % 1 === 0 && this.x(at) < width - EDGE.right + 1) group.append(s('text', { x: this.x(at), y: height - 6, 'text-anchor': 'middle' }, tickText(at)));
    }
    return group;
  }
  lines() {
    const parts = [];
    for (const each of this.drawn) {
      const [from, to] = this.inside(each), stroke = colour(each.place);
      if (each.low && !store.smooth) parts.push(s('path', { class: 'band', fill: stroke, d: this.band(each, from, to) }));
      if (store.smooth && !each.points) parts.push(s('path', { class: 'raw', stroke, d: this.path(each, each.mean, from, to) }));
      parts.push(s('path', { class: 'line' + (each.points ? ' thin' : ''), stroke, 'stroke-dasharray': dash(each.pattern), d: this.path(each, each.line, from, to) }));
      const known = each.line.reduce((sum, value) => sum + (value !== null), 0);
      if (each.points || known < 40) {
        for (let at = from; at < to && at < each.x.length; at++) {
          if (each.line[at] !== null) parts.push(s('circle', { class: each.points ? 'point' : 'dot', cx: this.x(each.x[at]), cy: this.y(each.line[at]), r: each.points ? 3 : 2, stroke, fill: each.points ? null : stroke }));
        }
      }
    }
    return [s('svg', { class: 'clip', x: EDGE.left - 3, y: 0, width: Math.max(0, this.svg.clientWidth - EDGE.left - EDGE.right + 6), height: this.svg.clientHeight - EDGE.bottom + 4, viewBox: `${EDGE.left - 3} 0 ${Math.max(1, this.svg.clientWidth - EDGE.left - EDGE.right + 6)} ${this.svg.clientHeight - EDGE.bottom + 4}` }, parts)];
  }
  path(each, values, from, to) {
    let d = '';
    for (let at = from; at < to && at < values.length; at++) {
      if (values[at] !== null) d += `${d ? 'L' : 'M'}${this.x(each.x[at]).toFixed(1)} ${this.y(values[at]).toFixed(1)}`;
    }
    return d || 'M0 0';
  }
  band(each, from, to) {
    let up = '', down = '';
    for (let at = from; at < to && at < each.x.length; at++) {
      if (each.low[at] === null) continue;
      const x = this.x(each.x[at]).toFixed(1);
      up += `${up ? 'L' : 'M'}${x} ${this.y(each.high[at]).toFixed(1)}`;
      down = `L${x} ${this.y(each.low[at]).toFixed(1)}` + down;
    }
    return up ? up + down + 'Z' : 'M0 0';
  }
  stack() {
    let below = null;
    return this.series.map((each) => {
      const line = smoothed(each.mean.map((value) => value ?? 0), store.smooth).map((value, at) => value + (below ? below[at] : 0));
      const drawn = { ...each, line, under: below };
      below = line;
      return drawn;
    });
  }
  areas() {
    return this.drawn.map((each) => {
      const [from, to] = this.inside(each), last = Math.min(to, each.x.length);
      let up = '', down = '';
      for (let at = from; at < last; at++) {
        const x = Math.min(Math.max(this.x(each.x[at]), EDGE.left), this.svg.clientWidth - EDGE.right).toFixed(1);
        up += `${up ? 'L' : 'M'}${x} ${this.y(each.line[at]).toFixed(1)}`;
        down = `L${x} ${this.y(each.under ? each.under[at] : 0).toFixed(1)}` + down;
      }
      return s('path', { class: 'area', fill: colour(each.place), d: up ? up + down + 'Z' : 'M0 0' });
    });
  }

  /** Values at the cursor, or the last ones. */
  read() {
    if (!this.rule || this.stale) return;
    const at = store.cursor, [x0, x1] = this.span, on = at !== null && at >= x0 && at <= x1;
    this.rule.style.display = on ? '' : 'none';
    this.drawn.forEach((each, n) => {
      const place = on ? nearest(each.x, at) : each.x.length - 1, line = this.stacked ? this.series[n].mean : each.line;
      let known = place;
      while (known > 0 && (line[known] === null || line[known] === undefined)) known--;
      const value = on && known !== place && !each.points ? null : line[known];
      this.values[n].textContent = figure(value);
      const mark = this.marks[n], drawn = on && value !== null && value !== undefined;
      mark.style.display = drawn ? '' : 'none';
      if (drawn) { mark.setAttribute('cx', this.x(each.x[known])); mark.setAttribute('cy', this.y(this.stacked ? each.line[known] : value)); }
    });
    if (on) { this.rule.setAttribute('x1', this.x(at)); this.rule.setAttribute('x2', this.x(at)); }
  }
  /** The logged step nearest to a place of the screen. */
  under(pixel) {
    const first = this.series.find((each) => each.x.length);
    return first ? first.x[nearest(first.x, this.step(pixel))] : null;
  }
  say() {
    $('reading').textContent = store.cursor === null ? '' : `${this.panel.title}, step ${store.cursor}: ` +
      this.drawn.map((each, n) => `${each.label} ${this.values[n].textContent}`).join(', ');
  }

  listen() {
    let from = null;
    const place = (event) => event.clientX - this.svg.getBoundingClientRect().left;
    const ready = () => this.x && this.series.length;
    this.svg.addEventListener('pointerdown', (event) => {
      if (event.button || event.pointerType === 'touch' || !ready()) return;
      from = place(event);
      this.svg.setPointerCapture(event.pointerId);
    });
    this.svg.addEventListener('pointermove', (event) => {
      if (!ready()) return;
      const at = place(event);
      setCursor(this.under(at));
      if (from !== null) {
        this.brush.setAttribute('x', Math.min(from, at)); this.brush.setAttribute('width', Math.abs(at - from));
      }
    });
    this.svg.addEventListener('pointerup', (event) => {
      if (from === null) return;
      const at = place(event), wide = Math.abs(at - from) > 8;
      const chosen = [this.step(Math.min(from, at)), this.step(Math.max(from, at))];
      from = null;
      if (wide) setRange([Math.max(chosen[0], this.whole[0]), Math.min(chosen[1], this.whole[1])]);
      else this.brush.setAttribute('width', 0);
    });
    this.svg.addEventListener('pointercancel', () => { from = null; });
    this.svg.addEventListener('pointerleave', () => { if (from === null) setCursor(null); });
    this.svg.addEventListener('dblclick', () => setRange(null));
    this.svg.addEventListener('wheel', (event) => {
      if (!(event.ctrlKey || event.metaKey) || !ready()) return;
      event.preventDefault();
      zoom(event.deltaY < 0 ? 0.8 : 1.25, this.step(place(event)));
    }, { passive: false });
    this.svg.addEventListener('blur', () => setCursor(null));
    this.svg.addEventListener('keydown', (event) => this.key(event));
  }
  key(event) {
    const first = this.series.find((each) => each.x.length);
    if (!first || !this.x) return;
    const { x } = first, here = store.cursor === null ? x.length - 1 : nearest(x, store.cursor);
    const pace = event.shiftKey ? Math.max(1, Math.round(x.length / 20)) : 1;
    const moves = { ArrowLeft: here - pace, ArrowRight: here + pace, Home: 0, End: x.length - 1 };
    if (event.key in moves) {
      setCursor(x[Math.min(Math.max(store.cursor === null && event.key === 'ArrowLeft' ? here : moves[event.key], 0), x.length - 1)]);
      this.say();
    } else if (event.key === '+' || event.key === '=') zoom(0.7, store.cursor);
    else if (event.key === '-') zoom(1 / 0.7, store.cursor);
    else if (event.key === '0' || event.key === 'Escape') setRange(null);
    else return;
    event.preventDefault();
  }
}

function setCursor(step) {
  if (step === store.cursor) return;
  store.cursor = step;
  read();
}
function setRange(range) {
  const whole = wholeRange();
  store.range = range && (range[0] > whole[0] || range[1] < whole[1]) && range[1] - range[0] > 1e-9 ? range : null;
  redraw();
  showRange();
}
function wholeRange() {
  const all = visible().map(({ run }) => run.curves.x).filter((x) => x.length);
  return all.length ? [Math.min(...all.map((x) => x[0])), Math.max(...all.map((x) => x[x.length - 1]))] : [0, 1];
}
/** factor under 1: nearer. around: a step that stays where it is; null: the middle. */
function zoom(factor, around) {
  const whole = wholeRange(), [first, last] = store.range || whole;
  const middle = around ?? (first + last) / 2;
  const width = Math.max((last - first) * factor, Math.min(2, whole[1] - whole[0]));
  const start = Math.max(whole[0], middle - ((middle - first) / (last - first || 1)) * width);
  setRange([start, Math.min(whole[1], start + width)]);
}
