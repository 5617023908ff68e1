// One task over its versions: points with 95% intervals, a path for each line of versions.
const told = (task, c) => {
  const v = versions[c.version];
  const parts = [v.ref + (v.aliases.length ? ' (' + v.aliases.join(', ') + ')' : ''),
    number(task, c.value) + ', 95% ' + interval(task, c.low, c.high) + ', ' + counted(c.rows, 'row')];
  if (c.parent && c.parent.change !== null) {
    parts.push(signed(task, c.parent.change) + ' from ' + versions[c.parent.against].ref +
      (c.parent.mark ? ', really ' + VERDICTS[c.parent.mark] : ', not told apart'));
  }
  if (c.best && c.best.mark === -1) parts.push('really below the best before it, ' + versions[c.best.against].ref);
  if (c.origin !== 'measured') parts.push(c.origin);
  if (c.others) parts.push(counted(c.others, 'further score'));
  return parts;
};

// Round numbers from low to high, four to six of them.
const ticks = (low, high) => {
  const rough = (high - low) / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((x) => x * power >= rough);
  const found = [];
  for (let x = Math.ceil(low / step - 1e-9) * step; x <= high + step * 1e-9; x += step) found.push(x);
  return { found, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
};

const shape = (v, x, y, dense) => {
  if (dense) return draw('circle', { cx: x, cy: y, r: 2 });
  if (v.origin === 'base') return draw('rect', { x: x - 4, y: y - 4, width: 8, height: 8 });
  if (v.origin === 'merged') return draw('path', { d: `M${x} ${y - 6}l6 6l-6 6l-6-6z` });
  if (v.origin === 'imported') return draw('path', { d: `M${x} ${y - 6}l6 10h-12z` });
  return draw('circle', { cx: x, cy: y, r: 4.5 });
};

// A name along the axis keeps its begin and its version.
const short = (ref) => (ref.length > 24 ? ref.slice(0, 13) + '…' + ref.slice(-10) : ref);

let charts = 0;
const chart = (task, wantedLine, width) => {
  const cells = cellsOf(task).filter((c) => !wantedLine || !versions[c.version].line || versions[c.version].line === wantedLine);
  const figure = make('figure', { class: 'chart' }, make('figcaption', {}, make('h3', {}, name(task.ref)),
    make('p', { class: 'note' }, task.scorer + (task.higher ? '' : ', lower is better') + ', ' + counted(task.rows, 'row') +
      (task.note ? '; ' + task.note : ''))));
  if (!cells.length) {
    figure.append(make('p', {}, 'No version shown was scored on it.'));
    return figure;
  }
  const named = cells.length <= Math.max(4, (width - 60) / 24);
  const longest = Math.max(...cells.map((c) => short(versions[c.version].ref).length));
  const foot = named ? Math.min(120, 26 + longest * 4.6) : 34;
  const lead = named ? Math.min(70, longest * 4.6) : 0; // room for the first slanted name
  const left = Math.max(48, Math.min(lead, width / 4));
  const [top, right, plot] = [34, 16, 220];
  const height = top + plot + foot;
  const low = Math.min(...cells.map((c) => c.low));
  const high = Math.max(...cells.map((c) => c.high));
  const pad = (high - low) * 0.04 || Math.abs(high) * 0.04 || 1;
  const inUnit = low >= 0 && high <= 1;
  const bottom = inUnit ? Math.max(0, low - pad) : low - pad;
  const ceiling = inUnit ? Math.min(1, high + pad) : high + pad;
  const x = (i) => left + 10 + ((width - left - right - 20) * (i + 0.5)) / cells.length;
  const y = (value) => top + plot * (1 - (value - bottom) / (ceiling - bottom));

  const id = 'chart-' + ++charts;
  const best = cells.reduce((a, b) => ((b.value > a.value) === task.higher && b.value !== a.value ? b : a));
  const svg = draw('svg', { width, height, viewBox: `0 0 ${width} ${height}`, role: 'group', 'aria-labelledby': id + '-t ' + id + '-d' },
    draw('title', { id: id + '-t' }, task.ref + ' over ' + counted(cells.length, 'version')),
    draw('desc', { id: id + '-d' }, 'Best: ' + versions[best.version].ref + ' at ' + number(task, best.value) + '. Newest: ' +
      versions[cells.at(-1).version].ref + ' at ' + number(task, cells.at(-1).value) + '. Arrow keys go from version to version.'));
  const grid = ticks(bottom, ceiling);
  for (const value of grid.found) {
    svg.append(draw('line', { class: 'grid', x1: left, x2: width - right, y1: y(value), y2: y(value) }),
      draw('text', { class: 'tick', x: left - 8, y: y(value) + 4, 'text-anchor': 'end', 'aria-hidden': 'true' },
        value.toFixed(grid.digits).replace('-', '−')));
  }
  const byLine = new Map();
  cells.forEach((c, i) => {
    const line = versions[c.version].line;
    if (line) byLine.set(line, [...(byLine.get(line) || []), `${x(i).toFixed(1)} ${y(c.value).toFixed(1)}`]);
  });
  for (const points of byLine.values()) {
    if (points.length > 1) svg.append(draw('path', { class: 'line', d: 'M' + points.join('L') }));
  }
  const dense = cells.length > 80;
  const every = Math.ceil(cells.length / Math.max(2, (width - left) / 110));
  const points = cells.map((c, i) => {
    const v = versions[c.version];
    const sign = c.parent ? c.parent.mark : 0;
    const group = draw('g', { class: 'point ' + (VERDICTS[sign] || 'open') + (dense ? ' dense' : ''), role: 'img', tabindex: '-1', 'aria-label': told(task, c).join('; ') },
      draw('line', { class: 'whisker', x1: x(i), x2: x(i), y1: y(c.low), y2: y(c.high) }),
      shape(v, x(i), y(c.value), dense));
    if (sign) {
      group.append(draw('text', { class: 'sign', x: x(i), y: top + plot + 13, 'text-anchor': 'middle' }, MARKS[sign]));
    }
    v.aliases.forEach((name, k) => {
      group.append(draw('line', { class: 'flag', x1: x(i), x2: x(i), y1: 16, y2: y(c.high) }),
        draw('text', { class: 'alias', x: x(i), y: 12 + 12 * k, 'text-anchor': i > cells.length / 2 ? 'end' : 'start' }, name));
    });
    if (named) {
      svg.append(draw('text', { class: 'name', 'text-anchor': 'end', 'aria-hidden': 'true',
        transform: `translate(${x(i) + 4} ${top + plot + 24}) rotate(-35)` }, short(v.ref)));
    } else if (i % every === 0) {
      svg.append(draw('text', { class: 'name', x: x(i), y: top + plot + 28, 'text-anchor': 'middle', 'aria-hidden': 'true' }, short(v.ref)));
    }
    return group;
  });
  svg.append(...points);
  figure.append(make('div', { class: 'plot' }, svg, tip(svg, points, (i) => told(task, cells[i]), x, (i) => y(cells[i].value))));
  figure.append(historyTable(task, cells));
  return figure;
};

// What a point says, on hover and by keyboard: one tab stop, arrows from point to point.
const tip = (svg, points, words, x, y) => {
  const box = make('div', { class: 'tip', hidden: true, 'aria-hidden': 'true' });
  let current = points.length - 1;
  points[current].setAttribute('tabindex', '0');
  const open = (i) => {
    box.replaceChildren(...words(i).map((line, k) => make(k ? 'div' : 'strong', {}, line)));
    box.hidden = false;
    const width = svg.clientWidth;
    const half = Math.min(box.offsetWidth, width) / 2;
    box.style.left = Math.max(0, Math.min(width - 2 * half, x(i) - half)) + 'px';
    const above = y(i) - box.offsetHeight - 14;
    box.style.top = (above > -30 ? above : y(i) + 18) + 'px';
    points.forEach((p, k) => p.classList.toggle('shown', k === i));
  };
  const close = () => {
    box.hidden = true;
    points.forEach((p) => p.classList.remove('shown'));
  };
  const go = (i) => {
    points[current].setAttribute('tabindex', '-1');
    current = Math.max(0, Math.min(points.length - 1, i));
    points[current].setAttribute('tabindex', '0');
    points[current].focus();
  };
  svg.addEventListener('keydown', (event) => {
    const to = { ArrowLeft: current - 1, ArrowRight: current + 1, Home: 0, End: points.length - 1 }[event.key];
    if (to !== undefined) {
      event.preventDefault();
      go(to);
    } else if (event.key === 'Escape') close();
  });
  points.forEach((p, i) => {
    p.addEventListener('focus', () => open(i));
    p.addEventListener('blur', close);
  });
  const nearest = (event) => {
    const at = event.clientX - svg.getBoundingClientRect().left;
    let best = 0;
    points.forEach((_, i) => {
      if (Math.abs(x(i) - at) < Math.abs(x(best) - at)) best = i;
    });
    open(best);
  };
  svg.addEventListener('pointermove', nearest);
  svg.addEventListener('pointerdown', nearest);
  svg.addEventListener('pointerleave', () => {
    if (!svg.contains(document.activeElement)) close();
  });
  return box;
};

// The same in numbers, made when it is unfolded.
const historyTable = (task, cells) => {
  const details = make('details', {}, make('summary', {}, 'In numbers', hidden(' for ' + task.ref)));
  details.addEventListener('toggle', () => {
    if (!details.open || details.children.length > 1) return;
    const body = make('tbody');
    const row = (c) => {
      const v = versions[c.version];
      const change = (side) => {
        const d = c[side];
        if (!d) return make('td', {}, '–');
        if (d.change === null) return make('td', {}, '–', make('small', {}, d.note));
        return make('td', {}, signed(task, d.change), mark(d.mark, versions[d.against].ref),
          make('small', {}, interval(task, d.low, d.high, true)),
          make('small', {}, 'from ' + versions[d.against].ref), d.note ? make('small', {}, d.note) : null);
      };
      return make('tr', {}, make('th', { scope: 'row' }, name(v.ref), chips(v), make('small', {}, day(v.made))),
        make('td', {}, number(task, c.value), make('small', {}, interval(task, c.low, c.high))),
        make('td', {}, c.rows.toLocaleString('en'), make('small', {}, c.precision || c.origin)),
        change('parent'), change('best'));
    };
    const more = byParts(body, [...cells].reverse(), 50, row);
    details.append(scrolled('Scores on ' + task.ref, make('table', {},
      make('caption', { class: 'hidden' }, 'Scores on ' + task.ref + ', the newest version first'),
      make('thead', {}, make('tr', {}, ['Version', 'Score', 'Rows', 'From parent', 'From best'].map((h) => make('th', { scope: 'col' }, h)))),
      body)), more);
  });
  return details;
};
