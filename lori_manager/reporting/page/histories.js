// Which tasks' charts are shown: all of a few, else one that is looked for.
const ALL = 6;
let showHistory = () => {};

const histories = (part) => {
  const scored = tasks.filter((task) => task.cells.i.length);
  if (!scored.length) return false;
  const worst = byLoss().filter((task) => task.cells.i.length);
  const state = { task: scored.length <= ALL ? 'all' : worst[0].ref, line: '' };
  const place = make('div', { class: 'charts' });
  const controls = make('div', { class: 'controls' });

  const show = (chosen) => {
    const wanted = chosen || (state.task === 'all' ? scored : scored.filter((task) => task.ref === state.task));
    const width = Math.max(260, Math.floor(place.clientWidth || part.clientWidth));
    const two = wanted.length > 1 && width >= 900;
    const each = two ? Math.floor((width - 32) / 2) : width;
    place.classList.toggle('two', two);
    place.replaceChildren(...wanted.map((task) => chart(task, state.line, each)));
  };

  const options = (found) => [...(scored.length <= ALL ? [['all', 'all tasks']] : []), ...found.map((task) => [task.ref, task.ref])];
  let chooser = null;
  const choose = (found) => {
    const made = select('Task', options(found), state.task, (value) => {
      state.task = value;
      show();
    });
    if (chooser) chooser.replaceWith(made);
    chooser = made;
  };
  choose(scored);
  if (scored.length > 12) {
    controls.append(search('Find a task', (wanted) => {
      const found = scored.filter((task) => task.ref.toLowerCase().includes(wanted));
      say(counted(found.length, 'task'));
      if (!found.length) return;
      if (!found.some((task) => task.ref === state.task)) {
        state.task = found[0].ref;
        show();
      }
      choose(found);
    }));
  }
  controls.append(chooser);
  if (lines.length > 1) {
    controls.append(select('Line', [['', 'all lines'], ...lines.map((line) => [line, line])], '', (value) => {
      state.line = value;
      show();
    }));
  }
  part.append(controls, make('p', { class: 'legend shapes' },
    '■ base  ● trained  ◆ merged  ▲ imported; bars are 95% intervals; ▼ ▲ below a point: really worse, really better than its parent.'), place);
  show();

  showHistory = (task) => {
    state.task = task.ref;
    choose(scored);
    show();
    chooser.querySelector('select').focus({ preventScroll: true });
    document.getElementById('histories').scrollIntoView();
    say(task.ref + ' over its versions');
  };
  let width = place.clientWidth;
  new ResizeObserver(() => {
    if (Math.abs(place.clientWidth - width) < 8) return;
    width = place.clientWidth;
    show();
  }).observe(place);
  beforePrint.push(() => {
    if (scored.length <= 12) show(scored);
  });
  afterPrint.push(() => show());
  return true;
};
