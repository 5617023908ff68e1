// Every version with its size.
const sizes = (part) => {
  const all = versions.filter((v) => v.line).reverse();
  if (!all.length) return false;
  const largest = Math.max(...all.map((v) => v.bytes || 0)) || 1;
  const orders = {
    newest: (a, b) => b.index - a.index,
    size: (a, b) => b.bytes - a.bytes || b.index - a.index,
    rank: (a, b) => b.rank - a.rank || b.index - a.index,
  };
  const place = make('div');
  const show = (order) => {
    const body = make('tbody');
    const more = byParts(body, [...all].sort(orders[order]), 40, (v) => make('tr', v.index === data.focus ? { class: 'focus' } : {},
      make('th', { scope: 'row' }, name(v.ref), chips(v), make('small', {}, day(v.made))),
      make('td', {}, v.method, make('small', {}, origin(v))),
      make('td', {}, v.rank === null ? '–' : v.rank),
      make('td', {}, bytes(v.bytes), sizeBar((v.bytes || 0) / largest))));
    place.replaceChildren(scrolled('Versions', make('table', { class: 'sizes' },
      make('caption', { class: 'hidden' }, 'Every version with its method, rank and size'),
      make('thead', {}, make('tr', {}, ['Version', 'Made', 'Rank', 'Size'].map((h) => make('th', { scope: 'col' }, h)))), body)), more);
  };
  const total = all.reduce((sum, v) => sum + (v.bytes || 0), 0);
  part.append(make('div', { class: 'controls' },
    select('Order', [['newest', 'newest first'], ['size', 'largest first'], ['rank', 'highest rank first']], 'newest', show),
    make('p', { class: 'note' }, counted(all.length, 'version') + ', ' + bytes(total) + ' in all')), place);
  show('newest');
  return true;
};

const origin = (v) => {
  const names = v.parents.map(([, ref]) => ref);
  const few = names.slice(0, 3).join(', ') + (names.length > 3 ? ' and ' + (names.length - 3) + ' more' : '');
  if (v.origin === 'merged') return 'merged from ' + few;
  if (v.origin === 'imported') return 'imported';
  return v.task + ' from ' + (few || 'base') + (v.mask ? ', mask ' + v.mask : '');
};

const sizeBar = (share) => draw('svg', { viewBox: '0 0 100 6', class: 'size', 'aria-hidden': 'true', focusable: 'false', preserveAspectRatio: 'none' },
  draw('rect', { class: 'room', width: 100, height: 6 }), draw('rect', { class: 'taken', width: Math.max(0.5, 100 * share).toFixed(1), height: 6 }));
