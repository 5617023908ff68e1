// What the tests ask of a page, beyond one expression; given to each page after it is opened.
window.probes = (() => {
  const seen = (selector) => [...document.querySelectorAll(selector)].filter((e) => e.checkVisibility());

  const texts = (selector) => seen(selector).map((e) => e.innerText);

  // A choice in a list, as a user makes it.
  const choose = (selector, pick) => {
    const list = document.querySelector(selector);
    list.value = list.options[pick]?.value ?? pick;
    list.dispatchEvent(new Event('change'));
  };

  const press = (text) =>
    seen('button').find((b) => b.textContent === text).click();

  // Where an element begins in the window, after it was brought there.
  const corner = (selector) => {
    const e = document.querySelector(selector);
    e.scrollIntoView({ block: 'center', behavior: 'instant' });
    const box = e.getBoundingClientRect();
    return { left: box.left, right: box.right, top: box.top, middle: box.top + box.height / 2 };
  };

  // Whether something sticks out of the window, so that the page scrolls sideways.
  const wider = () =>
    Math.max(document.documentElement.scrollWidth, document.body.scrollWidth) > innerWidth;

  const heights = (selector) => seen(selector).map((e) => e.getBoundingClientRect().height);

  // The axis of the first chart, and its newest point's label and ends.
  const chart = () => {
    const figure = document.querySelector('.chart');
    const point = [...figure.querySelectorAll('.point')].at(-1);
    const whisker = point.querySelector('.whisker');
    return {
      ticks: [...figure.querySelectorAll('.tick')].map((t) => [Number(t.textContent), t.getAttribute('y') - 4]),
      label: point.getAttribute('aria-label'),
      ends: ['y1', 'y2'].map((a) => Number(whisker.getAttribute(a))),
    };
  };

  // Whether the overview's pixel of the newest version and a task has the colour of its cell.
  const sameColour = (task) => {
    const context = document.querySelector('canvas').getContext('2d');
    const [r, g, b] = context.getImageData(task, 0, 1, 1).data;
    const cell = document.querySelector('#matrix tbody tr').cells[task + 1];
    return getComputedStyle(cell).backgroundColor === `rgb(${r}, ${g}, ${b})`;
  };

  // How many pieces of text can be seen, and those with too little contrast (WCAG 2.2, 1.4.3).
  const contrast = () => {
    const channel = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    const colour = (css) => css.match(/[\d.]+/g).map(Number);
    const luminance = ([r, g, b]) =>
      0.2126 * channel(r / 255) + 0.7152 * channel(g / 255) + 0.0722 * channel(b / 255);
    const clear = (e) => colour(getComputedStyle(e).backgroundColor)[3] === 0;
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const poor = [];
    let count = 0;
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {
      const e = node.parentElement;
      const skipped = e.closest('.hidden, script, style, [disabled]');
      if (!node.textContent.trim() || skipped || !e.checkVisibility()) continue;
      const style = getComputedStyle(e);
      let under = e;
      while (under && clear(under)) under = under.parentElement;
      const ground = under ? colour(getComputedStyle(under).backgroundColor) : [255, 255, 255];
      const ink = luminance(colour(e.closest('svg') ? style.fill : style.color));
      const [light, dark] = [ink, luminance(ground)].sort((x, y) => y - x);
      count += 1;
      if ((light + 0.05) / (dark + 0.05) < 4.5) poor.push(node.textContent.trim().slice(0, 30));
    }
    return { count, poor };
  };

  return { texts, choose, press, corner, wider, heights, chart, sameColour, contrast };
})();
