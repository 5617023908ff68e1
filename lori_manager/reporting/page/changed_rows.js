// Rows that went from right to wrong and back, unfolded task by task.
const PAIRS = { parent: 'what it was made from' };
const GROUPS = 20;
const PRINTED = 6;
const contents = new WeakMap();

const changed = (part) => {
  const found = data.changed.filter((c) => c.worsened || c.improved);
  if (!found.length) return false;
  const purposes = [...new Set(found.map((c) => c.pair))];
  const place = make('div', { class: 'groups' });
  const told = make('p');
  const state = { pair: purposes[0], wanted: '' };
  const other = (pair) => PAIRS[pair] || (pair.endsWith(' before') ? 'what ' + pair.slice(0, -7) + ' meant before' : pair);

  const show = () => {
    const own = found.filter((c) => c.pair === state.pair && c.task.toLowerCase().includes(state.wanted));
    const lost = own.reduce((sum, c) => sum + c.worsened, 0);
    const gained = own.reduce((sum, c) => sum + c.improved, 0);
    told.textContent = versions[data.focus].ref + ' against ' + other(state.pair) + ': ' + counted(lost, 'row') + ' lost and ' +
      gained.toLocaleString('en') + ' gained on ' + counted(own.length, 'task') + '.';
    const list = make('div', { class: 'groups' });
    const more = byParts(list, own, GROUPS, group);
    place.replaceChildren(list, more);
  };
  const controls = make('div', { class: 'controls' });
  if (purposes.length > 1) {
    controls.append(choice('Against', 'pair', purposes.map((p) => [p, other(p)]), state.pair, (value) => {
      state.pair = value;
      show();
    }));
  }
  if (tasks.length > 12) {
    controls.append(search('Find a task', (wanted) => {
      state.wanted = wanted;
      show();
      say(told.textContent);
    }));
  }
  part.append(controls, told, place);
  show();
  beforePrint.push(() => {
    for (const details of [...place.querySelectorAll('details')].slice(0, PRINTED)) {
      details.open = true;
      fillGroup(details); // its own event would come after the page is laid out
    }
  });
  return true;
};

// One task's rows; they are made when it is unfolded.
const group = (c) => {
  const details = make('details', { class: 'rows' }, make('summary', {},
    make('strong', {}, name(c.task)), ' ', versionsOf(c), ' ',
    make('span', { class: 'worse' }, '▼ ' + c.worsened.toLocaleString('en') + ' lost'), ' ',
    make('span', { class: 'better' }, '▲ ' + c.improved.toLocaleString('en') + ' gained')));
  contents.set(details, c);
  details.addEventListener('toggle', () => fillGroup(details));
  return details;
};

const versionsOf = (c) => make('span', { class: 'note' }, c.before + ' → ' + c.after);

const fillGroup = (details) => {
  if (!details.open || details.children.length > 1) return;
  const c = contents.get(details);
  const binary = c.change.lost !== null;
  for (const improved of [false, true]) {
    const rows = c.rows.filter((row) => row.improved === improved);
    const total = improved ? c.improved : c.worsened;
    if (!total) continue;
    const what = binary ? (improved ? 'Wrong before, right now' : 'Right before, wrong now') : (improved ? 'Better now' : 'Worse now');
    const heading = what + ' (' + (rows.length < total ? rows.length + ' of ' : '') + total.toLocaleString('en') + ')';
    details.append(make('h3', { class: improved ? 'better' : 'worse' }, heading),
      make('ol', { class: 'changed-rows' }, rows.map((row) => changedRow(row, c, binary))));
  }
};

const changedRow = (row, c, binary) => {
  const list = make('dl', {}, pairOf('Prompt', row.prompt), pairOf('Expected', row.expected));
  if (row.answer_before !== null) list.append(...pairOf(c.before, row.answer_before));
  if (row.answer_after !== null) list.append(...pairOf(c.after, row.answer_after));
  if (!binary) list.append(...pairOf('Outcome', row.before + ' → ' + row.after));
  return make('li', {}, make('span', { class: 'note' }, 'row ' + (row.index + 1)), list);
};

const pairOf = (term, text) => [make('dt', {}, term), make('dd', {}, text.trim() ? foreign(text, 'pre') : make('em', {}, 'empty'))];
