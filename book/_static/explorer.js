// The explorer of chapter 13: the maps of a run's models, patch by patch.
//
// `window.sinkstudyExplorer` holds the data; results/<run>/13-explorer/explorer.js, which the chapter writes, sets it.
// Everything is drawn from one `state`: a choice changes the state and calls `draw`. No library, no request.
(() => {
  "use strict";

  const QUANTITIES = {
    tower_norm: { name: "Norm in the vision tower", unit: "× median", side: "tower", relative: true },
    tower_attention: { name: "Attention received in the vision tower", unit: "%", side: "tower" },
    decoder_norm: { name: "Norm in the language model", unit: "× median", side: "decoder", relative: true },
    decoder_attention: { name: "Attention from the last prompt token", unit: "%", side: "decoder", asked: true },
    attribution: { name: "Attribution to the true answer", unit: "nats", side: "none", asked: true, signed: true },
  };
  const GROUPS = { sinks: "sinks", top_2_percent: "the top 2 % of norms", calm: "calm patches", things: "things" };
  const RANGES = { log: "one scale, logarithmic", shared: "one scale, linear", own: "each map on its own" };
  const VIRIDIS = "440154 482475 414487 355f8d 2a788e 21918c 22a884 44bf70 7ad151 bddf26 fde725";
  const BLUE_RED = "053061 2166ac 4393c3 92c5de d1e5f0 f7f7f7 fddbc7 f4a582 d6604d b2182b 67001f";
  const SVG = "http://www.w3.org/2000/svg";

  // ---- data

  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

  /** Numbers back from 16-bit codes; 65535 stands for NaN. */
  function unpack({ low, step, codes }) {
    const view = new DataView(bytes(codes).buffer);
    return Array.from({ length: view.byteLength / 2 }, (_, i) => {
      const code = view.getUint16(2 * i, true);
      return code === 65535 ? NaN : low + step * code;
    });
  }

  function median(values) {
    const sorted = values.filter(Number.isFinite).sort((a, b) => a - b);
    const half = sorted.length / 2;
    return (sorted[Math.ceil(half) - 1] + sorted[Math.floor(half)]) / 2;
  }

  /** A number with three significant digits. */
  function text(value, sign = "auto") {
    if (!Number.isFinite(value)) return "n/a";
    const options = { maximumSignificantDigits: 3, useGrouping: false, signDisplay: sign };
    return (Math.abs(value) < 5e-7 ? 0 : value).toLocaleString("en", options).replace("-", "−");
  }
  const percent = (p) => `${text(100 * (p < 0.0005 ? 0 : p))} %`;

  // ---- colours

  const scale = (stops) => stops.split(" ").map((hex) => [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16)));
  const SCALES = { plain: scale(VIRIDIS), signed: scale(BLUE_RED) };

  /** Where a value stands in a range, from 0 to 1. */
  function place(value, { low, high, log }) {
    const at = log ? Math.log(Math.max(value, low) / low) / Math.log(high / low || Math.E) : (value - low) / (high - low || 1);
    return Math.min(1, Math.max(0, at));
  }

  /** The value that stands at a place, from 0 to 1, of a range. */
  const valueAt = (at, { low, high, log }) => (log ? low * (high / low) ** at : low + at * (high - low));

  /** Red, green and blue of a value. */
  function colour(value, range) {
    if (!Number.isFinite(value)) return [128, 128, 128];
    const { stops } = range;
    const at = place(value, range) * (stops.length - 1);
    const i = Math.min(stops.length - 2, Math.floor(at));
    return stops[i].map((c, k) => Math.round(c + (at - i) * (stops[i + 1][k] - c)));
  }

  /** From the smallest to the largest value of some maps; signed values around zero, logarithms over three decades. */
  function rangeOf(maps, signed, log) {
    const values = maps.flat().filter(Number.isFinite);
    const [low, high] = values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
    const top = Math.max(Math.abs(low), Math.abs(high));
    if (signed) return { low: -top, high: top, stops: SCALES.signed };
    return { low: log ? Math.max(low, high / 1000) : low, high, log, stops: SCALES.plain };
  }

  // ---- elements

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value !== undefined) element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }

  let groups = 0;
  /** Radio buttons as a row of tiles; `face(i)` makes the content of the i-th. */
  function tiles(legend, kind, n, chosen, face, choose) {
    const name = `explorer-${(groups += 1)}`;
    const options = Array.from({ length: n }, (_, i) => {
      const input = make("input", { type: "radio", name, value: i, onchange: () => choose(i) });
      input.checked = i === chosen;
      return make("label", {}, input, make("span", { class: "explorer-tile" }, ...face(i)));
    });
    const row = make("div", { class: "explorer-tiles" }, ...options);
    return make("fieldset", { class: `explorer-${kind}` }, make("legend", {}, legend), row);
  }

  function select(label, kind, options, chosen, choose) {
    const list = make("select", { onchange: (event) => choose(event.target.value) });
    for (const [value, name] of options) list.append(make("option", { value }, name));
    list.value = chosen;
    return make("label", { class: `explorer-${kind}` }, make("span", {}, label), list);
  }

  function smallMap(values, range, [rows, columns]) {
    const canvas = make("canvas", { width: columns, height: rows, "aria-hidden": "true" });
    const pixels = new ImageData(columns, rows);
    values.forEach((value, i) => pixels.data.set([...colour(value, range), 255], 4 * i));
    canvas.getContext("2d").putImageData(pixels, 0, 0);
    return canvas;
  }

  function drawing(tag, attributes) {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  }

  /** A dot in every patch of a set, as an SVG path in units of patches. */
  const dots = (mask, [, columns]) =>
    mask.map((inside, i) => (inside ? `M${(i % columns) + 0.5} ${Math.floor(i / columns) + 0.5}h0` : "")).join("");

  /** The border around a set of patches. */
  function border(mask, [rows, columns]) {
    const inside = (r, c) => r >= 0 && c >= 0 && r < rows && c < columns && mask[r * columns + c];
    let path = "";
    for (let r = 0; r < rows; r += 1) {
      for (let c = 0; c < columns; c += 1) {
        if (!inside(r, c)) continue;
        if (!inside(r - 1, c)) path += `M${c} ${r}h1`;
        if (!inside(r + 1, c)) path += `M${c} ${r + 1}h1`;
        if (!inside(r, c - 1)) path += `M${c} ${r}v1`;
        if (!inside(r, c + 1)) path += `M${c + 1} ${r}v1`;
      }
    }
    return path;
  }

  // ---- the explorer

  function explorer(root, data) {
    const cache = new Map();
    const state = {
      model: data.opens, picture: 0, question: 0, quantity: "tower_norm", range: "log", rule: 0, calm: true, things: true,
      tower: data.models[0].feature_layer, decoder: data.models[0].decoder_layers, patch: 0,
    };
    const picture = () => data.pictures[state.picture];
    const model = () => data.models[state.model];

    /** The maps of one quantity by layer, [layers][patches], as they are measured. */
    function measured(m, quantity) {
      const q = QUANTITIES[quantity].asked ? state.question : 0;
      const key = [m, state.picture, quantity, q].join();
      if (!cache.has(key)) {
        const values = unpack(data.models[m].pictures[state.picture][quantity]);
        const n = picture().grid[0] * picture().grid[1];
        const all = Array.from({ length: values.length / n }, (_, i) => values.slice(i * n, (i + 1) * n));
        const layers = all.length / (QUANTITIES[quantity].asked ? picture().questions.length : 1);
        cache.set(key, all.slice(q * layers, (q + 1) * layers));
      }
      return cache.get(key);
    }

    /** The same in the unit that is coloured: norms in units of the picture's median. */
    function maps(m, quantity) {
      const raw = measured(m, quantity);
      if (!QUANTITIES[quantity].relative) return raw;
      const key = ["relative", m, state.picture, quantity].join();
      if (!cache.has(key)) {
        cache.set(key, raw.map((map) => ((middle) => map.map((v) => v / middle))(median(map))));
      }
      return cache.get(key);
    }

    /** Index into the maps of a quantity: `state.decoder` counts from the connector, 0, and attention from layer 1. */
    function layerOf(m, quantity) {
      const { side } = QUANTITIES[quantity];
      const last = measured(m, quantity).length - 1;
      const index = side === "none" ? 0 : state[side] - (quantity === "decoder_attention" ? 1 : 0);
      return Math.min(last, Math.max(0, index));
    }

    function layerName(m, quantity, index) {
      if (quantity === "decoder_norm" && index === 0) return "connector";
      const layer = quantity === "decoder_norm" ? index : index + 1;
      return QUANTITIES[quantity].side === "tower" && index === data.models[m].feature_layer ? `${layer} →` : `${layer}`;
    }

    function mask(name) {
      if (name !== "sinks") return picture().groups[name] && Array.from(bytes(picture().groups[name]), Boolean);
      return Array.from(bytes(model().pictures[state.picture].rules), (byte) => Boolean((byte >> state.rule) & 1));
    }

    /** Change the state and draw anew; the focus stays with the form field that asked for it. */
    function set(change) {
      Object.assign(state, change);
      const field = document.activeElement?.closest(":is(fieldset, label)[class^=explorer-]")?.className;
      draw();
      const box = field && root.querySelector(`.${field}`);
      if (box) (box.querySelector("input:checked") ?? box.querySelector("input, select"))?.focus();
    }
    const choose = (name) => (value) => set({ [name]: value });

    function draw() {
      const { quantity } = state;
      const kind = QUANTITIES[quantity];
      const grid = picture().grid;
      state.patch = Math.min(state.patch, grid[0] * grid[1] - 1);
      const all = data.models.map((_, m) => maps(m, quantity));
      const shared = rangeOf(all.flat(), kind.signed, state.range === "log");
      const range = (map) => (state.range === "own" ? rangeOf([map], kind.signed) : shared);
      const layer = layerOf(state.model, quantity);
      const current = all[state.model][layer];
      const small = (m, index) => smallMap(all[m][index], range(all[m][index]), grid);

      const layers = kind.side === "none" ? [] : [tiles(
        kind.side === "tower" ? "Layer of the vision tower (→ feeds the connector)" : "Layer of the language model",
        "layers", all[state.model].length, layer,
        (i) => [small(state.model, i), layerName(state.model, quantity, i)],
        (i) => set({ [kind.side]: i + (quantity === "decoder_attention" ? 1 : 0) }),
      )];
      const outlines = ["things", "sinks", "calm"].filter((name) => mask(name) && (name === "sinks" || state[name]));
      const overlay = () => {
        const svg = drawing("svg", { viewBox: `0 0 ${grid[1]} ${grid[0]}`, preserveAspectRatio: "none", "aria-hidden": "true" });
        for (const name of outlines) {
          const d = (name === "calm" ? dots : border)(mask(name), grid);
          svg.append(...["halo", "line"].map((part) => drawing("path", { d, class: `explorer-${name}-${part}` })));
        }
        svg.append(...["halo", "line"].map((part) => drawing("rect", { class: `explorer-here-${part}` })));
        return svg;
      };
      const photo = make("div", { class: "explorer-photo" },
        make("img", { src: `data:image/png;base64,${picture().png}`, alt: `The picture: ${picture().about}.` }), overlay());
      photo.addEventListener("pointermove", (event) => {
        const box = photo.getBoundingClientRect();
        const at = (offset, size, n) => Math.min(n - 1, Math.max(0, Math.floor((offset / size) * n)));
        look(at(event.clientY - box.top, box.height, grid[0]) * grid[1] + at(event.clientX - box.left, box.width, grid[1]));
      });

      root.replaceChildren(
        tiles("Picture", "pictures", data.pictures.length, state.picture,
          (i) => [make("img", { src: `data:image/png;base64,${data.pictures[i].png}`, alt: `${i + 1}: ${data.pictures[i].about}` })],
          choose("picture")),
        make("div", { class: "explorer-selects" },
          select("Show", "quantity", Object.entries(QUANTITIES).map(([value, { name }]) => [value, name]), quantity, choose("quantity")),
          select("Colours", "range", Object.entries(RANGES).filter(([value]) => value !== "log" || !kind.signed),
            kind.signed && state.range === "log" ? "shared" : state.range, choose("range"))),
        tiles("Model", "models", data.models.length, state.model,
          (i) => [small(i, layerOf(i, quantity)), make("span", {}, data.models[i].name)], choose("model")),
        ...layers,
        make("div", { class: "explorer-panels" }, photo, cells(current, range(current), grid, overlay())),
        legend(range(current), kind), outlineChoice(),
        make("div", { class: "explorer-readout" }, make("p", { "aria-live": "polite" }), make("dl")),
        tiles("Question", "questions", picture().questions.length, state.question,
          (i) => [make("b", {}, picture().questions[i].type), ` ${picture().questions[i].text.replace(" ?", "?")}`], choose("question")),
        answers());
      look(state.patch);
    }

    /** The map itself: a grid of patches, one of which can be reached by Tab and left by the arrow keys. */
    function cells(values, range, [rows, columns], overlay) {
      const cell = (i) => {
        const element = make("div", {
          role: "gridcell", tabindex: i === state.patch ? 0 : -1, onfocus: () => look(i), onpointerenter: () => look(i),
          "aria-label": `row ${Math.floor(i / columns) + 1}, column ${(i % columns) + 1}`,
        });
        element.style.backgroundColor = `rgb(${colour(values[i], range).join()})`;
        return element;
      };
      const row = (r) => make("div", { role: "row" }, ...Array.from({ length: columns }, (_, c) => cell(r * columns + c)));
      const grid = make("div", { role: "grid", class: "explorer-grid", "aria-label": "Patches of the picture" },
        ...Array.from({ length: rows }, (_, r) => row(r)));
      grid.style.setProperty("--columns", columns);
      grid.addEventListener("keydown", (event) => {
        const [r, c] = [Math.floor(state.patch / columns), state.patch % columns];
        const to = {
          ArrowUp: [r - 1, c], ArrowDown: [r + 1, c], ArrowLeft: [r, c - 1], ArrowRight: [r, c + 1],
          Home: [r, 0], End: [r, columns - 1], PageUp: [0, c], PageDown: [rows - 1, c],
        }[event.key];
        if (!to) return;
        event.preventDefault();
        const next = Math.min(rows - 1, Math.max(0, to[0])) * columns + Math.min(columns - 1, Math.max(0, to[1]));
        grid.querySelectorAll("[role=gridcell]")[next].focus();
      });
      return make("div", { class: "explorer-map" }, grid, overlay);
    }

    function legend(range, { unit, name }) {
      const { low, high, stops } = range;
      const ticks = [0, 0.25, 0.5, 0.75, 1].map((at) => make("span", {}, text(valueAt(at, range))));
      const bar = make("div", { class: "explorer-bar" }, make("i"));
      bar.style.backgroundImage = `linear-gradient(to right, ${stops.map((c) => `rgb(${c.join()})`).join()})`;
      state.scale = range;
      return make("div", { class: "explorer-legend", role: "img", "aria-label": `Colours from ${text(low)} to ${text(high)} ${unit}` },
        bar, make("div", { class: "explorer-ticks" }, ...ticks), make("div", {}, `${name}, ${unit}`));
    }

    function outlineChoice() {
      const count = (name) => mask(name).filter(Boolean).length;
      const box = (name, label) => {
        const input = make("input", { type: "checkbox", onchange: (event) => set({ [name]: event.target.checked }) });
        input.checked = state[name];
        return make("label", { class: `explorer-${name}-box` }, input, sample(name), `${label} (${count(name)})`);
      };
      const sample = (name) => {
        const svg = drawing("svg", { viewBox: "0 0 24 8", class: "explorer-sample", "aria-hidden": "true" });
        const d = name === "calm" ? "M12 4h0" : "M1 4h22";
        svg.append(...["halo", "line"].map((part) => drawing("path", { d, class: `explorer-${name}-${part}` })));
        return svg;
      };
      const known = Object.keys(picture().groups);
      return make("div", { class: "explorer-outlines" },
        sample("sinks"),
        select(`sinks (${count("sinks")}):`, "rule", data.rules.map((rule, i) => [i, rule]), state.rule, (i) => choose("rule")(Number(i))),
        ...(known.includes("calm") ? [box("calm", "calm patches")] : []),
        ...(known.includes("things") ? [box("things", "things")] : []));
    }

    /** Point at a patch: mark it and read its numbers. */
    function look(patch) {
      state.patch = patch;
      const columns = picture().grid[1];
      const [r, c] = [Math.floor(patch / columns), patch % columns];
      const { quantity } = state;
      root.querySelectorAll("[role=gridcell]").forEach((cell, i) => cell.setAttribute("tabindex", i === patch ? 0 : -1));
      const merge = QUANTITIES[quantity].side === "tower" ? 1 : model().merge; // the patches of one visual token
      for (const rect of root.querySelectorAll(".explorer-panels rect")) {
        const box = { x: c - (c % merge), y: r - (r % merge), width: merge, height: merge };
        for (const [name, value] of Object.entries(box)) rect.setAttribute(name, value);
      }
      const value = (name) => maps(state.model, name)[layerOf(state.model, name)][patch];
      const raw = (name) => measured(state.model, name)[layerOf(state.model, name)][patch];
      const layer = (name) => layerName(state.model, name, layerOf(state.model, name)).replace(" →", "");
      root.querySelector(".explorer-bar i").style.left = `${100 * place(value(quantity), state.scale)}%`;

      const said = `${text(value(quantity), QUANTITIES[quantity].signed ? "exceptZero" : "auto")} ${QUANTITIES[quantity].unit}`;
      root.querySelector("[aria-live]").textContent = `Row ${r + 1}, column ${c + 1}: ${said}`;
      const byte = bytes(model().pictures[state.picture].rules)[patch];
      const rules = data.rules.filter((_, i) => (byte >> i) & 1);
      const token = model().merge > 1 ? `, a token of ${model().merge} × ${model().merge} patches` : "";
      const where = (name) => (layer(name) === "connector" ? "after the connector" : `layer ${layer(name)}`);
      const rows = {
        place: ["What lies here", picture().contents ? picture().contents[patch] : "not known for this picture"],
        tower_norm: [`Norm in the tower, ${where("tower_norm")}`, `${text(raw("tower_norm"))} = ${text(value("tower_norm"))} × median`],
        tower_attention: [`Attention received in the tower, ${where("tower_attention")}`,
          `${text(raw("tower_attention"))} % = ${text(raw("tower_attention") / model().uniform[layerOf(state.model, "tower_attention")])} × uniform`],
        decoder_norm: [`Norm in the language model, ${where("decoder_norm")}`,
          `${text(raw("decoder_norm"))} = ${text(value("decoder_norm"))} × median${token}`],
        decoder_attention: [`Attention from the last prompt token, ${where("decoder_attention")}`, `${text(raw("decoder_attention"))} %`],
        attribution: ["Attribution", `${text(raw("attribution"), "exceptZero")} nats`],
        rules: ["A sink by", rules.join("; ") || "no rule"],
      };
      root.querySelector(".explorer-readout dl").replaceChildren(...Object.entries(rows).flatMap(([name, [term, definition]]) => [
        make("dt", {}, term), make("dd", { "data-of": name }, definition)]));
    }

    function answers() {
      const { top, p, without } = model().pictures[state.picture].answers[state.question];
      const { answer } = picture().questions[state.question];
      const bar = (value, random) => {
        const element = make("span", { class: "explorer-p", "aria-hidden": "true" }, make("i"));
        element.firstChild.style.width = `${100 * value}%`;
        if (random !== undefined) element.append(make("b", { style: `left: ${100 * random}%` }));
        return element;
      };
      const row = (name, tokens, value, random, word) => make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, tokens),
        make("td", {}, bar(value, random), percent(value)), make("td", {}, random === undefined ? "" : percent(random)), make("td", {}, word));
      const body = Object.entries(GROUPS).filter(([group]) => group in picture().groups || !["calm", "things"].includes(group))
        .map(([group, name]) => (without[group]
          ? row(`without ${name}`, without[group].tokens, without[group].p, without[group].random, without[group].word)
          : make("tr", {}, make("th", { scope: "row" }, `without ${name}`), make("td", { colspan: 4 }, "this picture has none in this model"))));
      const head = ["Visual tokens", "Replaced", answer ? "True answer" : "Own answer", "If random", "Says first"];
      return make("div", { class: "explorer-answers" },
        make("p", {}, answer ? "True answer: " : "The true answer is not known. ", make("b", {}, answer || ""),
          `. ${model().name} begins with ${top.map(([word, q]) => `${word} ${percent(q)}`).slice(0, 3).join(", ")}.`),
        make("table", {}, make("thead", {}, make("tr", {}, ...head.map((name) => make("th", { scope: "col" }, name)))),
          make("tbody", {}, row("all kept", "0", p, undefined, top[0][0]), ...body)));
    }

    draw();
  }

  for (const root of document.querySelectorAll(".explorer")) explorer(root, window.sinkstudyExplorer);
})();
