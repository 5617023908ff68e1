// The whole matrix as one picture, a cell a pixel, for where the table shows a window of it.
const overview = (current, move) => {
  const canvas = make('canvas', { class: 'overview', role: 'img' });
  const frame = make('div', { class: 'frame', 'aria-hidden': 'true' });
  const element = make('div', { class: 'overview-box' }, canvas, frame);

  const palette = () => {
    const style = getComputedStyle(document.documentElement);
    const found = {};
    for (const name of ['s0', 's1', 's2', 's3', 's4', 's5', 's6', 's7', 's8', 'w1', 'w2', 'w3', 'b1', 'b2', 'b3', 'z', 'none']) {
      const hex = style.getPropertyValue('--' + name).trim();
      found[name] = [1, 3, 5].map((k) => parseInt(hex.slice(k, k + 2), 16));
    }
    return found;
  };

  let drawn = '';
  const show = () => {
    const { rows, columns, mode, row, column } = current();
    element.hidden = rows.length <= MOST_ROWS && columns.length <= MOST_COLUMNS;
    if (element.hidden || !rows.length || !columns.length) {
      element.hidden = true;
      return;
    }
    const dark = matchMedia('(prefers-color-scheme: dark)').matches;
    const key = [mode, dark, rows.length, rows[0].index, columns.length, ...columns.map((c) => c.ref)].join('\n');
    if (key !== drawn) {
      drawn = key;
      const colours = palette();
      canvas.width = columns.length;
      canvas.height = rows.length;
      const context = canvas.getContext('2d', { willReadFrequently: true });
      const image = context.createImageData(columns.length, rows.length);
      columns.forEach((task, x) => {
        rows.forEach((v, y) => {
          image.data.set([...colours[shade(task, cell(task, v.index), mode)], 255], 4 * (y * columns.length + x));
        });
      });
      context.putImageData(image, 0, 0);
      canvas.setAttribute('aria-label', 'All ' + counted(rows.length, 'version') + ', newest on top, by ' +
        counted(columns.length, 'task') + ' in colours; the table below shows a part of it in numbers');
    }
    const part = (start, size, total) => [(100 * start) / total, (100 * Math.min(size, total - start)) / total];
    const [top, height] = part(row, MOST_ROWS, rows.length);
    const [left, width] = part(column, MOST_COLUMNS, columns.length);
    Object.assign(frame.style, { top: top + '%', height: height + '%', left: left + '%', width: width + '%' });
  };

  canvas.addEventListener('click', (event) => {
    const { rows, columns } = current();
    const box = canvas.getBoundingClientRect();
    const start = (share, size, total) =>
      Math.max(0, Math.min(total - size, Math.round(share * total - size / 2)));
    move(start((event.clientY - box.top) / box.height, MOST_ROWS, rows.length),
      start((event.clientX - box.left) / box.width, MOST_COLUMNS, columns.length));
  });
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', show);
  return { element, show };
};
