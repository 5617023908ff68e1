// Each part is drawn when it comes near the window, before printing, or when nothing else is to do.
const beforePrint = [];
const afterPrint = [];
const parts = { matrix, histories, merges, changed, versions: sizes, masks };

document.documentElement.classList.add('scripted');
document.body.append(make('div', { id: 'said', class: 'hidden', role: 'status', 'aria-live': 'polite' }));
const waiting = new Map(Object.entries(parts).map(([name, show]) => {
  const part = document.querySelector(`[data-part="${name}"]`);
  return [part, () => {
    if (show(part)) return;
    document.getElementById(name).remove();
    document.querySelector(`nav a[href="#${name}"]`).parentElement.remove();
  }];
}));
const drawPart = (part) => {
  const show = waiting.get(part);
  if (!show) return;
  waiting.delete(part);
  show();
};
const drawAll = () => [...waiting.keys()].forEach(drawPart);

summary();
const seen = new IntersectionObserver((entries) => {
  entries.filter((entry) => entry.isIntersecting).forEach((entry) => drawPart(entry.target));
}, { rootMargin: '600px' });
[...waiting.keys()].forEach((part) => seen.observe(part));
const idle = window.requestIdleCallback || ((call) => setTimeout(call, 50));
const drawNext = () => {
  const [part] = waiting.keys();
  if (!part) {
    document.documentElement.classList.add('complete');
    performance.mark('report-complete');
    return;
  }
  drawPart(part);
  idle(drawNext);
};
idle(drawNext);
const jump = (event) => {
  if (event.target.closest('a[href^="#"]')) drawAll();
};
document.querySelector('nav').addEventListener('click', jump);
if (location.hash) {
  drawAll();
  document.getElementById(location.hash.slice(1))?.scrollIntoView();
}
window.addEventListener('beforeprint', () => {
  drawAll();
  beforePrint.forEach((act) => act());
});
window.addEventListener('afterprint', () => afterPrint.forEach((act) => act()));
performance.mark('report-ready');
