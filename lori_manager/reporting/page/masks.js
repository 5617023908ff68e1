// The overlap of each two masks, with what chance would give.
const masks = (part) => {
  const found = data.overlap;
  if (!found) return false;
  const percent = (x) => (100 * x).toFixed(1) + '%';
  const chance = (i, j) => Math.max(found.masks[i].kept / found.masks[i].total, found.masks[j].kept / found.masks[j].total);
  const step = (i, j) => {
    const share = found.shares[i][j];
    const over = chance(i, j) < 1 ? (share - chance(i, j)) / (1 - chance(i, j)) : 0;
    return 's' + Math.round(8 * Math.max(0, Math.min(1, over)));
  };
  const n = found.masks.length;
  const low = Math.min(...found.masks.map((_, i) => chance(i, i)));
  const high = Math.max(...found.masks.map((_, i) => chance(i, i)));
  part.append(make('p', {}, 'Share of the smaller mask that the other holds too. By chance it would be ' +
    (percent(low) === percent(high) ? percent(low) : percent(low) + ' to ' + percent(high)) + ', the share of entries that a mask keeps.' +
    (found.left_out ? ' The newest masks of ' + n + ' tasks are shown; ' + counted(found.left_out, 'task') + ' with masks left out.' : '')),
  scrolled('Overlap of masks', make('table', { class: 'matrix' }, make('caption', { class: 'hidden' }, 'Overlap of the masks, in percent'),
    make('thead', {}, make('tr', {}, make('th', { scope: 'col' }, 'Mask'), found.masks.map((m) => make('th', { scope: 'col' }, name(m.ref))))),
    make('tbody', {}, found.masks.map((m, i) => make('tr', {}, make('th', { scope: 'row' }, name(m.ref),
      make('small', {}, m.kept.toLocaleString('en') + ' of ' + m.total.toLocaleString('en') + ' entries')),
    found.masks.map((_, j) => {
      if (i === j) return make('td', { class: 'none' }, '–', hidden(' itself'));
      if (found.shares[i][j] === null) return make('td', { class: 'none' }, 'other shapes');
      return make('td', { class: step(i, j) }, percent(found.shares[i][j]));
    })))))));
  return true;
};
