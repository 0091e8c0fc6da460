"use strict";
// The ranked table's filters and sorting, and the records that are shown when asked for. No library, no network.
(() => {
  const table = document.getElementById("ranked");
  const records = JSON.parse(document.getElementById("records").textContent);
  if (!table) return;
  const body = table.tBodies[0];
  const filters = [...document.querySelectorAll(".filters [data-axis]")];
  const search = document.getElementById("search");

  // What would turn the direction of writing or act otherwise is spelled, as in the rest of the page.
  const acting = /[\u007f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g;
  const spelled = (text) => text.replace(acting, (one) => "\\u" + one.charCodeAt(0).toString(16).padStart(4, "0"));

  function apply() {
    const shown = new Set();
    for (const row of body.rows) {
      const kept = filters.every((filter) => {
        const cell = row.querySelector(`td[data-axis="${CSS.escape(filter.dataset.axis)}"]`);
        return filter.value === "" || (cell && "=" + cell.textContent === filter.value);
      });
      const found = row.textContent.toLowerCase().includes(search.value.trim().toLowerCase());
      row.hidden = !(kept && found);
      if (!row.hidden) shown.add(row.dataset.run);
    }
    for (const element of document.querySelectorAll("[data-run]")) {
      if (element.tagName !== "TR") element.toggleAttribute("hidden", !shown.has(element.dataset.run));
    }
    document.getElementById("count").textContent = `${shown.size} of ${body.rows.length} runs`;
  }

  // The reason of a run without figures spans their columns, and is the last cell of its row.
  const valueOf = (row, column) => row.cells[column]?.dataset.value ?? "";

  function compare(a, b, column, direction) {
    const [x, y] = [valueOf(a, column), valueOf(b, column)];
    // What was not measured stays last, whichever way the column is sorted.
    if (x === "" || y === "") return (x === "") - (y === "");
    const [p, q] = [Number(x), Number(y)];
    const order = Number.isNaN(p) || Number.isNaN(q) ? x.localeCompare(y, "en", { numeric: true }) : p - q;
    return direction * order;
  }

  function sortBy(header) {
    const column = header.cellIndex;
    const first = header.classList.contains("number") && column > 0 ? "descending" : "ascending";
    const other = first === "ascending" ? "descending" : "ascending";
    const wanted = header.getAttribute("aria-sort") === first ? other : first;
    for (const one of table.tHead.rows[0].cells) one.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", wanted);
    const direction = wanted === "ascending" ? 1 : -1;
    const rows = [...body.rows].sort((a, b) => compare(a, b, column, direction));
    body.append(...rows);
  }

  for (const header of table.tHead.rows[0].cells) {
    header.querySelector("button").addEventListener("click", () => sortBy(header));
  }
  for (const filter of filters) filter.addEventListener("change", apply);
  search.addEventListener("input", apply);
  const all = document.getElementById("all-columns");
  all?.addEventListener("change", () => table.classList.toggle("all", all.checked));
  for (const details of document.querySelectorAll("details[data-record]")) {
    details.addEventListener("toggle", () => {
      const target = details.querySelector("pre");
      if (!target.textContent) target.textContent = spelled(JSON.stringify(records[Number(details.dataset.record)], null, 1));
    });
  }
  apply();
})();
