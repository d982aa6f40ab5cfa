"use strict";
(() => {
  const data = JSON.parse(document.getElementById("tensor-data").textContent);
  const [table, canvas] = ["tensor-table", "tensor-map"].map((id) => document.getElementById(id));
  const [quantity, kind] = ["tensor-quantity", "tensor-kind"].map((id) => document.getElementById(id));
  const readout = document.getElementById("tensor-value"), bar = document.getElementById("tensor-bar");

  // A press on a head sorts by its column, a second one the other way round; empty cells stay below.
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") === "descending" || (!head.ariaSort && column < 2);
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => row.cells[column].dataset.value;
    const compare = (a, b) => (column < 2 ? a.localeCompare(b, "en", { numeric: true }) : a - b);
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      return x === "" || y === "" ? (x === "") - (y === "") : (up ? 1 : -1) * compare(x, y);
    });
    body.append(...rows);
  }));

  // The map: one line for each tensor, from the first layer to the last; one cell for each group of steps.
  const raised = (c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)];
  const written = (log) => {
    const value = 10 ** log;
    if (value >= 1e-3 && value < 1e4) return String(Number(value.toPrecision(2)));
    const [mantissa, exponent] = value.toExponential(1).split("e");
    return `${Number(mantissa)} × 10${String(Number(exponent)).replace(/./g, raised)}`;
  };
  const channels = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  let shown = [], layout = {};
  function draw() {
    const style = getComputedStyle(document.documentElement), get = (name) => style.getPropertyValue(`--${name}`).trim();
    const ramp = get("ramp").split(/\s+/), stops = ramp.map(channels), muted = get("muted");
    const rows = data.logs[quantity.value];
    shown = data.names.map((_, i) => i).filter((i) => kind.value === "" || data.kinds[i] === kind.value);
    const values = shown.flatMap((i) => rows[i].filter((v) => v !== null)).sort((a, b) => a - b);
    const at = (q) => values[Math.round(q * (values.length - 1))] / 100;
    const low = values.length ? at(0.01) : 0, high = values.length ? Math.max(at(0.99), low + 1e-9) : 1;
    const color = (log) => {
      const t = Math.min(Math.max((log - low) / (high - low), 0), 1) * (stops.length - 1);
      const i = Math.min(Math.floor(t), stops.length - 2);
      return `rgb(${stops[i].map((c, k) => Math.round(c + (t - i) * (stops[i + 1][k] - c)))})`;
    };
    bar.replaceChildren(written(low), Object.assign(document.createElement("i"), {
      style: `background: linear-gradient(90deg, ${ramp})`,
    }), written(high));

    const width = canvas.clientWidth, line = shown.length <= 40 ? 16 : Math.max(3, Math.floor(640 / shown.length));
    const unit = window.devicePixelRatio, below = 18, pen = canvas.getContext("2d"), font = `11px ${get("sans")}`;
    pen.font = font;
    const longest = Math.max(...shown.map((i) => pen.measureText(data.names[i]).width));
    const left = line >= 11 ? Math.min(0.42 * width, longest + 10) : 0;
    canvas.style.height = `${line * shown.length + below}px`;
    [canvas.width, canvas.height] = [width * unit, (line * shown.length + below) * unit];
    const n = data.steps.length, cell = (width - left) / n;
    layout = { left, line, cell };
    pen.scale(unit, unit);
    pen.font = font;
    pen.textBaseline = "middle";
    shown.forEach((i, k) => {
      if (left) {
        let name = data.names[i];
        while (name.length > 3 && pen.measureText(name).width > left - 8) name = `…${name.slice(2)}`;
        pen.fillStyle = muted;
        pen.fillText(name, 0, (k + 0.5) * line);
      }
      rows[i].forEach((v, j) => {
        if (v === null) return;
        pen.fillStyle = color(v / 100);
        pen.fillRect(left + j * cell, k * line, Math.ceil(cell * unit) / unit, line - (line > 6 ? 1 : 0));
      });
    });
    pen.fillStyle = muted;
    pen.fillText(`step ${data.steps[0]}`, left, line * shown.length + 11);
    const last = String(data.steps[n - 1]);
    pen.fillText(last, width - pen.measureText(last).width, line * shown.length + 11);
  }
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const i = shown[Math.floor((event.clientY - box.top) / layout.line)];
    const j = Math.floor((event.clientX - box.left - layout.left) / layout.cell);
    const v = j < 0 || i === undefined ? undefined : data.logs[quantity.value][i][j];
    readout.textContent = v === undefined ? "" : `${data.names[i]}, step ${data.steps[j]}: ${v === null ? "none" : written(v / 100)}`;
  });
  for (const select of [quantity, kind]) select.addEventListener("change", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  new ResizeObserver(draw).observe(canvas.parentElement);
})();
