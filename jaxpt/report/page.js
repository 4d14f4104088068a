const word = value => value;  // Vega-Lite 6.4 shows a name in the tooltip of a nearest point as "undefined" unless it passes through a format
const mutedAxis = {grid: true, gridColor: "var(--line)", domainColor: "var(--line)", tickColor: "var(--line)", labelColor: "var(--dim)", titleColor: "var(--dim)",
  titleFontWeight: 400, labelFontSize: 12, titleFontSize: 12, tickCount: 5, labelFlush: false};
const aboveAxis = {titleAngle: 0, titleAlign: "left", titleAnchor: "end", titleX: -30, titleY: -10, titleBaseline: "bottom"};  // a unit is horizontal, above its axis
const config = {aria: false, customFormatTypes: true, background: null, font: "system-ui, sans-serif", view: {stroke: null}, axis: mutedAxis,
  axisX: {grid: false}, axisY: {domain: false, ticks: false, minExtent: 30, ...aboveAxis}, axisBand: {grid: false},
  line: {strokeWidth: 1.75, strokeJoin: "round"}, rule: {color: "var(--dim)"}, text: {fill: "var(--text)", fontSize: 12},
  legend: {labelColor: "var(--text)", labelFontSize: 12}};

// Ticks of a logarithmic axis: round numbers, at least four of them however short it is.
function logTicks([low, high]) {
  for (const digits of [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 5, 7]]) {
    const ticks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      ticks.push(...digits.map(digit => +(digit * 10 ** power).toPrecision(3)).filter(tick => low <= tick && tick <= high));
    if (ticks.length >= 4) return ticks;
  }
  const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(digit => digit * power).find(step => step >= rough);
  const first = Math.ceil(low / step);
  return Array.from({length: Math.floor(high / step) - first + 1}, (_, i) => +((first + i) * step).toPrecision(12));
}

// ---- curves over steps: redrawn over tokens, FLOPs or time, smoothed, on logarithmic axes

const controls = document.querySelector(".controls");
const axes = JSON.parse(controls?.dataset.axes ?? "{}");
const UNITS = {tokens: [[1e12, "trillion tokens"], [1e9, "billion tokens"], [1e6, "million tokens"], [1, "tokens"]],
  FLOPs: [[1e21, "10²¹ FLOPs"], [1e18, "10¹⁸ FLOPs"], [1e15, "10¹⁵ FLOPs"], [1e12, "10¹² FLOPs"], [1, "FLOPs"]],
  seconds: [[3600, "hours"], [60, "minutes"], [1, "seconds"]]};

// What a run's steps up to this one took, between two known steps in proportion.
function convert(run, step, axis) {
  const {step: steps, [axis]: values} = axes[run];
  const i = Math.max(1, steps.findIndex(known => known >= step));
  const last = steps.at(-1) < step ? steps.length - 1 : i;
  return values[last - 1] + (values[last] - values[last - 1]) * (step - steps[last - 1]) / (steps[last] - steps[last - 1] || 1);
}

// The running mean of each curve, a weight of the points before; the first ones count as they should.
function smooth(values, weight) {
  const means = new Map();
  return values.map(point => {
    const {sum, share} = means.get(point.name) ?? {sum: 0, share: 0};
    const now = {sum: weight * sum + (1 - weight) * point.value, share: weight * share + 1 - weight};
    means.set(point.name, now);
    return {...point, value: now.sum / now.share};
  });
}

function adapt(spec) {
  if (spec.usermeta?.over !== "step" || !controls) return spec;
  const form = new FormData(controls), weight = +form.get("smooth"), axis = form.get("axis");
  const parts = [spec, ...spec.layer], encodings = spec.layer.map(layer => layer.encoding);
  if (weight && spec.usermeta.smooth) {
    const [lines] = spec.layer;
    spec.layer.unshift({data: {values: spec.data.values}, mark: {...lines.mark, strokeWidth: 1, opacity: .25}, encoding: lines.encoding});
    spec.data.values = smooth(spec.data.values, weight);
    parts.push(spec.layer[0]);
  }
  let title = "step";
  if (axis !== "steps") {
    const points = parts.flatMap(part => part.data?.values ?? []).filter(point => "step" in point);
    const at = point => convert(spec.usermeta.run ?? point.name, point.step, axis);
    const most = Math.max(...points.map(at));
    const [size, name] = UNITS[axis].find(([size]) => most >= size) ?? UNITS[axis].at(-1);
    for (const part of parts) if (part.data) part.data.values = part.data.values.map(point => "step" in point ? {...point, step: at(point) / size} : point);
    title = name;
  }
  for (const {x, y, tooltip} of encodings) {
    if (x?.field === "step") {
      Object.assign(x, {title, axis: axis === "steps" ? x.axis : {}});
      if (form.has("log_x")) Object.assign(x, {scale: {type: "log", nice: false}, axis: {values: {expr: "logTicks(domain('x'))"}, format: ",.4~r"}});
    }
    for (const line of Array.isArray(tooltip) ? tooltip : []) if (line.field === "step") Object.assign(line, {title, ...(axis !== "steps" && {format: ",.4~g"})});
    if (form.has("log_y") && y && y.scale?.type !== "log" && !y.scale?.domain && spec.data.values.every(point => point.value > 0))
      Object.assign(y, {scale: {type: "log", padding: 5, nice: false}, axis: {values: {expr: "logTicks(domain('y'))"}, format: ",.4~r"}});
  }
  if (form.has("log_x")) for (const part of parts) if (part.data) part.data.values = part.data.values.filter(point => !(point.step <= 0));
  return spec;
}

function draw(plot) {
  const spec = {width: "container", autosize: {type: "fit", contains: "padding"}, ...adapt(JSON.parse(plot.querySelector("script").textContent))};
  return vegaEmbed(plot.querySelector("div"), spec, {mode: "vega-lite", renderer: "svg", actions: false, config, expressionFunctions: {word, logTicks}, tooltip: {disableDefaultStyle: true}});
}

const plots = [...document.querySelectorAll(".plot")];
const isOverSteps = plot => JSON.parse(plot.querySelector("script").textContent).usermeta?.over === "step";
if (controls) {
  const known = Object.values(axes).filter(axis => axis.step.length > 1);
  for (const choice of controls.axis) choice.disabled = choice.value !== "steps" && !known.every(axis => axis[choice.value]);
  try {  // a page that reloads while its run goes on keeps them
    for (const [name, value] of Object.entries(JSON.parse(sessionStorage.curves ?? "{}"))) {
      const field = controls[name];
      if (field?.type === "checkbox") field.checked = true; else if (field) field.value = value;
    }
    if (controls.querySelector(":checked:disabled")) controls.axis.value = "steps";
  } catch { }
  controls.addEventListener("input", () => {
    try { sessionStorage.curves = JSON.stringify(Object.fromEntries(new FormData(controls))); } catch { }
    plots.filter(isOverSteps).forEach(draw);
  });
}
for (const plot of plots) {
  draw(plot);
  plot.addEventListener("keydown", event => stepToPoint(plot, event));
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
