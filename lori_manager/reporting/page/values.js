// The data in the page, read once; see compact.py for its form.
const data = JSON.parse(document.getElementById('data').textContent);
const tasks = data.tasks;
const MARKS = { '-1': '▼', 0: '', 1: '▲' };
const VERDICTS = { '-1': 'worse', 0: '', 1: 'better' };

// An entry of a column, which is a list or the one value that stands throughout.
const at = (column, i) => (Array.isArray(column) ? column[i] : column);

const version = (i) => ({
  index: i,
  ref: at(data.versions.ref, i),
  line: at(data.versions.line, i),
  origin: at(data.versions.origin, i),
  method: at(data.versions.method, i),
  rank: at(data.versions.rank, i),
  bytes: at(data.versions.bytes, i),
  made: at(data.versions.created_at, i),
  task: at(data.versions.task, i),
  mask: at(data.versions.mask, i),
  parents: data.versions.parents[i],
  aliases: data.versions.aliases[i],
});
const versions = Array.from({ length: data.count }, (_, i) => version(i));
const lines = [...new Set(versions.map((v) => v.line))].filter((line) => line);

// Task -> (version's index -> place among its cells); made when first asked for.
const places = new Map();
const placesOf = (task) => {
  if (!places.has(task)) places.set(task, new Map(task.cells.i.map((v, k) => [v, k])));
  return places.get(task);
};

const unscaled = (task, x) => (x === null || x === undefined ? null : x / task.scale);

const comparison = (task, side, k) => {
  const c = task.cells;
  const against = at(c[side + 'a'], k);
  if (against === null || against === undefined) return null;
  const note = at(c[side + 'note'], k);
  const change = unscaled(task, at(c[side + 'c'], k));
  if (change === null) return { against, change, note, mark: 0 };
  return {
    against, change, note,
    low: unscaled(task, at(c[side + 'l'], k)),
    high: unscaled(task, at(c[side + 'h'], k)),
    lost: at(c[side + 'x'], k),
    gained: at(c[side + 'g'], k),
    mark: at(c[side + 'm'], k),
  };
};

// One version on one task; null where it was not scored.
const cell = (task, v) => {
  const k = placesOf(task).get(v);
  if (k === undefined || task.cells.v[k] === null) return null;
  const c = task.cells;
  return {
    version: v,
    value: unscaled(task, c.v[k]),
    low: unscaled(task, c.l[k]),
    high: unscaled(task, c.h[k]),
    rows: at(c.n, k),
    others: at(c.o, k),
    origin: at(c.origin, k),
    precision: at(c.precision, k),
    parent: comparison(task, 'p', k),
    best: comparison(task, 'b', k),
  };
};

const cellsOf = (task) => task.cells.i.map((v) => cell(task, v)).filter((c) => c);

// Lowest and highest value of a task, at least a tenth of the best apart, so that noise
// does not take the whole range of colours.
const ranges = new Map();
const rangeOf = (task) => {
  if (!ranges.has(task)) {
    const known = task.cells.v.filter((x) => x !== null);
    let low = known.reduce((a, b) => Math.min(a, b), Infinity) / task.scale;
    let high = known.reduce((a, b) => Math.max(a, b), -Infinity) / task.scale;
    const least = Math.max(Math.abs(low), Math.abs(high)) / 10 || 1;
    if (high - low < least) {
      if (task.higher) low = high - least;
      else high = low + least;
    }
    ranges.set(task, { low, high });
  }
  return ranges.get(task);
};

// From 0, the worst seen, to 1, the best.
const goodness = (task, value) => {
  const { low, high } = rangeOf(task);
  const share = Math.max(0, Math.min(1, (value - low) / (high - low)));
  return task.higher ? share : 1 - share;
};

const number = (task, x) => (x === null ? '–' : x.toFixed(task.digits).replace('-', '−'));
const signed = (task, x) => {
  if (x === null || x === undefined) return '–';
  return (x < 0 ? '−' : '+') + Math.abs(x).toFixed(task.digits);
};
const interval = (task, low, high, sign) =>
  (sign ? signed(task, low) : number(task, low)) + ' to ' + (sign ? signed(task, high) : number(task, high));
const counted = (n, thing) => n.toLocaleString('en') + ' ' + thing + (n === 1 ? '' : 's');
const day = (iso) => (iso ? iso.slice(0, 10) : '');
const bytes = (n) => {
  if (n === null) return '–';
  let scaled = n;
  for (const unit of ['B', 'kB', 'MB']) {
    if (scaled < 1000) return (unit === 'B' ? scaled : Number(scaled.toPrecision(3))) + ' ' + unit;
    scaled /= 1000;
  }
  return Number(scaled.toPrecision(3)) + ' GB';
};

// Tasks by what the version in focus lost on them, the worst first.
const byLoss = () => {
  const loss = (task) => {
    const c = data.focus === null ? null : cell(task, data.focus);
    if (!c || !c.parent || c.parent.change === null) return 1e9;
    const gain = (task.higher ? 1 : -1) * c.parent.change;
    return (c.parent.mark === -1 ? -1e6 : 0) + gain;
  };
  const keyed = tasks.map((task) => [loss(task), task]);
  return keyed.sort((a, b) => a[0] - b[0]).map(([, task]) => task);
};
