// Versions x tasks as a table with coloured numbers, a window of it where it is large.
const MOST_ROWS = 30;
const MOST_COLUMNS = 24;
const STEPS = 9;

const shade = (task, c, mode) => {
  if (!c) return 'none';
  if (mode === 'score') return 's' + Math.round(goodness(task, c.value) * (STEPS - 1));
  const change = c[mode];
  if (!change || change.change === null) return 'none';
  const { low, high } = rangeOf(task);
  const gain = ((task.higher ? 1 : -1) * change.change) / (high - low);
  const size = Math.abs(gain);
  const step = change.mark ? (size >= 0.3 ? 3 : 2) : size >= 0.02 ? 1 : 0;
  return step ? (gain < 0 ? 'w' : 'b') + step : 'z';
};

const matrixCell = (task, v, mode) => {
  const c = cell(task, v);
  const css = shade(task, c, mode);
  if (!c) return make('td', { class: css }, '–', hidden(' not scored'));
  if (mode === 'score') {
    const sign = c.parent ? c.parent.mark : 0;
    return make('td', { class: css }, number(task, c.value), mark(sign, 'its parent'));
  }
  const change = c[mode];
  if (!change || change.change === null) return make('td', { class: css }, '–', hidden(' not compared'));
  return make('td', { class: css }, signed(task, change.change), mark(change.mark, versions[change.against].ref));
};

const matrix = (part) => {
  const scored = new Set(tasks.flatMap((task) => task.cells.i));
  const all = versions.filter((v) => scored.has(v.index)).reverse();
  if (!all.length) return false;
  const state = { mode: 'score', line: '', wanted: '', order: 'added', row: 0, column: 0 };
  let rows = all;
  let columns = tasks;
  const worst = byLoss();

  const controls = make('div', { class: 'controls' });
  const place = make('div');
  const pager = make('div', { class: 'pager' });
  const legend = make('div', { class: 'legend' });
  const map = overview(() => ({ rows, columns, mode: state.mode, row: state.row, column: state.column }),
    (row, column) => {
      state.row = row;
      state.column = column;
      show();
    });

  const narrow = () => {
    rows = all.filter((v) => !state.line || v.line === state.line || !v.line);
    columns = (state.order === 'loss' ? worst : tasks)
      .filter((task) => task.ref.toLowerCase().includes(state.wanted));
    state.row = 0;
    state.column = 0;
    show();
  };
  const change = (name) => (value) => {
    state[name] = value;
    narrow();
  };

  const step = (text, name, by, size, total) => {
    const next = Math.max(0, Math.min(total - size, state[name] + by));
    return button(text, () => {
      state[name] = next;
      show();
      const again = [...pager.querySelectorAll('button')].find((b) => b.textContent === text);
      (again.disabled ? pager.querySelector('button:not(:disabled)') : again).focus();
    }, { disabled: next === state[name] });
  };

  const show = () => {
    const someRows = rows.slice(state.row, state.row + MOST_ROWS);
    const someColumns = columns.slice(state.column, state.column + MOST_COLUMNS);
    const what = { score: 'Score', parent: 'Change from the parent', best: 'Change from the best before' }[state.mode];
    const told = what + ': ' + span(state.row, someRows.length, rows.length, 'version') + ', ' +
      span(state.column, someColumns.length, columns.length, 'task');
    place.replaceChildren(scrolled(told, make('table', { class: 'matrix' },
      make('caption', {}, told),
      make('thead', {}, make('tr', {}, make('th', { scope: 'col' }, 'Version'),
        someColumns.map((task) => make('th', { scope: 'col' }, name(task.ref),
          task.higher ? null : make('small', {}, 'lower is better'))))),
      make('tbody', {}, someRows.map((v) => make('tr', v.index === data.focus ? { class: 'focus' } : {},
        make('th', { scope: 'row' }, name(v.ref), chips(v), make('small', {}, v.line ? day(v.made) + ' ' + v.origin : 'untrained')),
        someColumns.map((task) => matrixCell(task, v.index, state.mode))))))));
    pager.replaceChildren();
    if (rows.length > MOST_ROWS) {
      pager.append(step('Newer versions', 'row', -MOST_ROWS, MOST_ROWS, rows.length),
        step('Older versions', 'row', MOST_ROWS, MOST_ROWS, rows.length));
    }
    if (columns.length > MOST_COLUMNS) {
      pager.append(step('Tasks before', 'column', -MOST_COLUMNS, MOST_COLUMNS, columns.length),
        step('Tasks after', 'column', MOST_COLUMNS, MOST_COLUMNS, columns.length));
    }
    legend.replaceChildren(...matrixLegend(state.mode));
    map.show();
    say(told);
  };

  controls.append(choice('Numbers', 'mode',
    [['score', 'Score'], ['parent', 'Change from parent'], ['best', 'Change from best']], 'score', change('mode')));
  if (lines.length > 1) {
    controls.append(select('Line', [['', 'all lines'], ...lines.map((line) => [line, line])], '', change('line')));
  }
  if (tasks.length > 3) {
    controls.append(select('Order of tasks', [['added', 'as added'], ['loss', 'largest loss first']], 'added', change('order')));
  }
  if (tasks.length > 12) controls.append(search('Find a task', change('wanted')));
  part.append(controls, legend, map.element, pager, place);
  show();
  return true;
};

const span = (start, n, total, thing) =>
  (n === total ? counted(total, thing) : n ? thing + 's ' + (start + 1) + ' to ' + (start + n) + ' of ' + total : 'no ' + thing);

const matrixLegend = (mode) => {
  const swatch = (css) => make('span', { class: 'swatch ' + css });
  const score = Array.from({ length: STEPS }, (_, i) => 's' + i);
  const [low, steps, high] = mode === 'score'
    ? ['each task from its worst', score, 'to its best score']
    : ['really worse', ['w3', 'w2', 'w1', 'z', 'b1', 'b2', 'b3'], 'really better'];
  return [make('span', {}, low), make('span', { class: 'swatches', 'aria-hidden': 'true' }, steps.map(swatch)), make('span', {}, high),
    make('span', { class: 'marks' },
      mode === 'score' ? '▼ ▲ really worse, really better than its parent' : '▼ ▲ beyond noise; pale: within it')];
};
