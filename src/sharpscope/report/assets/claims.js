"use strict";
(() => {
  const by = (name) => document.getElementById(`claim-${name}`);
  const parts = [...document.querySelectorAll("#claims details.part")];
  const opened = parts.map((part) => part.open);
  function show() {
    const state = by("state").value, kind = by("kind").value, some = state || kind;
    let count = 0;
    parts.forEach((part, i) => {
      let here = 0;
      for (const row of part.querySelectorAll("tbody tr")) {
        const fits = state === "aside" ? row.classList.contains("aside")
          : !state || (row.classList.contains(state) && !row.classList.contains("aside"));
        row.hidden = !fits || (kind && row.dataset.kind !== kind);
        here += !row.hidden;
      }
      part.hidden = !here;
      part.open = some ? here > 0 : opened[i];
      count += here;
    });
    by("count").textContent = some ? `${count} claim${count === 1 ? "" : "s"}` : "";
  }
  by("filters").hidden = false;
  by("state").addEventListener("change", show);
  by("kind").addEventListener("change", show);
})();
