// The summary is in the page already; here it learns to sort, to search and to lead on.
const summary = () => {
  const table = document.querySelector('#summary table');
  if (!table || !table.querySelector('.task')) return;
  stackable(table);
  sortable(table, cellKey);
  for (const place of table.querySelectorAll('.task')) {
    const found = tasks.find((task) => task.ref === place.dataset.task);
    if (!found || !found.cells.i.length) continue;
    place.replaceChildren(button(name(found.ref), () => showHistory(found), {
      class: 'link', title: 'Show ' + found.ref + ' over its versions',
    }));
  }
  if (tasks.length <= 12) return;
  const told = make('p', { class: 'note' });
  const all = [...table.tBodies[0].rows];
  const narrow = (wanted) => {
    let left = 0;
    for (const row of all) {
      row.hidden = !row.querySelector('.task').dataset.task.toLowerCase().includes(wanted);
      left += !row.hidden;
    }
    told.textContent = wanted ? counted(left, 'task') + ' of ' + all.length : '';
    say(told.textContent);
  };
  const controls = make('div', { class: 'controls' }, search('Find a task', narrow), told);
  table.closest('.scroll').before(controls);
  table.closest('.scroll').classList.add('tall');
  table.querySelector('thead th:last-child .sort').click(); // the worst first
};
