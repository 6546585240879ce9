// Draws each figure's data with plotly, in the page's own colours, light or dark.
"use strict";

const dark = matchMedia("(prefers-color-scheme: dark)");

/** The page's colours, as plotly wants them. */
function colours() {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(name).trim();
  const axis = { gridcolor: of("--line"), zerolinecolor: of("--line"), linecolor: of("--line") };
  return { ink: of("--ink"), paper: of("--paper"), card: of("--card"), axis };
}

/** What plotly is to draw: a chart's curves over one of its axes. */
function traces(chart, axis) {
  return chart.curves.map((curve) => ({
    name: curve.name,
    legendgroup: curve.colour, // a run's curves come and go together
    showlegend: !curve.faint && !curve.dots,
    x: curve.xs[axis],
    y: curve.y,
    mode: curve.dots ? "markers" : chart.ticks.length ? "lines+markers" : "lines",
    opacity: curve.faint ? 0.35 : 1,
    line: { color: curve.colour, width: curve.faint ? 1 : 2 },
    marker: { color: curve.colour, size: 8 },
    text: curve.xs[axis].map((x) => chart.ticks[x] ?? x),
    hovertemplate: `%{y:.5~f} ${escaped(chart.y_name)} at ${axis} %{text}`,
  }));
}

/** plotly takes some HTML in names; those of runs have none. */
function escaped(text) {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
}

/** Names of an axis's places, where they are no numbers. */
function names(chart) {
  return chart.ticks.length ? { tickvals: [...chart.ticks.keys()], ticktext: chart.ticks } : {};
}

/** Where and in which colours. */
function layout(chart, axis) {
  const { ink, paper, card, axis: lines } = colours();
  return {
    paper_bgcolor: paper,
    plot_bgcolor: paper,
    font: { color: ink, family: getComputedStyle(document.body).fontFamily, size: 12 },
    margin: { l: 52, r: 8, t: 8, b: 44 },
    xaxis: { ...lines, title: { text: axis }, automargin: true, ...names(chart) },
    yaxis: {
      ...lines,
      title: { text: chart.y_name, standoff: 10 },
      range: chart.y_range || undefined,
      automargin: true,
    },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    hoverlabel: { bgcolor: card, font: { color: ink } },
    hovermode: "closest",
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", // a finger scrolls the page
  };
}

/** Fills one figure, with a button for each axis where there are several. */
function fill(figure) {
  const chart = JSON.parse(figure.querySelector("script").textContent);
  chart.curves.forEach((curve) => { curve.name = escaped(curve.name); });
  const place = figure.querySelector(".plot");
  const axes = Object.keys(chart.curves[0].xs);
  let chosen = axes[0];
  const options = { responsive: true, displayModeBar: false };
  const draw = () => Plotly.react(place, traces(chart, chosen), layout(chart, chosen), options);
  if (axes.length > 1) {
    const row = document.createElement("div");
    row.className = "axes";
    const buttons = axes.map((axis) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = `by ${axis}`;
      button.setAttribute("aria-pressed", String(axis === chosen));
      button.addEventListener("click", () => {
        chosen = axis;
        buttons.forEach((one) => one.setAttribute("aria-pressed", String(one === button)));
        draw();
      });
      return button;
    });
    row.append(...buttons);
    figure.insertBefore(row, place);
  }
  dark.addEventListener("change", draw);
  return draw();
}

const figures = [...document.querySelectorAll("figure.chart")];
Promise.all(figures.map(fill)).then(() => { document.body.dataset.drawn = figures.length; });
