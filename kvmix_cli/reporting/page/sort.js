// A click on the head of a column sorts the table by it; a second click turns the order round. Empty cells stay last.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows].pop().cells;
  const keyOf = (row, column) => row.cells[column].dataset.sort ?? "";
  const compare = (one, other) => {
    if (one === "" || other === "") return 0;
    const difference = Number(one) - Number(other);
    return Number.isNaN(difference) ? one.localeCompare(other) : difference;
  };
  const sortBy = (head, column) => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const each of heads) each.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const rows = [...table.tBodies[0].rows];
    rows.sort((one, other) => {
      const [a, b] = [keyOf(one, column), keyOf(other, column)];
      return (a === "") - (b === "") || sign * compare(a, b);
    });
    table.tBodies[0].append(...rows);
  };
  [...heads].forEach((head, column) => {
    head.setAttribute("aria-sort", "none");
    head.tabIndex = 0;
    head.addEventListener("click", () => sortBy(head, column));
    head.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); sortBy(head, column); }
    });
  });
}
