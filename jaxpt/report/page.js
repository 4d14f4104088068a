const word = value => value;  // Vega-Lite 6.4 shows a name in the tooltip of a nearest point as "undefined" unless it passes through a format
const quiet = {grid: true, gridColor: "var(--line)", domainColor: "var(--line)", tickColor: "var(--line)", labelColor: "var(--muted)", titleColor: "var(--muted)",
  titleFontWeight: 400, labelFontSize: 12, titleFontSize: 12, tickCount: 5, labelFlush: false};
const config = {aria: false, customFormatTypes: true, background: null, font: "system-ui, sans-serif", view: {stroke: null}, axis: quiet, axisX: {grid: false}, axisY: {domain: false, ticks: false, minExtent: 30},
  axisBand: {grid: false}, line: {strokeWidth: 1.75, strokeJoin: "round"}, rule: {color: "var(--muted)"}, text: {fill: "var(--text)", fontSize: 12}, legend: {labelColor: "var(--text)", labelFontSize: 12}};
for (const plot of document.querySelectorAll(".plot")) {
  const spec = {width: "container", autosize: {type: "fit", contains: "padding"}, ...JSON.parse(plot.querySelector("script").textContent)};
  vegaEmbed(plot.querySelector("div"), spec, {mode: "vega-lite", renderer: "svg", actions: false, config, expressionFunctions: {word}, tooltip: {disableDefaultStyle: true}});
}
