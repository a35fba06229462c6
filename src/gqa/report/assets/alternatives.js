// The charts that follow the dial: shows what alternatives.py made ready. It computes no figure.
"use strict";
document.addEventListener("dial", ({ detail: { view, index, chosen } }) => {
  if (!view.heat) return;
  const choice = `${chosen.device}|${chosen.dtype}`;
  const key = `${choice}|${chosen.context}`;
  const contexts = [...document.getElementById("context").options].map((option) => option.value);

  document.getElementById("heat-device").textContent = chosen.device;
  document.querySelectorAll(".heat tbody tr").forEach((row, stop) => {
    row.classList.toggle("here", stop === index);
    row.querySelectorAll("td").forEach((cell, column) => {
      const [text, level] = view.heat[chosen.dtype][stop][column];
      const fits = view.fits[choice][stop][column];
      cell.textContent = text;
      cell.className = `level${level}${fits === false ? " over" : ""}${contexts[column] === chosen.context ? " column" : ""}`;
      cell.title = fits === false ? `does not fit on ${chosen.device}` : "";
      if (fits === false) cell.setAttribute("aria-label", `${text}, does not fit`);
      else cell.removeAttribute("aria-label");
    });
  });

  const label = document.getElementById("work-context");
  if (label) label.textContent = document.getElementById("context").selectedOptions[0].textContent;
  document.querySelectorAll(".flops").forEach((bar) => {
    const { shares, text } = view.work[chosen.context][Number(bar.dataset.stop)][bar.dataset.step];
    bar.classList.toggle("here", Number(bar.dataset.stop) === index);
    bar.querySelectorAll(".track i").forEach((part, k) => { part.style.width = `${100 * shares[k]}%`; });
    bar.querySelector(".what").textContent = text;
  });

  const roof = document.getElementById("roof");
  if (roof) drawRoof(roof, view, index, chosen.device, key);
  document.querySelectorAll("#roof-table tbody tr").forEach((row, stop) => {
    const values = view.stops[stop].by[key], cells = row.querySelectorAll("td");
    row.classList.toggle("here", stop === index);
    cells[0].textContent = values.bound;
    cells[1].textContent = values.bound_note;
  });
});

function drawRoof(roof, view, index, device, key) {
  const width = Math.max(300, roof.parentElement.clientWidth), height = 300;
  const left = 92, right = 16, top = 14, bottom = 48;
  const x = (share) => left + share * (width - left - right);
  const y = (share) => height - bottom - share * (height - top - bottom);
  const add = (name, attributes, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [attribute, value] of Object.entries(attributes)) element.setAttribute(attribute, value);
    if (text !== undefined) element.textContent = text;
    roof.append(element);
  };
  roof.replaceChildren();
  roof.setAttribute("viewBox", `0 0 ${width} ${height}`);
  roof.setAttribute("aria-label", `Roofline of ${device}: ` + view.stops.map((stop) =>
    `${stop.text}: ${stop.by[key].bound}, ${stop.by[key].bound_note}`).join("; "));
  for (const [share, text] of view.axes.x) {
    add("line", { x1: x(share), x2: x(share), y1: y(0), y2: y(1), class: "grid" });
    add("text", { x: x(share), y: y(0) + 18, class: "tick middle" }, text);
  }
  for (const [share, text] of view.axes.y) {
    add("line", { x1: x(0), x2: x(1), y1: y(share), y2: y(share), class: "grid" });
    add("text", { x: x(0) - 8, y: y(share) + 4, class: "tick end" }, text);
  }
  add("text", { x: x(0.5), y: height - 8, class: "tick middle" }, "FLOPs per byte moved");
  add("path", { d: view.roofs[device].map(([a, b], k) => `${k ? "L" : "M"}${x(a)},${y(b)}`).join(""), class: "roof" });
  view.stops.forEach((stop, k) => {
    const [a, b] = stop.by[key].roof;
    add("circle", { cx: x(a), cy: y(b), r: k === index ? 8 : 5, fill: `var(--kv${k})`, class: k === index ? "here" : "" });
  });
  const [a, b] = view.stops[index].by[key].roof;
  const beyond = x(a) > width - 150;
  add("text", { x: x(a) + (beyond ? -13 : 13), y: y(b) + (beyond ? -12 : 18), class: `tick ${beyond ? "end" : ""} here` },
    `${view.stops[index].kv_heads} KV heads: ${view.stops[index].by[key].bound}`);
}
