// Draws the figures of the page, in the shades of the reader's theme, and again when the theme changes.
"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const shades = JSON.parse(document.getElementById("shades").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");

  function shade(name, theme) {
    const [color, percent] = name.slice(1).split("/");
    const hex = shades[theme][color];
    if (!percent) return hex;
    const parts = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
    return `rgba(${parts.join(",")},${percent / 100})`;
  }
  function themed(value, theme) {
    if (typeof value === "string") return /^@[a-z]+(\/\d+)?$/.test(value) ? shade(value, theme) : value;
    if (Array.isArray(value)) return value.map((item) => themed(item, theme));
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, themed(item, theme)]));
    return value;
  }
  function layout(given, theme, narrow) {
    const ink = shades[theme].ink, grid = shades[theme].grid;
    const axis = (more) => ({ gridcolor: grid, linecolor: grid, zerolinecolor: grid, automargin: true,
                              exponentformat: "SI", ...more, title: { standoff: 8, ...more.title } });
    const base = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: ink, family: "system-ui, sans-serif", size: narrow ? 11 : 13 },
      margin: { l: 10, r: 10, t: narrow ? 10 : 34, b: 10 },  // the toolbar has a strip of its own
      legend: { orientation: "h", x: 0, y: narrow ? -0.32 : -0.29, xanchor: "left", yanchor: "top" },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: grid, activecolor: ink },
      hovermode: "closest",
    };
    const axes = Object.fromEntries(Object.entries(given).filter(([key]) => /^[xy]axis/.test(key))
      .map(([key, value]) => [key, axis(value)]));
    return themed({ ...base, ...given, legend: { ...base.legend, ...given.legend }, ...axes }, theme);
  }
  // Entries of the legend stand two in a line, on a phone one: the figure grows by their lines, so that the plot does
  // not shrink and the legend stays below the axis' title.
  function grow(name, traces, narrow) {
    const entries = traces.filter((trace) => trace.name && trace.showlegend !== false).length;
    const lines = narrow ? entries - 3 : Math.ceil(entries / 2) - 2;
    document.getElementById(name).style.height = lines > 0 ? `calc(21rem + ${20 * lines}px)` : "";
  }
  function draw(theme) {
    const narrow = innerWidth < 600;
    figures.forEach(({ name, traces }) => grow(name, traces, narrow));
    return Promise.all(figures.map(({ name, traces, layout: given }) =>
      Plotly.react(name, themed(traces, theme), layout(given, theme, narrow),
                   { responsive: true, displaylogo: false, displayModeBar: narrow ? false : "hover",
                     modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] })));
  }
  const now = () => (dark.matches ? "dark" : "light");
  dark.addEventListener("change", () => draw(now()));
  addEventListener("beforeprint", () => draw("light"));
  addEventListener("afterprint", () => draw(now()));
  let narrow = innerWidth < 600, settled = 0;
  addEventListener("resize", () => {  // legends sit elsewhere on a phone's width
    clearTimeout(settled);
    settled = setTimeout(() => {
      if (narrow === innerWidth < 600) return;
      narrow = innerWidth < 600;
      draw(now());
    }, 150);
  });
  const seen = new ResizeObserver((changes) => changes.forEach(({ target }) => {
    if (target.classList.contains("js-plotly-plot")) Plotly.Plots.resize(target);
  }));
  figures.forEach(({ name }) => seen.observe(document.getElementById(name)));
  draw(now()).then(() => { document.documentElement.dataset.drawn = String(figures.length); });
})();
