"use strict";
(() => {
  const report = JSON.parse(document.getElementById("report").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const drawn = new Map();
  let turn = 0;

  function settings(figure, width) {
    const theme = dark.matches ? "dark" : "light";
    const config = structuredClone(report.config[theme]);
    config.range.category = report.palettes[figure.palette][theme];
    config.legend.columns = Math.max(1, Math.floor(width / figure.column));
    if (width < 480) config.legend.gradientLength = 160;
    return config;
  }

  async function draw(redraw) {
    const mine = ++turn;
    for (const figure of report.figures) {
      const place = document.getElementById(figure.name);
      const width = place.clientWidth;
      const before = drawn.get(figure.name);
      if (before && !redraw && before.width === width) continue;
      const picked = before ? figure.signals.map((name) => [name, before.view.signal(name)]) : [];
      const options = { mode: "vega-lite", renderer: "svg", actions: false, ast: true, logLevel: 1, config: settings(figure, width),
        tooltip: { theme: dark.matches ? "dark" : "light" } };
      const { view } = await vegaEmbed(place, { ...figure.spec, width }, options);
      for (const [name, value] of picked) view.signal(name, value);
      await view.runAsync();
      if (before) before.view.finalize();
      drawn.set(figure.name, { view, width });
      if (mine !== turn) return; // another drawing has begun meanwhile
    }
    document.documentElement.dataset.drawn = String(drawn.size);
  }

  let wait = 0;
  addEventListener("resize", () => { clearTimeout(wait); wait = setTimeout(draw, 150, false); });
  dark.addEventListener("change", () => draw(true));
  draw(true);

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const order = (a, b) => (Number(a) - Number(b)) || String(a).localeCompare(String(b), undefined, { numeric: true });
      const rows = [...table.tBodies[0].rows].sort((a, b) => (down ? -1 : 1) * order(value(a), value(b)));
      table.tBodies[0].append(...rows);
    }));
  }
})();
