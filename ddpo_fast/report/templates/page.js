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
    const line = { gridcolor: colour("--line"), zeroline: false, linecolor: colour("--line"), fixedrange: touch };
    return {
      ...chart.layout,
      height: 260,
      margin: { l: 58, r: 10, t: 8, b: 40 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "inherit", size: 13, color: colour("--text") },
      hovermode: "x unified",
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--quiet"), activecolor: colour("--text") },
      hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--text") } },
      dragmode: touch ? false : "zoom",
      xaxis: { ...line, title: { text: axisTitles[axis.value], font: { size: 12 }, standoff: 6 } },
      yaxis: { ...line, exponentformat: "e", ...(chart.layout.yaxis || {}) },
    };
  }

  function draw(plot) {
    const chart = data.charts[Number(plot.dataset.chart)];
    const traces = chart.data.map((trace, at) => ({ ...trace, x: chart.xs[at][axis.value] }));
    // A run's figures are the user's: plotly's own page offers a button that sends them to its maker.
    const config = { responsive: true, displaylogo: false, showSendToCloud: false,
      displayModeBar: touch ? false : "hover", modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
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
    return made;
  }

  // the scores of an image by name; a single reward is the reward itself
  function scores(sample) {
    const parts = Object.entries(sample.rewards);
    return [["reward", sample.reward], ...(parts.length > 1 ? parts : [])].filter(([, value]) => value !== null);
  }

  const epochsOf = (viewer) => data.samples[Number(viewer.dataset.run)];

  function cardOf(first, sample, epochs) {
    const card = element("figure", "card");
    const pair = element("div", "pair");
    const before = first ? Object.fromEntries(scores(first)) : {};
    if (first) pair.append(half(first, epochs[0]));
    pair.append(half(sample, epochs[1]));
    const caption = element("figcaption");
    caption.append(element("span", "prompt", sample.prompt));
    for (const [name, value] of scores(sample)) {
      const from = name in before ? `${format(before[name])} → ` : "";
      caption.append(element("span", "score", `${name} ${from}${format(value)}`));
    }
    card.append(pair, caption);
    return card;
  }

  function show(viewer) {
    const epochs = epochsOf(viewer);
    const slider = viewer.querySelector("input");
    const shown = epochs[Number(slider.value)];
    viewer.querySelector("output").textContent = when(shown.epoch);
    slider.setAttribute("aria-valuetext", when(shown.epoch));
    const cards = shown.samples.map((sample) => {
      const first = epochs[0].samples.find((one) => one.file === sample.file && one.prompt === sample.prompt);
      return cardOf(first, sample, [epochs[0].epoch, shown.epoch]);
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

  // the place of a reader is in a section, as what is above it may grow
  const sections = [...document.querySelectorAll("section[id]")];
  const topOf = (section) => section.getBoundingClientRect().top;

  function keep() {
    const read = sections.filter((section) => topOf(section) < window.innerHeight / 2).pop();
    const place = read && window.scrollY ? { id: read.id, top: topOf(read) } : null;
    const sliders = viewers.map((viewer) => {
      const slider = viewer.querySelector("input");
      return slider.value === slider.max ? null : epochsOf(viewer)[Number(slider.value)].epoch;
    });
    sessionStorage.setItem(KEPT, JSON.stringify({ sliders, axis: axis ? axis.value : null, place }));
  }

  function restore() {
    const kept = JSON.parse(sessionStorage.getItem(KEPT) || "null");
    if (!kept) return null;
    sessionStorage.removeItem(KEPT);
    viewers.forEach((viewer, at) => {
      // one at the end follows the run
      const index = epochsOf(viewer).findIndex((one) => one.epoch === kept.sliders[at]);
      if (index >= 0) viewer.querySelector("input").value = index;
    });
    if (axis && kept.axis) axis.value = kept.axis;
    return kept.place;
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

  if (version !== undefined) history.scrollRestoration = "manual";
  const place = version === undefined ? null : restore();
  viewers.forEach(show);
  drawAll().then(() => {
    const section = place && document.getElementById(place.id);
    if (section) window.scrollBy(0, topOf(section) - place.top);
    document.body.dataset.ready = "yes";
  });
  if (version !== undefined) setTimeout(follow, 3000);
})();
