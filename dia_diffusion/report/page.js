"use strict";

// Draws each plot from the JSON beside it. On a touch screen a drag scrolls the page instead of zooming.
const plots = [...document.querySelectorAll(".plot")];
const touch = matchMedia("(pointer: coarse)").matches;
for (const plot of plots) {
  const { data, layout } = JSON.parse(plot.nextElementSibling.textContent);
  if (touch) layout.dragmode = false;
  // None of plotly's buttons that send the data to a service.
  const buttons = [["zoom2d", "pan2d", "resetScale2d", "toImage"]];
  const bar = { displayModeBar: touch ? false : "hover", displaylogo: false, modeBarButtons: buttons };
  Plotly.newPlot(plot, data, layout, { responsive: true, ...bar });
}
// Paper has another width than the window.
addEventListener("beforeprint", () => plots.forEach((plot) => Plotly.relayout(plot, { width: Math.min(plot.clientWidth, 660) })));
addEventListener("afterprint", () => plots.forEach((plot) => Plotly.relayout(plot, { width: null, autosize: true })));

// Puts a slider above pictures over time, which without it stand below each other.
for (const [number, frames] of document.querySelectorAll(".frames").entries()) {
  const moments = [...frames.querySelectorAll(".frame")];
  const slider = document.createElement("input");
  const label = document.createElement("label");
  const shown = document.createElement("output");
  Object.assign(slider, { type: "range", id: `moment-${number}`, min: 0, max: moments.length - 1, step: 1 });
  label.htmlFor = shown.htmlFor = slider.id;
  label.textContent = "Over training";
  const show = () => {
    moments.forEach((moment, index) => { moment.hidden = index !== Number(slider.value); });
    shown.value = moments[slider.value].dataset.moment;
    slider.setAttribute("aria-valuetext", shown.value);
  };
  slider.value = moments.length - 1;
  slider.addEventListener("input", show);
  const controls = document.createElement("div");
  controls.className = "slider";
  controls.append(label, slider, shown);
  if (moments.length > 1) frames.querySelector("h3").after(controls);
  show();
}
