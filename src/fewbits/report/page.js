"use strict";
(() => {
  const select = document.getElementById("candidate");
  const parts = [...document.querySelectorAll(".candidate")];
  const show = (id) => parts.forEach((part) => { part.hidden = part.id !== id; });
  select.addEventListener("change", () => show(select.value));
  if (parts.length) show(select.value);

  const cells = JSON.parse(document.getElementById("cells").textContent);
  for (const map of document.querySelectorAll("svg.map")) {
    const part = map.closest(".candidate");
    const rows = cells[part.dataset.label];
    const told = part.querySelector(".told");
    const [cell, left, row] = ["cell", "left", "row"].map((key) => Number(map.dataset[key]));
    const point = (event) => {
      const box = map.getBoundingClientRect();
      const scale = map.viewBox.baseVal.width / box.width;
      const found = rows[Math.floor(((event.clientY - box.top) * scale) / row)];
      const layer = Math.floor(((event.clientX - box.left) * scale - left) / cell);
      if (!found || layer < 0) return;
      const item = found[1].find((entry) => entry[0] === layer || entry[0] < 0);
      if (!item) return;
      const where = item[0] < 0 ? found[0] : `layer ${layer}, ${found[0]}`;
      told.textContent = `${where}: ${item[1]}` + (item[2] === "–" ? "" : `, relative error ${item[2]}`)
        + (item[3] === "–" ? "" : `, expected loss ${item[3]} nats`);
    };
    map.addEventListener("pointermove", point);
    map.addEventListener("pointerdown", point);
  }
})();
