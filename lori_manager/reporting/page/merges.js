// Before and after a merge: each task's own adapter, and the merge.
const merges = (part) => {
  const found = versions.filter((v) => v.origin === 'merged' && tasks.some((task) => cell(task, v.index))).reverse();
  if (!found.length) return false;
  const place = make('div');
  const show = (index) => {
    const v = versions[index];
    const rows = tasks.map((task) => [task, cell(task, v.index)]).filter(([, c]) => c && c.parent && c.parent.change !== null);
    const kept = rows.filter(([task, c]) => task.higher && c.value - c.parent.change > 0)
      .map(([, c]) => c.value / (c.value - c.parent.change));
    const mean = kept.reduce((a, b) => a + b, 0) / kept.length;
    const body = make('tbody');
    const more = byParts(body, rows, 300, ([task, c]) => mergeRow(task, c));
    place.replaceChildren(
      make('p', {}, v.ref + ' by ' + v.method + ', rank ' + v.rank + ', ' + bytes(v.bytes) + '. ' +
        (kept.length ? 'It keeps ' + (100 * mean).toFixed(1) + '% of what its members score, as a mean over ' + counted(kept.length, 'task') + '.' : '')),
      rows.length ? scrolled('Before and after ' + v.ref, stackable(make('table', { class: 'merge' },
        make('caption', { class: 'hidden' }, 'Each task by its own adapter and by ' + v.ref),
        make('thead', {}, make('tr', {},
          ['Task', 'Own', 'Merge', 'Change'].map((h) => make('th', { scope: 'col' }, h)),
          make('th', { scope: 'col', class: 'graphic', 'aria-hidden': 'true' }, '○ own, ● merge'))), body))) : '', more,
      make('details', { class: 'members' }, make('summary', {}, counted(v.parents.length, 'member')),
        make('ul', {}, v.parents.map(([, ref, weight]) => make('li', {}, ref + (weight === null ? '' : ', weight ' + weight))))));
  };
  if (found.length > 1) {
    part.append(make('div', { class: 'controls' }, select('Merge', found.map((v) => [String(v.index), v.ref + ' (' + v.method + ', ' + day(v.made) + ')']),
      String(found[0].index), (value) => show(Number(value)))));
  }
  part.append(place);
  show(found[0].index);
  return true;
};

const mergeRow = (task, c) => {
  const p = c.parent;
  const own = c.value - p.change;
  return make('tr', {}, make('th', { scope: 'row' }, name(task.ref)),
    make('td', {}, number(task, own), make('small', {}, versions[p.against].ref)),
    make('td', {}, number(task, c.value), make('small', {}, interval(task, c.low, c.high))),
    make('td', {}, signed(task, p.change), mark(p.mark, versions[p.against].ref),
      make('small', {}, interval(task, p.low, p.high, true)),
      p.lost === null || p.lost === undefined ? null : make('small', {}, p.lost + ' rows lost, ' + p.gained + ' gained')),
    make('td', { class: 'graphic', 'aria-hidden': 'true' }, dumbbell(task, own, c)));
};

// Own and merged score on one axis, with the merged score's interval.
const dumbbell = (task, own, c) => {
  const unit = c.low >= 0 && c.high <= 1 && own <= 1 && own >= 0;
  const low = unit ? 0 : Math.min(own, c.low);
  const high = unit ? 1 : Math.max(own, c.high);
  const x = (value) => (6 + (168 * (value - low)) / (high - low || 1)).toFixed(1);
  return draw('svg', { viewBox: '0 0 180 20', class: 'bar ' + (VERDICTS[c.parent.mark] || 'open'), focusable: 'false' },
    draw('line', { class: 'zero', x1: 6, x2: 174, y1: 10, y2: 10 }),
    draw('line', { class: 'range', x1: x(c.low), x2: x(c.high), y1: 10, y2: 10 }),
    draw('circle', { class: 'own', cx: x(own), cy: 10, r: 4.5 }),
    draw('circle', { cx: x(c.value), cy: 10, r: 4 }));
};
