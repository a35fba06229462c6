// The dial: shows one stop at a time of what page.py worked out from the record. It computes no figure.
"use strict";
(() => {
  const view = JSON.parse(document.getElementById("dial-data").textContent);
  const dial = document.querySelector(".dial");
  const slider = document.getElementById("kv-heads");
  const layer = document.getElementById("layer");
  const choices = [...dial.querySelectorAll("select[data-choice]")]; // device, dtype, context: what a page lets choose
  const picture = document.querySelector(".picture svg");
  const calm = matchMedia("(prefers-reduced-motion: reduce)");
  let ends = null; // where each query head's line ends now, for the move to the next picture
  let motion = 0;

  const svg = (name, attributes, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    return element;
  };

  // Neighbouring groups differ in hue; the lines and labels carry the meaning, the hue only helps the eye.
  const hue = (group, groups) =>
    `oklch(var(--group-light) var(--group-chroma) ${(250 + (360 * (group % 8)) / Math.min(groups, 8)) % 360})`;

  function draw(stop, reads, animate) {
    const width = picture.clientWidth;
    const queries = reads.length;
    const top = 20, bottom = 150;
    const at = (index, count) => ((index + 0.5) * width) / count;
    const targets = reads.map((group) => at(group, stop.kv_heads));
    const from = animate && !calm.matches && ends ? ends : targets;
    const radius = Math.max(2, Math.min(14, (width / queries) * 0.38));
    const half = Math.max(3, Math.min(26, (width / stop.kv_heads) * 0.4));

    picture.setAttribute("viewBox", `0 0 ${width} 176`);
    picture.replaceChildren();
    const lines = reads.map((group, query) => {
      const line = svg("path", { fill: "none", stroke: hue(group, stop.kv_heads), "stroke-width": queries > 32 ? 1.2 : 2.2 });
      picture.append(line);
      return line;
    });
    reads.forEach((group, query) => {
      const x = at(query, queries);
      picture.append(svg("circle", { cx: x, cy: top, r: radius, fill: hue(group, stop.kv_heads) }));
      if (radius > 9) picture.append(svg("text", { x, y: top }, query));
    });
    for (let group = 0; group < stop.kv_heads; group++) {
      const x = at(group, stop.kv_heads);
      picture.append(svg("rect", { x: x - half, y: bottom - 14, width: 2 * half, height: 28, rx: Math.min(6, half), fill: hue(group, stop.kv_heads) }));
      if (half > 15) {
        picture.append(svg("text", { x: x - half / 2, y: bottom }, "K"), svg("text", { x: x + half / 2, y: bottom }, "V"));
        picture.append(svg("line", { x1: x, x2: x, y1: bottom - 14, y2: bottom + 14, stroke: "var(--card)", "stroke-width": 1.5 }));
      }
    }

    cancelAnimationFrame(motion);
    const started = performance.now();
    const place = (now) => {
      const done = from === targets ? 1 : Math.min(1, (now - started) / 240);
      const eased = 1 - (1 - done) ** 3;
      ends = targets.map((target, query) => from[query] + (target - from[query]) * eased);
      lines.forEach((line, query) => {
        const x = at(query, queries), y0 = top + radius, y1 = bottom - 14, middle = (y0 + y1) / 2;
        line.setAttribute("d", `M${x},${y0}C${x},${middle} ${ends[query]},${middle} ${ends[query]},${y1}`);
      });
      if (done < 1) motion = requestAnimationFrame(place);
    };
    place(started);
  }

  function show(animate) {
    const index = Number(slider.value);
    const stop = view.stops[index];
    const found = layer && stop.layers[layer.value];
    const reads = found || stop.reads;
    const values = { ...stop, ...(stop.by[choices.map((choice) => choice.value).join("|")] ?? {}) };

    for (const element of dial.querySelectorAll("[data-field]")) {
      const value = values[element.dataset.field];
      element.textContent = value ?? view.gap;
      element.classList.toggle("gap", element.textContent === view.gap);
    }
    for (const bar of dial.querySelectorAll("[data-share]")) {
      const share = values[bar.dataset.share];
      bar.hidden = share === null || share === undefined;
      bar.style.setProperty("--share", share ?? 0);
    }
    slider.setAttribute("aria-valuetext", stop.text);
    dial.querySelectorAll(".stops span").forEach((label, k) => label.classList.toggle("here", k === index));
    document.querySelectorAll("#settings tbody tr").forEach((row, k) => row.classList.toggle("here", k === index));
    document.getElementById("grouping").textContent = found ? stop.found : stop.plain;
    const groups = Array.from({ length: stop.kv_heads }, (_, group) =>
      `KV head ${group} is read by query heads ${reads.flatMap((g, query) => (g === group ? [query] : [])).join(", ")}`);
    picture.setAttribute("aria-label", groups.join("; "));
    draw(stop, reads, animate);
    const chosen = Object.fromEntries(choices.map((choice) => [choice.id, choice.value]));
    document.dispatchEvent(new CustomEvent("dial", { detail: { view, index, chosen } }));
  }

  function remember() {
    const state = new URLSearchParams({ kv: view.stops[slider.value].kv_heads });
    if (layer && layer.value) state.set("layer", layer.value);
    for (const choice of choices) state.set(choice.id, choice.value);
    location.replace(`#${state}`);
  }

  function recall() {
    const state = new URLSearchParams(location.hash.slice(1));
    const index = view.stops.findIndex((stop) => String(stop.kv_heads) === state.get("kv"));
    if (index >= 0) slider.value = index;
    for (const select of [layer, ...choices]) {
      const wanted = select && state.get(select.id);
      if (select && [...select.options].some((option) => option.value === wanted)) select.value = wanted;
    }
  }

  const turned = () => { show(true); remember(); };
  slider.addEventListener("input", turned);
  layer?.addEventListener("change", turned);
  for (const choice of choices) choice.addEventListener("change", turned);
  dial.querySelectorAll(".stops span").forEach((label, k) =>
    label.addEventListener("click", () => { slider.value = k; turned(); }));
  addEventListener("hashchange", () => { recall(); show(false); });
  new ResizeObserver(() => show(false)).observe(picture.parentElement);

  dial.hidden = false;
  recall();
  show(false);
})();
