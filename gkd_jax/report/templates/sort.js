for (const head of document.querySelectorAll("table.sortable th")) {
  head.addEventListener("click", () => {
    const body = head.closest("table").tBodies[0], place = head.cellIndex;
    const value = (row) => row.cells[place].dataset.value ?? row.cells[place].textContent.trim();
    const up = head.getAttribute("aria-sort") === "descending";
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const compare = (a, b) => (value(a) === "") - (value(b) === "") ||
      (up ? 1 : -1) * value(a).localeCompare(value(b), "en", { numeric: true });
    const numbers = (a, b) => (value(a) === "") - (value(b) === "") || (up ? 1 : -1) * (value(a) - value(b));
    const numeric = [...body.rows].every((row) => !isNaN(value(row)));
    body.append(...[...body.rows].sort(numeric ? numbers : compare));
  });
}
