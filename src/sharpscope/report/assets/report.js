"use strict";
(() => {
  const root = document.documentElement;
  const data = JSON.parse(document.getElementById("data").textContent);
  const drawings = []; // {redraw, resize} of every chart on the page

  // Colours live in the style sheet; read once per theme.
  let ink = {};
  function readInk() {
    const style = getComputedStyle(root);
    const get = (name) => [name, style.getPropertyValue(`--${name}`).trim()];
    const list = (name) => [name, get(name)[1].split(/\s+/)];
    const one = ["text", "muted", "rule", "paper", "panel", "sans"].map(get);
    ink = Object.fromEntries([...one, ...["series", "paths", "ramp"].map(list)]);
  }
  const seriesColor = (i) => ink.series[i % ink.series.length];
  const pathColor = (i) => ink.paths[i % ink.paths.length];
  const dashes = [undefined, [8, 4], [2, 3]]; // the second and third time round the colours

  const raised = (c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)];
  const power = (n) => `10${String(n).replace(/./g, raised)}`;
  function number(value) { // as in html.py
    const size = Math.abs(value);
    let text;
    if (Number.isInteger(value) && size < 1e7) text = String(value);
    else if (size >= 9.9995e-4 && size < 99995) text = String(Number(value.toPrecision(4)));
    else {
      const [mantissa, exponent] = value.toExponential(3).split("e");
      text = `${Number(mantissa)} × ${power(Number(exponent))}`.replace(/^(-?)1 × /, "$1");
    }
    if (size >= 1e4) text = text.replace(/\d(?=(\d{3})+$)/g, "$&\u202f");
    return text.replace("-", "−").replaceAll(" ", "\u00a0");
  }

  function element(tag, parent, properties = {}) {
    const made = Object.assign(document.createElement(tag), properties);
    parent.append(made);
    return made;
  }

  // Canvas commands as SVG: what is needed to draw a chart once more, as a file.
  class Drawing {
    constructor(width, height) {
      Object.assign(this, { width, height, parts: [], path: "", strokeStyle: "", fillStyle: "", lineWidth: 1, globalAlpha: 1,
        dash: [], lineCap: "round" });
    }
    static escaped(text) { return String(text).replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`); }
    beginPath() { this.path = ""; }
    moveTo(x, y) { this.path += `M${x.toFixed(1)} ${y.toFixed(1)}`; }
    lineTo(x, y) { this.path += `L${x.toFixed(1)} ${y.toFixed(1)}`; }
    arc(x, y, r) { this.path += `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0`; }
    add(tag, attributes, text = "") {
      const given = Object.entries(attributes).map(([name, value]) => ` ${name}="${Drawing.escaped(value)}"`).join("");
      this.parts.push(`<${tag}${given}>${Drawing.escaped(text)}</${tag}>`);
    }
    stroke() {
      this.add("path", { d: this.path, fill: "none", stroke: this.strokeStyle, "stroke-width": this.lineWidth,
        "stroke-linecap": this.lineCap, "stroke-linejoin": "round", "stroke-dasharray": this.dash.join(" "),
        opacity: this.globalAlpha });
    }
    fill() { this.add("path", { d: this.path, fill: this.fillStyle, opacity: this.globalAlpha }); }
    line(x, y, x2, y2) { this.beginPath(); this.moveTo(x, y); this.lineTo(x2, y2); this.stroke(); }
    text(x, y, text, more = {}) {
      this.add("text", { x, y, fill: this.fillStyle, "font-size": 12, "font-family": ink.sans, ...more }, text);
    }
    // Title above, names below: the same around every chart.
    file(title, runs, color) {
      const room = this.width - 20, across = Math.max(1, Math.floor(room / 230));
      const names = new Drawing(this.width, 0);
      runs.forEach((run, i) => {
        const x = 10 + (i % across) * (room / across), y = this.height + 20 + 18 * Math.floor(i / across);
        Object.assign(names, { strokeStyle: color(run.color), fillStyle: ink.text, lineWidth: 3 });
        names.line(x, y - 4, x + 18, y - 4);
        names.text(x + 25, y, run.name);
      });
      const below = 30 + 18 * Math.ceil(runs.length / across);
      names.fillStyle = ink.text;
      const size = Math.max(8, Math.min(15, (1.75 * room) / title.length));
      names.text(10, -12, title, { "font-size": size.toFixed(1), "font-weight": 600 });
      const box = `0 -34 ${this.width} ${this.height + below + 34}`;
      return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="${box}" width="${this.width}" height="${this.height + below + 34}">`
        + `<rect x="0" y="-34" width="100%" height="100%" fill="${ink.paper}"/>${[...this.parts, ...names.parts].join("\n")}</svg>\n`;
    }
  }

  // The points of a chart as a table: a row for each, with the name of its run.
  function table(runs, heads) {
    const cell = (value) => (/[",\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : value);
    const letters = ["x", "y", "z", "v"].slice(0, heads.length);
    const rows = runs.flatMap((run) => run.x.map((_, i) => [run.name, ...letters.map((l) => (run[l] ? run[l][i] : ""))]));
    return [["run", ...heads], ...rows].map((row) => row.map(cell).join(",")).join("\n") + "\n";
  }

  // Buttons that hand the chart out as a file.
  function downloads(box, svg, csv) {
    const tools = element("div", box, { className: "files" }), name = box.dataset.chart;
    for (const [kind, type, make] of [["SVG", "image/svg+xml", svg], ["CSV", "text/csv", csv]]) {
      const label = `Download the chart as ${kind}${kind === "CSV" ? ": the points that it shows" : ""}`;
      element("button", tools, { type: "button", textContent: kind, title: label, ariaLabel: `${label}: ${name}`, onclick: () => {
        const href = URL.createObjectURL(new Blob([make()], { type }));
        Object.assign(document.createElement("a"), { href, download: `${name}.${kind.toLowerCase()}` }).click();
        setTimeout(() => URL.revokeObjectURL(href), 60000);
      } });
    }
    const label = "Print the chart alone, to paper or as PDF";
    element("button", tools, { type: "button", textContent: "PDF", title: label, ariaLabel: `${label}: ${name}`,
      onclick: () => printAlone(name, svg) });
  }

  // Print nothing but this drawing; the page's title is what a browser calls the file.
  function printAlone(name, svg) {
    forPaper(true);
    const sheet = element("div", document.body, { className: "sheet", innerHTML: svg() }), title = document.title;
    document.title = name;
    addEventListener("afterprint", () => { sheet.remove(); document.title = title; }, { once: true });
    print();
  }

  // One button per run: its mark, its name, the value under the cursor.  Pressed means shown.
  function legend(parent, runs, color, dots, onToggle) {
    const box = element("div", parent, { className: "legend" });
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", "Runs; press to hide or show");
    return runs.map((run, i) => {
      const button = element("button", box, { type: "button", title: "Hide or show" });
      const mark = element("i", button, { className: dots ? "dot" : "line" });
      if (!dots && run.color >= ink.series.length) mark.style.borderTopStyle = "dashed";
      element("span", button, { textContent: run.name });
      const value = element("output", button);
      button.setAttribute("aria-pressed", "true");
      button.addEventListener("click", () => {
        const shown = button.getAttribute("aria-pressed") !== "true";
        button.setAttribute("aria-pressed", String(shown));
        onToggle(i, shown);
      });
      return { paint: () => { mark.style.color = color(run.color); }, say: (text) => { value.textContent = text; } };
    });
  }

  // Rows [x, y of run 0, y of run 1, ...] in the order of x.  An x that one run holds twice gets two rows.
  function align(runs) {
    const next = runs.map(() => 0), rows = [[], ...runs.map(() => [])];
    for (;;) {
      const x = Math.min(...runs.map((run, i) => (next[i] < run.x.length ? run.x[next[i]] : Infinity)));
      if (x === Infinity) return rows;
      rows[0].push(x);
      runs.forEach((run, i) => rows[i + 1].push(run.x[next[i]] === x ? run.y[next[i]++] : null));
    }
  }

  // A logarithmic axis is a linear one of exponents: ticks at powers, then at their parts, then evenly, as zoom grows.
  function logTicks(_, axis, low, high, step) {
    const ticks = [];
    if (step > (axis ? 0.6 : 0.4)) {
      const by = Math.ceil(step);
      for (let e = Math.ceil(low / by) * by; e <= high; e += by) ticks.push(e);
    } else if (step > 0.05) {
      const parts = step > 0.3 ? [1, 3] : step > 0.15 ? [1, 2, 5] : [1, 2, 3, 4, 6, 8];
      for (let e = Math.floor(low); e <= high; e++) ticks.push(...parts.map((part) => e + Math.log10(part)));
    } else {
      const from = 10 ** low, to = 10 ** high, rough = ((to - from) * step) / (high - low);
      const size = 10 ** Math.floor(Math.log10(rough)), by = size * [1, 2, 5, 10].find((k) => k * size >= rough);
      for (let k = Math.ceil(from / by); k * by <= to; k++) ticks.push(Math.log10(k * by));
    }
    return ticks.filter((tick) => tick >= low - 1e-9 && tick <= high + 1e-9);
  }
  function logLabels(ticks) {
    const powers = ticks.some((e) => e < -3 || e > 4);
    const label = (e) => number(Number((10 ** e).toPrecision(9)));
    return ticks.map((e) => (powers && Number.isInteger(e) && e !== 0 && e !== 1 ? power(e) : label(e)));
  }

  function lineChart(box, chart) {
    const toX = chart.log_x ? Math.log10 : (v) => v, toY = chart.log_y ? Math.log10 : (v) => v;
    const lines = chart.lines.map(([value, label]) => [toY(value), label]).filter(([y]) => Number.isFinite(y));
    const marks = chart.marks.map(([place, label]) => [toX(place), label]).filter(([x]) => Number.isFinite(x));
    const unit = window.devicePixelRatio;
    const head = element("div", box, { className: "axis" });
    element("span", head, { textContent: chart.y_label });
    const readout = element("output", head);
    const reset = element("button", head, { type: "button", textContent: "Whole range", hidden: true });
    const plot = element("div", box, { className: "plot", tabIndex: 0 });
    plot.setAttribute("role", "group");
    plot.setAttribute("aria-label", `${box.dataset.label} Left and right arrows read values.`);
    const keys = legend(box, chart.runs, seriesColor, chart.markers, (i, show) => { u.setSeries(i + 1, { show }); read(u); });
    const rows = align(chart.runs);
    const drawn = rows.map((row, i) => row.map((v) => (v === null ? null : i ? toY(v) : toX(v))));

    const xRange = (_, low, high) => {
      if (low == null) return [0, 1];
      const pad = low === high ? 0.5 : chart.markers ? 0.05 * (high - low) : 0;
      return [low - pad, high + pad];
    };
    const yRange = (_, low, high) => {
      const ends = lines.map(([value]) => value).concat(low == null ? [] : [low, high]);
      if (!ends.length) return [0, 1];
      const a = Math.min(...ends), b = Math.max(...ends), pad = 0.06 * (b - a) || 0.1 * Math.abs(b) || 1;
      return [a - (a === 0 ? 0.3 : 1) * pad, b + pad];
    };
    function drawLines(u) {
      const { ctx, bbox } = u;
      if (!lines.length && !marks.length) return;
      ctx.save();
      ctx.setLineDash([4 * unit, 3 * unit]);
      Object.assign(ctx, { font: `${11.5 * unit}px ${ink.sans}`, textAlign: "left", textBaseline: "alphabetic",
        strokeStyle: ink.muted, fillStyle: ink.muted, lineWidth: unit });
      const taken = []; // where points and labels are
      drawn.slice(1).forEach((row, i) => u.series[i + 1].show && row.forEach((v, k) => {
        if (v !== null) taken.push([u.valToPos(drawn[0][k], "x", true), u.valToPos(v, "y", true)]);
      }));
      for (const [value, label] of lines) {
        const y = u.valToPos(value, "y", true), gap = 5 * unit, room = bbox.width - 2 * gap;
        const wide = Math.min(room, ctx.measureText(label).width);
        if (y < bbox.top - 1 || y > bbox.top + bbox.height + 1) continue;
        ctx.beginPath();
        ctx.moveTo(bbox.left, y);
        ctx.lineTo(bbox.left + bbox.width, y);
        ctx.stroke();
        // Over or under the line, at its right or left end: where it covers least.
        const places = [bbox.left + bbox.width - wide - gap, bbox.left + gap]
          .flatMap((x) => [[x, y - gap], [x, y + 3 * gap]])
          .filter(([, base]) => base - 2 * gap > bbox.top && base < bbox.top + bbox.height);
        const covers = ([x, base]) =>
          taken.filter(([a, b]) => a > x - gap && a < x + wide + gap && b > base - 3 * gap && b < base + gap).length;
        if (!places.length) continue;
        const [x, base] = places.reduce((best, place) => (covers(place) < covers(best) ? place : best));
        for (let k = 0; k <= 20; k++) taken.push(...Array(9).fill([x + (k / 20) * wide, base - gap]));
        ctx.save(); // a halo, so that the label reads on top of lines
        ctx.setLineDash([]);
        Object.assign(ctx, { lineWidth: 4 * unit, lineJoin: "round", strokeStyle: ink.paper });
        ctx.strokeText(label, x, base, room);
        ctx.restore();
        ctx.fillText(label, x, base, room);
      }
      drawMarks(u);
      ctx.restore();
    }
    function drawMarks(u) { // upright, with the label along the line, below its upper end
      const { ctx, bbox } = u;
      ctx.setLineDash([unit, 3 * unit]);
      for (const [place, label] of marks) {
        const x = u.valToPos(place, "x", true), gap = 4 * unit;
        if (x < bbox.left - 1 || x > bbox.left + bbox.width + 1) continue;
        ctx.beginPath();
        ctx.moveTo(x, bbox.top);
        ctx.lineTo(x, bbox.top + bbox.height);
        ctx.stroke();
        ctx.save();
        ctx.translate(x - gap, bbox.top + gap);
        ctx.rotate(-Math.PI / 2);
        ctx.setLineDash([]);
        Object.assign(ctx, { textAlign: "right", lineWidth: 4 * unit, lineJoin: "round", strokeStyle: ink.paper });
        ctx.strokeText(label, 0, 0, bbox.height - 2 * gap);
        ctx.fillText(label, 0, 0, bbox.height - 2 * gap);
        ctx.restore();
      }
    }
    function svg() {
      const d = new Drawing(u.width, u.height + 8), { left, top, width, height } = u.bbox;
      const [l, t, w, h] = [left, top, width, height].map((v) => v / unit);
      const at = (value, axis) => u.valToPos(value, axis) + (axis === "x" ? l : t);
      Object.assign(d, { strokeStyle: ink.rule, fillStyle: ink.muted });
      u.axes.forEach((axis, i) => (axis._splits || []).forEach((value, k) => {
        const place = at(value, "xy"[i]), label = axis._values[k] ?? "";
        if (i) { d.line(l, place, l + w, place); d.text(l - 6, place + 4, label, { "text-anchor": "end" }); }
        else { d.line(place, t, place, t + h); d.text(place, t + h + 17, label, { "text-anchor": "middle" }); }
      }));
      d.text(l + w / 2, t + h + 36, chart.x_label, { "text-anchor": "middle" });
      d.text(l, t - 3, chart.y_label);
      Object.assign(d, { strokeStyle: ink.muted, dash: [4, 3] });
      for (const [value, label] of lines) {
        d.line(l, at(value, "y"), l + w, at(value, "y"));
        d.text(l + w - 4, at(value, "y") - 4, label, { "text-anchor": "end" });
      }
      d.dash = [1, 3];
      for (const [place, label] of marks) {
        const x = at(place, "x");
        d.line(x, t, x, t + h);
        d.text(x - 4, t + 4, label, { "text-anchor": "end", transform: `rotate(-90 ${x - 4} ${t + 4})` });
      }
      const seen = chart.runs.filter((_, i) => u.series[i + 1].show);
      chart.runs.forEach((run, i) => {
        if (!u.series[i + 1].show) return;
        const points = run.x.map((x, k) => [at(toX(x), "x"), at(toY(run.y[k]), "y")]);
        Object.assign(d, { strokeStyle: seriesColor(run.color), fillStyle: seriesColor(run.color), lineWidth: 1.75,
          dash: dashes[Math.floor(run.color / ink.series.length) % 3] || [] });
        d.beginPath();
        const dots = chart.markers || points.length === 1;
        points.forEach(([x, y], k) => (dots ? d.arc(x, y, 3.5) : k ? d.lineTo(x, y) : d.moveTo(x, y)));
        if (dots) d.fill(); else d.stroke();
      });
      return d.file(chart.title, seen, seriesColor);
    }
    function read(u) {
      const { idx, idxs } = u.cursor;
      readout.textContent = idx == null ? "" : `${chart.x_label.split(" = ")[0]} = ${number(rows[0][idx])}`;
      keys.forEach((key, i) => {
        const known = idx != null && idxs[i + 1] != null && u.series[i + 1].show;
        key.say(known ? number(rows[i + 1][idxs[i + 1]]) : "");
      });
    }
    const width = (u, values, i, cycle) => {
      if (cycle > 1) return u.axes[i]._size;
      u.ctx.font = u.axes[i].font[0];
      return Math.ceil(Math.max(0, ...(values || []).map((v) => u.ctx.measureText(v ?? "").width)) / unit) + 14;
    };
    const axis = (log, more) => ({
      stroke: () => ink.muted, font: `12px ${ink.sans}`,
      grid: { stroke: () => ink.rule, width: 1 }, ticks: { show: false },
      values: (_, ticks) => (log ? logLabels(ticks) : ticks.map(number)), ...(log ? { splits: logTicks } : {}), ...more,
    });
    const size = () => {
      const wide = Math.max(200, Math.floor(plot.clientWidth));
      return { width: wide, height: Math.round(Math.min(340, Math.max(230, wide * 0.56))) };
    };
    const u = new uPlot({
      ...size(),
      padding: [10, 24, 0, 0],
      legend: { show: false },
      cursor: { y: false, drag: { x: true, y: true, uni: 24 }, points: { size: 8, width: 2 },
        hover: { skip: [null, undefined], prox: 50 } },
      scales: { x: { time: false, range: xRange }, y: { range: yRange } },
      axes: [
        axis(chart.log_x, { label: chart.x_label, labelFont: `13px ${ink.sans}`, labelSize: 22, size: 28, space: 60 }),
        axis(chart.log_y, { size: width, space: 36 }),
      ],
      series: [{}, ...chart.runs.map((run) => ({
        label: run.name, stroke: () => seriesColor(run.color), width: 1.75, spanGaps: true,
        dash: dashes[Math.floor(run.color / ink.series.length) % 3],
        points: { show: chart.markers || run.x.length === 1, size: 7, fill: () => seriesColor(run.color) },
        ...(chart.markers ? { paths: () => null } : {}),
      }))],
      hooks: { draw: [drawLines], setCursor: [read], setSelect: [({ select }) => { reset.hidden = !select.width; }] },
    }, drawn, plot);
    const whole = () => { u.setData(drawn, true); reset.hidden = true; };
    reset.addEventListener("click", () => { whole(); plot.focus(); });
    u.over.addEventListener("dblclick", whole);
    plot.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") whole();
      if (!step) return;
      event.preventDefault();
      const last = drawn[0].length - 1, from = u.cursor.idx ?? (step > 0 ? -1 : last + 1);
      const x = drawn[0][Math.max(0, Math.min(last, from + step))];
      u.setCursor({ left: u.valToPos(x, "x"), top: u.over.clientHeight / 2 });
    });
    downloads(box, svg, () => table(chart.runs, [chart.x_label, chart.y_label]));
    drawings.push({
      redraw: () => { keys.forEach((key) => key.paint()); u.redraw(false); },
      resize: () => { const now = size(); if (now.width !== u.width) u.setSize(now); },
    });
  }

  // Colour at t in [0, 1] along the ramp of the theme.
  function ramp(t) {
    const stops = ink.ramp.map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
    const place = Math.max(0, Math.min(1, t)) * (stops.length - 1), i = Math.min(Math.floor(place), stops.length - 2);
    return `rgb(${stops[i].map((c, k) => Math.round(c + (place - i) * (stops[i + 1][k] - c))).join(",")})`;
  }

  function sphereChart(box, chart) {
    const canvas = element("canvas", box, { className: "sphere", tabIndex: 0 });
    canvas.setAttribute("role", "application");
    canvas.setAttribute("aria-label", `${box.dataset.label} Arrows turn the sphere, plus and minus zoom, Home resets.`);
    const tools = element("div", box, { className: "tools" }), bar = element("div", tools, { className: "bar" });
    const shown = chart.runs.map(() => true);
    const values = chart.curve.v || [], low = Math.min(...values), high = Math.max(...values);
    const log = low > 0 && high > 20 * low, scale = log ? Math.log : (v) => v;
    const level = (v) => (high > low ? (scale(v) - scale(low)) / (scale(high) - scale(low)) : 0.5);
    bar.hidden = !values.length;
    element("span", bar, { textContent: chart.curve.label + (log ? ", log" : "") });
    const between = element("span", bar), colors = element("i", between);
    between.replaceChildren(number(low), colors, number(high));
    const keys = legend(box, chart.runs, pathColor, false, (i, show) => { shown[i] = show; draw(); });

    const home = { azimuth: chart.view[0], elevation: chart.view[1], zoom: 1 }, view = { ...home };
    // The point that stays in the middle as the zoom grows: the middle of the paths.
    const all = chart.runs.length ? chart.runs : [chart.curve];
    const mean = (list) => list.reduce((a, b) => a + b, 0) / list.length;
    const focus = ["x", "y", "z"].map((axis) => mean(all.map((run) => mean(run[axis]))));

    function draw() {
      const unit = window.devicePixelRatio, width = canvas.clientWidth, height = canvas.clientHeight;
      if (!width) return;
      Object.assign(canvas, { width: Math.round(width * unit), height: Math.round(height * unit) });
      const ctx = canvas.getContext("2d");
      ctx.setTransform(unit, 0, 0, unit, 0, 0);
      ctx.lineJoin = "round";
      drawOn(ctx, width, height);
    }
    function drawOn(ctx, width, height) {
      const [ca, sa] = [Math.cos(view.azimuth), Math.sin(view.azimuth)];
      const [ce, se] = [Math.cos(view.elevation), Math.sin(view.elevation)];
      const turn = ([x, y, z]) => [ca * y - sa * x, ce * z - se * (ca * x + sa * y), ce * (ca * x + sa * y) + se * z];
      const r = (Math.min(width, height) / 2 - 12) * view.zoom;
      const [fx, fy] = turn(focus).map((v) => v * (1 - 1 / view.zoom));
      const toScreen = ([a, b, depth]) => [width / 2 + r * (a - fx), height / 2 - r * (b - fy), depth];
      const place = (run) => run.x.map((x, i) => toScreen(turn([x, run.y[i], run.z[i]])));
      // The segments of one side; a new stroke wherever the colour changes.
      const stroke = (points, front, color, size) => {
        ctx.lineWidth = size;
        let last = null, open = false;
        for (let i = 1; i < points.length; i++) {
          const [a, b] = [points[i - 1], points[i]], seen = (a[2] + b[2] >= 0) === front, now = color(i);
          if (open && (!seen || now !== last)) { ctx.stroke(); open = false; }
          if (!seen) continue;
          if (!open) { ctx.strokeStyle = last = now; ctx.beginPath(); ctx.moveTo(a[0], a[1]); open = true; }
          ctx.lineTo(b[0], b[1]);
        }
        if (open) ctx.stroke();
      };
      const grid = chart.grid.map(place), curve = place(chart.curve), runs = chart.runs.map(place);
      const hue = values.map((v, i) => ramp(Math.round(48 * level(i ? (v + values[i - 1]) / 2 : v)) / 48));
      const [cx, cy] = toScreen([0, 0, 0]);
      ctx.fillStyle = ink.panel;
      ctx.strokeStyle = ink.rule;
      ctx.beginPath();
      ctx.arc(cx, cy, r, 0, 2 * Math.PI);
      ctx.fill();
      ctx.stroke();
      for (const front of [false, true]) {
        ctx.lineCap = front ? "round" : "butt"; // round ends would show where faint strokes meet
        ctx.globalAlpha = front ? 1 : 0.4;
        grid.forEach((points) => stroke(points, front, () => ink.rule, 1));
        ctx.globalAlpha = front ? 1 : 0.28;
        stroke(curve, front, (i) => hue[i], front ? 6 : 4);
        runs.forEach((points, i) => {
          if (!shown[i]) return;
          const color = pathColor(chart.runs[i].color), [x, y, depth] = points[points.length - 1];
          stroke(points, front, () => color, points.length > 500 ? 0.8 : 1.8);
          if (depth >= 0 !== front) return;
          ctx.fillStyle = color;
          ctx.beginPath();
          ctx.arc(x, y, 4, 0, 2 * Math.PI);
          ctx.fill();
        });
      }
    }
    const svg = () => {
      const d = new Drawing(canvas.clientWidth || 480, canvas.clientHeight || 416);
      drawOn(d, d.width, d.height);
      return d.file(chart.title, chart.runs.filter((_, i) => shown[i]), pathColor);
    };
    downloads(box, svg, () => table([{ name: "curve", ...chart.curve }, ...chart.runs], ["x", "y", "z", chart.curve.label]));
    const move = (right, up, zoom = 1) => {
      view.azimuth -= right / view.zoom;
      view.elevation = Math.max(-1.57, Math.min(1.57, view.elevation + up / view.zoom));
      view.zoom = Math.max(1, Math.min(40, view.zoom * zoom));
      draw();
    };
    const reset = () => { Object.assign(view, home); draw(); };
    const moves = { ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1],
      "+": [0, 0, 1.5], "=": [0, 0, 1.5], "-": [0, 0, 1 / 1.5] };
    canvas.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || !(event.key in moves || event.key === "Home")) return;
      event.preventDefault();
      if (event.key === "Home") reset(); else move(...moves[event.key]);
    });
    canvas.addEventListener("pointerdown", (event) => canvas.setPointerCapture(event.pointerId));
    canvas.addEventListener("pointermove", (event) => {
      if (canvas.hasPointerCapture(event.pointerId)) move(event.movementX / 150, event.movementY / 150);
    });
    canvas.addEventListener("dblclick", reset);
    const buttons = element("span", tools);
    const button = (name, label, act) =>
      element("button", buttons, { type: "button", textContent: name, title: label, ariaLabel: label, onclick: act });
    button("−", "Zoom out", () => move(0, 0, 1 / 1.5));
    button("+", "Zoom in", () => move(0, 0, 1.5));
    button("Reset", "Reset the view", reset);
    const paintBar = () => { colors.style.background = `linear-gradient(90deg, ${ink.ramp})`; };
    drawings.push({ redraw: () => { paintBar(); keys.forEach((key) => key.paint()); draw(); }, resize: draw });
  }

  // A link to something that is folded away unfolds it.
  function reveal() {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target) return;
    for (let part = target.closest("details"); part; part = part.parentElement.closest("details")) part.open = true;
    target.scrollIntoView();
  }
  addEventListener("hashchange", reveal);
  addEventListener("keydown", (event) => {
    if (event.key === "Escape" && document.activeElement.matches(".term")) document.activeElement.blur();
  });

  readInk();
  for (const box of document.querySelectorAll("[data-chart]")) {
    const chart = data[box.dataset.chart];
    (chart.grid ? sphereChart : lineChart)(box, chart);
  }
  const redraw = () => { readInk(); drawings.forEach((drawing) => drawing.redraw()); };
  const resize = () => drawings.forEach((drawing) => drawing.resize());
  redraw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  new ResizeObserver(resize).observe(document.body);
  addEventListener("toggle", resize, true); // what was folded away had no width
  if (location.hash) reveal();

  // On paper: light colours, a fixed width, everything unfolded; afterwards as before.
  let folded = [];
  function forPaper(on) {
    if (root.classList.contains("printing") === on) return;
    root.classList.toggle("printing", on);
    if (on) folded = [...document.querySelectorAll("details:not([open])")];
    for (const details of folded) details.open = on;
    resize();
    redraw();
  }
  addEventListener("beforeprint", () => forPaper(true));
  addEventListener("afterprint", () => forPaper(false));
})();
