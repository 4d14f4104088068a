const word = value => value;  // Vega-Lite 6.4 shows a name in the tooltip of a nearest point as "undefined" unless it passes through a format
const mutedAxis = {grid: true, gridColor: "var(--line)", domainColor: "var(--line)", tickColor: "var(--line)", labelColor: "var(--muted)", titleColor: "var(--muted)",
  titleFontWeight: 400, labelFontSize: 12, titleFontSize: 12, tickCount: 5, labelFlush: false};
const aboveAxis = {titleAngle: 0, titleAlign: "left", titleAnchor: "end", titleX: -30, titleY: -10, titleBaseline: "bottom"};  // a unit is horizontal, above its axis
const config = {aria: false, customFormatTypes: true, background: null, font: "system-ui, sans-serif", view: {stroke: null}, axis: mutedAxis,
  axisX: {grid: false}, axisY: {domain: false, ticks: false, minExtent: 30, ...aboveAxis}, axisBand: {grid: false},
  line: {strokeWidth: 1.75, strokeJoin: "round"}, rule: {color: "var(--muted)"}, text: {fill: "var(--text)", fontSize: 12},
  legend: {labelColor: "var(--text)", labelFontSize: 12}};

for (const plot of document.querySelectorAll(".plot")) {
  const spec = {width: "container", autosize: {type: "fit", contains: "padding"}, ...JSON.parse(plot.querySelector("script").textContent)};
  vegaEmbed(plot.querySelector("div"), spec, {mode: "vega-lite", renderer: "svg", actions: false, config, expressionFunctions: {word}, tooltip: {disableDefaultStyle: true}})
    .then(() => plot.addEventListener("keydown", event => stepToPoint(plot, event)));
}

// The arrow keys go from point to point of a plot as the pointer would; the tooltip shows name and value.
function stepToPoint(plot, event) {
  const by = {ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity}[event.key];
  const points = [...plot.querySelectorAll(".mark-symbol path")];
  if (!by || !points.length) return;
  event.preventDefault();
  plot.at = Math.min(points.length - 1, Math.max(0, (plot.at ?? -1) + by));
  const box = points[plot.at].getBoundingClientRect(), at = {clientX: box.x + box.width / 2, clientY: box.y + box.height / 2, bubbles: true, view: window};
  for (const name of ["pointerover", "pointermove"]) points[plot.at].dispatchEvent(new PointerEvent(name, at));
  points[plot.at].dispatchEvent(new MouseEvent("mousemove", at));
  document.querySelector("#vg-tooltip-element")?.setAttribute("role", "status");  // read out
}

// Mark the visible section in the list of sections.
const links = new Map([...document.querySelectorAll("nav a")].map(link => [link.hash.slice(1), link]));
const observer = new IntersectionObserver(entries => {
  for (const {target, isIntersecting} of entries) {
    const link = links.get(target.id);
    isIntersecting ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current");
  }
}, {rootMargin: "-20% 0px -79% 0px"});
document.querySelectorAll("section").forEach(section => observer.observe(section));
