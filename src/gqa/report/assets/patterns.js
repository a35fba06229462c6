// What the heads look at: draws the record's maps of one model and layer. It computes no figure.
"use strict";
(() => {
  const frame = document.querySelector(".looks");
  if (!frame) return;
  const { attention_text: text, attention_maps: maps, attention_heads: figures = [] } =
    JSON.parse(document.getElementById("record").textContent).results;
  const tokens = text.tokens, levels = text.alphabet.length - 1;
  const [model, layer, asks] = ["looks-model", "looks-layer", "looks-token"].map((id) => document.getElementById(id));
  const told = document.getElementById("looks-told");
  let shown = null; // the row of maps on show
  let top = 1;      // the share that is drawn darkest: the most in this layer, without the first tokens, who see few
  let stop = null;  // of the dial
  let at = { head: 0, t: Number(asks.value), s: null };

  const make = (name, properties, ...children) => {
    const element = Object.assign(document.createElement(name), properties);
    element.append(...children);
    return element;
  };
  const share = (head, t, s) => (text.alphabet.indexOf(shown.maps[head][(t * (t + 1)) / 2 + s]) / levels) ** 2;
  const tint = (p) => Math.min(1, Math.sqrt(p / top));
  const percent = (p, digits = 1) => `${p < 0.0995 ? Number((100 * p).toPrecision(digits)) : Math.round(100 * p)} %`;
  const word = (t) => `“${/\S/.test(tokens[t]) ? tokens[t].trim() : tokens[t].replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣")}”`;
  const most = (head, t) => {
    const seen = Array.from({ length: t + 1 }, (_, s) => [share(head, t, s), s]);
    return seen.sort((a, b) => b[0] - a[0]);
  };
  const hue = (group, groups) =>
    `oklch(var(--group-light) var(--group-chroma) ${(250 + (360 * (group % 8)) / Math.min(groups, 8)) % 360})`;
  const mine = (rows) => rows.find((row) => `${row.weights}|${row.kv_heads}` === model.value && String(row.layer) === layer.value);

  function paint(canvas, head) {
    const brush = canvas.getContext("2d");
    brush.clearRect(0, 0, tokens.length, tokens.length);
    brush.fillStyle = getComputedStyle(canvas).color;
    for (let t = 0; t < tokens.length; t++) {
      for (let s = 0; s <= t; s++) {
        brush.globalAlpha = tint(share(head, t, s));
        brush.fillRect(s, t, 1, 1);
      }
    }
  }

  function draw() {
    shown = mine(maps);
    if (!shown) return;
    const heads = shown.maps.length, shared = heads / shown.kv_heads;
    const of = mine(figures);
    const level = Math.max(...shown.maps.flatMap((map) => [...map.slice(10)].map((one) => text.alphabet.indexOf(one))));
    top = (Math.max(1, level) / levels) ** 2;
    document.getElementById("looks-top").textContent = percent(top, 2);
    const groups = Array.from({ length: shown.kv_heads }, (_, group) => {
      const drawn = Array.from({ length: shared }, (_, k) => {
        const head = group * shared + k;
        const canvas = make("canvas", { width: tokens.length, height: tokens.length });
        canvas.setAttribute("aria-hidden", "true");
        const button = make("button", { type: "button", className: "map" }, canvas, make("i", {}), make("span", { className: "most" }));
        button.dataset.head = head;
        const place = ({ offsetX, offsetY }) => {
          const t = Math.min(tokens.length - 1, Math.max(0, Math.floor((offsetY / canvas.clientHeight) * tokens.length)));
          const s = Math.floor((offsetX / canvas.clientWidth) * tokens.length);
          point({ head, t, s: s >= 0 && s <= t ? s : null });
        };
        canvas.addEventListener("pointermove", place);
        canvas.addEventListener("click", place);
        button.addEventListener("focus", () => { if (at.head !== head) point({ ...at, head, s: null }); });
        button.addEventListener("keydown", (event) => {
          const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
          if (!step) return;
          event.preventDefault();
          const t = Math.min(tokens.length - 1, Math.max(0, at.t + step[0]));
          const s = at.s === null && !step[1] ? null : Math.min(t, Math.max(0, (at.s ?? most(head, t)[0][1]) + step[1]));
          point({ head, t, s });
        });
        return button;
      });
      const name = shown.kv_heads === 1 ? "the KV head" : `KV head ${group}`;
      const title = make("p", {}, make("i", {}), name);
      title.firstChild.style.background = hue(group, shown.kv_heads);
      const shares = make("div", { className: "kv" }, title, make("div", { className: "maps" }, ...drawn));
      shares.setAttribute("role", "group");
      shares.setAttribute("aria-label", `read ${name}`);
      return shares;
    });
    const grid = frame.querySelector(".kvs");
    grid.classList.toggle("many", heads > 16);
    grid.replaceChildren(...groups);
    grid.querySelectorAll("canvas").forEach(paint);
    document.querySelector("#looks-heads tbody").replaceChildren(...shown.maps.map((_, head) => make("tr", {}, ...[
      head, of?.parent_heads[head], Math.floor(head / shared), of?.distance_tokens[head].toPrecision(3), of?.entropy_nats[head].toPrecision(3),
      of && percent(of.first_share[head], 2), of && percent(of.previous_share[head], 2),
    ].map((value) => make("td", { textContent: value ?? "not measured" })))));
    point({ ...at, head: Math.min(at.head, heads - 1) });
  }

  function point(next) {
    at = next;
    asks.value = at.t;
    const { head, t, s } = at, heads = shown.maps.length;
    asks.setAttribute("aria-valuetext", `token ${t}, ${word(t)}`);
    document.getElementById("looks-asks").textContent = `${word(t)}, token ${t}`;
    frame.querySelectorAll(".map").forEach((map, k) => {
      const [p, best] = most(k, t)[0];
      map.style.setProperty("--t", (t + 0.5) / tokens.length);
      map.classList.toggle("here", k === head);
      map.querySelector(".most").textContent = word(best);
      map.setAttribute("aria-label", `query head ${k}: from ${word(t)} most to ${word(best)}, ${percent(p)}`);
    });
    document.querySelectorAll("#looks-heads tbody tr").forEach((row, k) => row.classList.toggle("here", k === head));
    document.querySelectorAll("#looks-text span").forEach((span, k) => {
      span.style.setProperty("--p", k <= t ? tint(share(head, t, k)).toFixed(3) : 0);
      span.className = k === t ? "asks" : k === s ? "asked" : k > t ? "later" : "";
    });
    const who = `Query head ${head}, reading ${shown.kv_heads === 1 ? "the KV head" : `KV head ${Math.floor((head * shown.kv_heads) / heads)}`}: from ${word(t)}`;
    told.textContent = s === null
      ? `${who} ${most(head, t).slice(0, 3).map(([p, k]) => `${percent(p)} to ${word(k)}`).join(", ")}.`
      : `${who} (token ${t}) ${percent(share(head, t, s))} to ${word(s)} (token ${s}${s < t ? `, ${t - s} back` : ", itself"}).`;
  }

  document.getElementById("looks-text").replaceChildren(...tokens.map((token, t) => {
    const span = make("span", { textContent: token.replaceAll("\n", "⏎\n") });
    span.addEventListener("click", () => point({ ...at, t, s: null }));
    return span;
  }));
  model.addEventListener("change", draw);
  layer.addEventListener("change", draw);
  asks.addEventListener("input", () => point({ ...at, t: Number(asks.value), s: null }));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => frame.querySelectorAll("canvas").forEach(paint));
  document.addEventListener("dial", ({ detail: { view, index } }) => {
    if (index === stop) return; // the page was only resized, or another choice made
    stop = index;
    const wanted = [...model.options].find(({ value }) =>
      Number(value.split("|")[1]) === view.stops[index].kv_heads && !value.startsWith("random"));
    if (wanted) model.value = wanted.value;
    draw();
  });
  frame.hidden = false;
})();
