"use strict";
// Sorts the tables and switches the colour scheme; the page is complete without it.

// Sorts within each ratio; rows without a value stay at the end. The fragment holds the order, so that a
// sorted page can be linked to: #sort=KEY:DIRECTION, with the column's key and 1 (up) or -1 (down).
function sort(table, key, direction) {
  const heads = [...table.tHead.rows[0].cells];
  const column = heads.findIndex((head) => head.dataset.key === key);
  if (column < 0) return;
  heads.forEach((head) => head.removeAttribute("aria-sort"));
  heads[column].setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
  const value = (row) => {
    if (row.classList.contains("failure")) return NaN;
    const cell = row.cells[column];
    return cell.tagName === "TH" ? cell.textContent : parseFloat(cell.dataset.v);
  };
  const hasValue = (v) => typeof v === "string" || !Number.isNaN(v);
  for (const body of table.tBodies) {
    const [group, ...rows] = body.rows;
    rows.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (!hasValue(x) || !hasValue(y)) return hasValue(y) - hasValue(x);
      return direction * (typeof x === "string" ? x.localeCompare(String(y)) : x - y);
    });
    body.append(group, ...rows);
  }
}

const tables = document.querySelectorAll("table.results");

function sortByFragment() {
  const match = /^#sort=(.+):(-?1)$/.exec(decodeURIComponent(location.hash));
  if (match) tables.forEach((table) => sort(table, match[1], Number(match[2])));
}

for (const table of tables) {
  for (const head of table.tHead.rows[0].cells) {
    head.querySelector("button").addEventListener("click", () => {
      const order = head.getAttribute("aria-sort");
      // Best first; a second click reverses the order.
      const first = head.dataset.better === "1" ? -1 : 1;
      const direction = order === null ? first : order === "ascending" ? -1 : 1;
      location.replace(`#sort=${encodeURIComponent(head.dataset.key)}:${direction}`);
    });
  }
}
addEventListener("hashchange", sortByFragment);
sortByFragment();

const button = document.getElementById("scheme");
button.hidden = false;
button.addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.scheme
    ? root.dataset.scheme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.scheme = dark ? "light" : "dark";
});
