"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const plots = [...document.querySelectorAll(".plot")];
  const axis = document.getElementById("axis");
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  // On a touch screen a drag over a chart should scroll the page.
  const touch = window.matchMedia("(pointer: coarse)").matches || window.innerWidth < 600;
  const format = (number) => String(Number(number.toPrecision(4)));

  // charts

  const axisTitles = { epochs: "epoch", images: "images", minutes: "minutes of training" };

  function colours() {
    const style = getComputedStyle(document.documentElement);
    return (name) => style.getPropertyValue(name).trim();
  }

  function layoutOf(chart) {
    const colour = colours();
    const line = { gridcolor: colour("--line"), zeroline: false, linecolor: colour("--line"), automargin: true, fixedrange: touch };
    return {
      ...chart.layout,
      height: 260,
      margin: { l: 8, r: 10, t: 8, b: 8 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "inherit", size: 13, color: colour("--text") },
      hovermode: "x unified",
      hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--text") } },
      dragmode: touch ? false : "zoom",
      legend: { orientation: "h", x: 0, y: -0.28, yanchor: "top", font: { size: 12 } },
      xaxis: { ...line, title: { text: axisTitles[axis.value], font: { size: 12 }, standoff: 6 } },
      yaxis: { ...line, exponentformat: "e", ...(chart.layout.yaxis || {}) },
    };
  }

  function draw(plot) {
    const chart = data.charts[Number(plot.dataset.chart)];
    const traces = chart.data.map((trace, at) => ({ ...trace, x: chart.xs[at][axis.value] }));
    const config = { responsive: true, displaylogo: false, displayModeBar: touch ? false : "hover",
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
    return Plotly.react(plot, traces, layoutOf(chart), config);
  }

  const drawAll = () => Promise.all(plots.map(draw));
  if (axis) {
    axis.addEventListener("change", drawAll);
    dark.addEventListener("change", drawAll);
  }

  // images: a card for each prompt, before training beside the epoch that the slider shows

  function element(kind, name, text) {
    const made = document.createElement(kind);
    if (name) made.className = name;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  const when = (epoch) => (epoch === 0 ? "before training" : `after epoch ${epoch}`);

  function half(sample, epoch) {
    const made = element("div");
    const image = element("img");
    image.src = sample.src;
    image.alt = `${sample.prompt}, ${when(epoch)}`;
    made.append(image, element("span", "when", when(epoch)));
    if (sample.reward !== null) made.append(element("span", "score", `reward ${format(sample.reward)}`));
    const parts = Object.entries(sample.rewards).filter(([, value]) => value !== null);
    if (parts.length > 1) {
      for (const [name, value] of parts) made.append(element("span", "score part", `${name} ${format(value)}`));
    }
    return made;
  }

  function show(viewer) {
    const epochs = data.samples[Number(viewer.dataset.run)];
    const slider = viewer.querySelector("input");
    const shown = epochs[Number(slider.value)];
    viewer.querySelector("output").textContent = when(shown.epoch);
    slider.setAttribute("aria-valuetext", when(shown.epoch));
    const cards = shown.samples.map((sample) => {
      const card = element("figure", "card");
      const pair = element("div", "pair");
      const first = epochs[0].samples.find((one) => one.file === sample.file && one.prompt === sample.prompt);
      if (first) pair.append(half(first, epochs[0].epoch));
      pair.append(half(sample, shown.epoch));
      const caption = element("figcaption");
      caption.append(element("span", "prompt", sample.prompt));
      card.append(pair, caption);
      return card;
    });
    viewer.querySelector(".cards").replaceChildren(...cards);
  }

  const viewers = [...document.querySelectorAll(".viewer")];
  for (const viewer of viewers) {
    viewer.querySelector("input").addEventListener("input", () => show(viewer));
  }

  // a live page: loads itself again when its run has news, and stays where the reader was

  const version = document.body.dataset.version;
  const KEPT = "ddpo-fast-report";

  function keep() {
    const sliders = viewers.map((viewer) => {
      const slider = viewer.querySelector("input");
      return slider.value === slider.max ? null : slider.value;
    });
    sessionStorage.setItem(KEPT, JSON.stringify({ sliders, axis: axis ? axis.value : null, y: window.scrollY }));
  }

  function restore() {
    const kept = JSON.parse(sessionStorage.getItem(KEPT) || "null");
    if (!kept) return;
    sessionStorage.removeItem(KEPT);
    viewers.forEach((viewer, at) => {
      // one at the end follows the run
      if (kept.sliders[at] != null) viewer.querySelector("input").value = kept.sliders[at];
    });
    if (axis && kept.axis) axis.value = kept.axis;
    return kept.y;
  }

  async function follow() {
    const said = document.getElementById("live");
    try {
      const answer = await fetch("version", { cache: "no-store" });
      const now = await answer.text();
      said.textContent = "Live: follows the run.";
      if (answer.ok && now !== version) {
        keep();
        location.reload();
        return;
      }
    } catch {
      said.textContent = "No longer live: ddpo-fast report --watch has ended.";
    }
    setTimeout(follow, 3000);
  }

  const y = version === undefined ? undefined : restore();
  viewers.forEach(show);
  drawAll().then(() => {
    document.body.dataset.ready = "yes";
    if (y !== undefined) window.scrollTo(0, y);
  });
  if (version !== undefined) setTimeout(follow, 3000);
})();
