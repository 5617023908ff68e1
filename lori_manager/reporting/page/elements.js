// Elements are only ever made from text, never from markup.
const fill = (element, attributes, children) => {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? '' : value);
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined && child !== '') element.append(child);
  }
  return element;
};
const make = (tag, attributes, ...children) =>
  fill(document.createElement(tag), attributes, children);
const draw = (tag, attributes, ...children) =>
  fill(document.createElementNS('http://www.w3.org/2000/svg', tag), attributes, children);
const hidden = (text) => make('span', { class: 'hidden' }, text);

// Text of others: its direction is its own, and it may be long without a space.
const foreign = (text, tag = 'bdi') => make(tag, { dir: 'auto' }, text);

// A name that may break after its own separators rather than anywhere.
const name = (text) => make('bdi', {}, text.split(/(?<=[-_.])/).flatMap((part, i) => (i ? [make('wbr'), part] : [part])));

const mark = (sign, what) =>
  sign ? [make('span', { class: 'sign ' + VERDICTS[sign], 'aria-hidden': 'true' }, MARKS[sign]),
    hidden(' really ' + VERDICTS[sign] + ' than ' + what)] : [];

const chips = (v) => v.aliases.map((name) => make('span', { class: 'chip' }, name));

const field = (label, control) => make('label', { class: 'field' }, make('span', {}, label), control);

const select = (label, options, chosen, change) => {
  const list = make('select', { onchange: () => change(list.value) },
    options.map(([value, text]) => make('option', { value, selected: value === chosen }, text)));
  return field(label, list);
};

const search = (label, change) => {
  const input = make('input', { type: 'search', autocomplete: 'off', spellcheck: 'false' });
  input.addEventListener('input', () => change(input.value.trim().toLowerCase()));
  return field(label, input);
};

const choice = (legend, name, options, chosen, change) =>
  make('fieldset', { class: 'choice' }, make('legend', {}, legend),
    options.map(([value, text]) => make('label', {},
      make('input', { type: 'radio', name, value, checked: value === chosen, onchange: () => change(value) }),
      make('span', {}, text))));

const button = (text, press, attributes) =>
  make('button', { type: 'button', onclick: press, ...attributes }, text);

// A region that may scroll sideways by itself, and by keyboard.
const scrolled = (label, ...children) =>
  make('div', { class: 'scroll', tabindex: '0', role: 'region', 'aria-label': label }, ...children);

// The items so many at a time, with a button for more.
const byParts = (container, items, size, show) => {
  let shown = 0;
  const more = button('', () => {
    const first = shown;
    next();
    container.children[first]?.querySelector('summary, button, a')?.focus();
  }, { class: 'more' });
  const next = () => {
    container.append(...items.slice(shown, shown + size).map(show));
    shown = Math.min(items.length, shown + size);
    more.hidden = shown >= items.length;
    const left = items.length - shown;
    more.textContent = 'Show ' + Math.min(size, left) + ' of ' + left.toLocaleString('en') + ' more';
  };
  next();
  return more;
};

// Says something to a screen reader without moving anything.
const say = (text) => {
  document.getElementById('said').textContent = text;
};

// Headings that sort the rows of a table; a heading's data-sort says what its cells hold.
const sortable = (table, key) => {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const kind = head.dataset.sort;
    if (!kind) return;
    const press = () => {
      const upward = head.getAttribute('aria-sort') !== 'ascending';
      heads.forEach((other) => other.removeAttribute('aria-sort'));
      head.setAttribute('aria-sort', upward ? 'ascending' : 'descending');
      const body = table.tBodies[0];
      const keyed = [...body.rows].map((row) => [key(row.cells[column], kind), row]);
      // What has no value stays last either way.
      keyed.sort(([a], [b]) => (a === null) - (b === null) ||
        (a === null ? 0 : (upward ? 1 : -1) * (kind === 'text' ? a.localeCompare(b, 'en', { numeric: true }) : a - b)));
      body.append(...keyed.map(([, row]) => row));
      say('Sorted by ' + head.textContent + ', ' + (upward ? 'ascending' : 'descending'));
    };
    const text = head.textContent;
    head.textContent = '';
    head.append(button(text, press, { class: 'sort' }));
  });
};

const cellKey = (td, kind) => {
  const value = td.dataset.value ?? td.textContent;
  if (kind === 'text') return value;
  return value === '' ? null : Number(value);
};

// Lets the style lay rows out as blocks on a narrow screen: as what they are called here,
// they stay a table to a screen reader.
const stackable = (table) => {
  const roles = { thead: 'rowgroup', tbody: 'rowgroup', tr: 'row', td: 'cell' };
  table.classList.add('stack');
  table.setAttribute('role', 'table');
  for (const part of table.querySelectorAll('thead, tbody, tr, td, th')) {
    const tag = part.tagName.toLowerCase();
    part.setAttribute('role', roles[tag] || (part.scope === 'row' ? 'rowheader' : 'columnheader'));
  }
  return table;
};
