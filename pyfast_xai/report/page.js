"use strict";
// One page, no library. Text from the runs goes through textContent only; nothing is fetched.
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const { items, runs, words } = data;
  const count = items.id.length;
  const lower = words.map((text) => text.toLowerCase());
  const names = items.id.map((text) => text.toLowerCase());
  const labels = new Map(data.labels);
  const ERROR = 2, EXPLAINED = 1;

  function make(tag, options = {}, ...children) {
    const { text, ...rest } = options;
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(rest)) if (value !== null) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    element.append(...children.filter((child) => child !== null));
    return element;
  }
  const word = (number) => (number === null || number === undefined ? "" : words[number]);
  const percent = (score) => {
    if (score === null || score === undefined) return "";
    return score >= 0 && score <= 1 ? `${Math.round(score * 100)} %` : String(score);
  };
  const plural = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

  // Pictures and maps.

  const blocks = [...document.querySelectorAll("script.pictures")];
  const lines = new Map();
  function fields(item) {
    const block = Math.floor(item / data.block);
    if (!lines.has(block)) {
      // Only so many are held apart from the page itself.
      if (lines.size >= 16) lines.delete(lines.keys().next().value);
      lines.set(block, blocks[block].textContent.split("\n"));
    }
    return lines.get(block)[item % data.block].split(",");
  }
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const colors = bytes(data.colors);

  // Heat in 0..1 as colours; where it is cold, the picture shows through.
  function paint(canvas, heat, width, height, opaque) {
    canvas.width = width;
    canvas.height = height;
    let low = Infinity, high = -Infinity;
    for (const value of heat) { low = Math.min(low, value); high = Math.max(high, value); }
    // The hottest fiftieth shares the end of the scale: few pixels hold most of a gradient.
    const ranked = Float32Array.from(heat).sort();
    const clip = ranked[Math.max(1, Math.round(0.98 * ranked.length)) - 1];
    if (clip > low && !opaque) high = clip;
    const scale = high > low ? 1 / (high - low) : 0;
    const pixels = new ImageData(width, height);
    for (let i = 0; i < heat.length; i++) {
      const value = Math.min(1, (heat[i] - low) * scale), rise = Math.min(1, 4 * value);
      pixels.data.set(colors.subarray(3 * Math.round(255 * value), 3 * Math.round(255 * value) + 3), 4 * i);
      pixels.data[4 * i + 3] = opaque ? 255 : Math.round(255 * rise * rise * (3 - 2 * rise));
    }
    canvas.getContext("2d").putImageData(pixels, 0, 0);
  }

  // Bilinear, pixels as areas, as PyTorch enlarges maps.
  function enlarged(packed, width, height) {
    const [h, w, zero] = packed, heat = new Float32Array(width * height);
    const at = (y, x) => packed[3 + y * w + x];
    const place = (to, size, from) => {
      const middle = Math.max(0, ((to + 0.5) * from) / size - 0.5), first = Math.min(Math.floor(middle), from - 1);
      return [first, Math.min(first + 1, from - 1), middle - first];
    };
    const across = Array.from({ length: width }, (_, x) => place(x, width, w));
    for (let y = 0; y < height; y++) {
      const [top, bottom, down] = place(y, height, h);
      for (let x = 0; x < width; x++) {
        const [left, right, along] = across[x];
        const upper = at(top, left) * (1 - along) + at(top, right) * along;
        const below = at(bottom, left) * (1 - along) + at(bottom, right) * along;
        heat[y * width + x] = Math.max(zero, upper * (1 - down) + below * down);
      }
    }
    return heat;
  }

  async function pixelsOf(text) {
    const image = new Image();
    image.src = `data:image/webp;base64,${text}`;
    await image.decode();
    const sheet = document.createElement("canvas");
    sheet.width = image.naturalWidth;
    sheet.height = image.naturalHeight;
    const context = sheet.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    return context.getImageData(0, 0, sheet.width, sheet.height);
  }

  async function draw(canvas, field, run) {
    const text = field.slice(1);
    if (field[0] === "m") {
      const [height, width] = run.input;
      paint(canvas, enlarged(bytes(text), width, height), width, height, false);
      return;
    }
    const pixels = await pixelsOf(text);
    if (field[0] === "g") {
      const heat = Float32Array.from({ length: pixels.width * pixels.height }, (_, i) => pixels.data[4 * i]);
      paint(canvas, heat, pixels.width, pixels.height, false);
      return;
    }
    // Colours of their own: as bright as they are, so much they cover.
    for (let i = 0; i < pixels.data.length; i += 4) {
      const most = Math.max(pixels.data[i], pixels.data[i + 1], pixels.data[i + 2]);
      for (let c = 0; c < 3; c++) pixels.data[i + c] = most ? (pixels.data[i + c] * 255) / most : 0;
      pixels.data[i + 3] = most;
    }
    canvas.width = pixels.width;
    canvas.height = pixels.height;
    canvas.getContext("2d").putImageData(pixels, 0, 0);
  }

  // What a run saw of an item, with its heat map over it, in a square of so many pixels.
  function stage(item, run, side) {
    const frame = make("span", { class: "frame" });
    frame.style.width = frame.style.height = `${side}px`;
    const own = fields(item), columns = run.columns, status = columns.status[item];
    const [height, width] = run.input, scale = side / Math.max(height, width);
    const inner = make("span", { class: "stage" });
    inner.style.width = `${width * scale}px`;
    inner.style.height = `${height * scale}px`;
    const picture = own[run.picture], map = own[run.map];
    if (picture) inner.append(make("img", { src: `data:image/webp;base64,${picture.slice(1)}`, alt: items.id[item] }));
    if (map) {
      const canvas = make("canvas", { role: "img", "aria-label": `${run.name} heat map` });
      if (map[0] === "c") inner.classList.add("dominance");
      draw(canvas, map, run);
      inner.append(canvas);
    }
    const box = columns.box[item];
    if (box) {
      const outline = make("span", { class: "box" });
      ["left", "top", "width", "height"].forEach((edge, n) => { outline.style[edge] = `${box[n] / 10}%`; });
      inner.append(outline);
    }
    if (status === EXPLAINED || picture) frame.append(inner);
    else frame.append(make("span", { class: "failed", text: status === ERROR ? columns.error[item][1] : "not there yet" }));
    return frame;
  }

  const right = (item, run) => {
    const label = items.label[item], answer = run.columns.answer[item];
    return label === null || answer === null || run.columns.status[item] !== EXPLAINED ? null : label === answer;
  };

  // What the model answers with colours swapped, one swap after another; null where it was not asked.
  function swapsOf(item, run) {
    const told = run.columns.swapped && run.columns.swapped[item];
    if (!told) return null;
    return run.views.colors.swaps.map((order, n) => ({
      order, answer: told[3 * n], name: word(told[3 * n + 1]), score: told[3 * n + 2],
      stays: told[3 * n] === run.columns.answer[item],
    }));
  }
  const spelled = (order) => order.map((channel) => "RGB"[channel]).join("");

  function saying(item, run) {
    const columns = run.columns, status = columns.status[item];
    if (status === ERROR) return make("span", { class: "caption wrong", text: "error" });
    if (status !== EXPLAINED) return make("span", { class: "caption", text: "not there yet" });
    const known = right(item, run);
    const mark = known === null ? "" : known ? "\u2713 " : "\u2717 ";
    const line = make("span", { class: "caption" });
    if (mark) {
      line.append(make("span", { class: known ? "right" : "wrong", "aria-hidden": "true", text: mark }));
    }
    line.append(`${percent(columns.score[item])} ${word(columns.class[item]) || run.name}`);
    if (known !== null) line.append(make("span", { class: "said", text: known ? ", right" : `, wrong: it is ${word(labels.get(items.label[item]))}` }));
    line.title = line.textContent;
    return line;
  }

  // Which items, in which order.

  let order = [];
  const chosenRun = () => runs[Number($("run").value) || 0];

  function choose() {
    const run = chosenRun(), columns = run.columns;
    const wantedClass = $("class").value.trim().toLowerCase(), wantedName = $("name").value.trim().toLowerCase();
    const low = $("low").value === "" ? null : Number($("low").value);
    const high = $("high").value === "" ? null : Number($("high").value);
    const swapped = columns.swapped ? $("swapped").value : "";
    $("swapped-label").hidden = !columns.swapped;
    const answer = $("answer").value, status = $("status").value, key = $("sort").value;
    const fits = words.map((_, n) => lower[n].includes(wantedClass));
    const found = [];
    for (let item = 0; item < count; item++) {
      if (wantedClass) {
        const label = labels.get(items.label[item]);
        if (!fits[columns.class[item]] && !(label !== undefined && fits[label])) continue;
      }
      if (wantedName && !names[item].includes(wantedName)) continue;
      const score = columns.score[item];
      if ((low !== null || high !== null) && score === null) continue;
      if ((low !== null && score < low) || (high !== null && score > high)) continue;
      if (status !== "" && columns.status[item] !== Number(status)) continue;
      if (answer) {
        const known = right(item, run);
        if (answer !== (known === null ? "unknown" : known ? "right" : "wrong")) continue;
      }
      if (swapped) {
        const swaps = swapsOf(item, run);
        if (!swaps || swaps.every((swap) => swap.stays) !== (swapped === "stays")) continue;
      }
      found.push(item);
    }
    const keys = {
      index: (item) => items.index[item],
      id: (item) => names[item],
      class: (item) => (columns.class[item] === null ? null : lower[columns.class[item]]),
      score: (item) => columns.score[item],
      ms: (item) => columns.ms[item],
    };
    const value = keys[key], sign = $("descending").checked ? -1 : 1;
    found.sort((a, b) => {
      const first = value(a), second = value(b);
      // What has no value comes last either way.
      if (first === null || second === null) return (first === null) - (second === null) || a - b;
      return first < second ? -sign : first > second ? sign : a - b;
    });
    order = found;
    const shown = order.length === count ? plural(count, "picture") : `${order.length.toLocaleString("en")} of ${plural(count, "picture")}`;
    $("count").textContent = shown;
    focused = 0;
    cards.forEach((card) => card.remove());
    cards.clear();
    layOut();
  }

  // The grid: only cards in sight are in the page.

  const grid = $("grid"), cards = new Map();
  const GAP = 10, PADDING = 14;
  let columnsAcross = 1, cardWidth = 0, cardHeight = 0, side = 128, focused = 0;

  function layOut() {
    const room = grid.clientWidth;
    if (!room) return;
    side = Math.max(48, Math.min(128, Math.floor((room - PADDING - 6 * (runs.length - 1)) / runs.length)));
    cardWidth = runs.length * side + 6 * (runs.length - 1) + PADDING;
    cardHeight = side + PADDING + (runs.length > 1 ? 62 : 42);
    columnsAcross = Math.max(1, Math.floor((room + GAP) / (cardWidth + GAP)));
    grid.style.height = `${Math.ceil(order.length / columnsAcross) * (cardHeight + GAP)}px`;
    cards.forEach((card) => card.remove());
    cards.clear();
    show();
  }

  function show() {
    if ($("gallery").hidden) return;
    const top = -grid.getBoundingClientRect().top, line = cardHeight + GAP;
    const first = Math.max(0, Math.floor((top - 300) / line) * columnsAcross);
    const last = Math.min(order.length, Math.ceil((top + window.innerHeight + 300) / line) * columnsAcross);
    const active = document.activeElement;
    for (const [place, card] of cards) {
      // A card with the focus stays, so that the focus is not lost.
      if ((place < first || place >= last) && !card.contains(active)) {
        card.remove();
        cards.delete(place);
      }
    }
    for (let place = first; place < last; place++) if (!cards.has(place)) put(place);
    if (order.length && !cards.has(focused)) put(focused);
  }

  function put(place) {
    const item = order[place];
    const stages = make("span", { class: "stages" });
    for (const run of runs) {
      const own = make("span", {}, stage(item, run, side));
      if (runs.length > 1) own.append(make("small", { class: "caption quiet", text: run.name }));
      own.append(saying(item, run));
      own.style.width = `${side}px`;
      stages.append(own);
    }
    const id = make("span", { class: "caption" }, make("small", { text: items.id[item].split("/").pop() }));
    id.title = items.id[item];
    const button = make("button", { type: "button", tabindex: place === focused ? "0" : "-1" }, stages, id);
    button.addEventListener("click", () => open(place));
    button.addEventListener("focus", () => { if (focused !== place) step(place, false); });
    const card = make("div", { class: "card", role: "listitem", "aria-posinset": place + 1, "aria-setsize": order.length }, button);
    card.style.left = `${(place % columnsAcross) * (cardWidth + GAP)}px`;
    card.style.top = `${Math.floor(place / columnsAcross) * (cardHeight + GAP)}px`;
    card.style.width = `${cardWidth}px`;
    card.style.height = `${cardHeight}px`;
    // Assistive technology reads in the order of the page.
    const after = [...cards.keys()].filter((other) => other > place).sort((a, b) => a - b)[0];
    grid.insertBefore(card, after === undefined ? null : cards.get(after));
    cards.set(place, card);
  }

  // Move the one place that the tab key reaches.
  function step(place, take = true) {
    if (!order.length) return;
    const before = cards.get(focused);
    focused = Math.max(0, Math.min(order.length - 1, place));
    if (before) before.firstChild.tabIndex = -1;
    if (!cards.has(focused)) put(focused);
    const button = cards.get(focused).firstChild;
    button.tabIndex = 0;
    if (take) {
      button.scrollIntoView({ block: "nearest" });
      button.focus({ preventScroll: true });
      show();
    }
  }

  grid.addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.floor(window.innerHeight / (cardHeight + GAP)) - 1) * columnsAcross;
    const moves = {
      ArrowRight: focused + 1, ArrowLeft: focused - 1, ArrowDown: focused + columnsAcross, ArrowUp: focused - columnsAcross,
      PageDown: focused + page, PageUp: focused - page, Home: 0, End: order.length - 1,
    };
    if (!(event.key in moves) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const to = moves[event.key];
    if (to >= 0 && to < order.length) step(to);
    else if (event.key.startsWith("Page")) step(to);
  });

  // One picture, large.

  const detail = $("detail");
  let opened = 0;

  function open(place) {
    opened = place;
    const item = order[place];
    $("detail-title").textContent = items.id[item];
    const own = make("div", { class: "runs" });
    for (const run of runs) own.append(large(item, run));
    const facts = make("table");
    const size = items.width[item] === null ? null : `${items.width[item]} \u00d7 ${items.height[item]} pixels`;
    const told = [
      ["label", items.label[item] === null ? null : word(labels.get(items.label[item]))],
      ["source", items.source[item]], ["size", size], ["index", items.index[item]],
    ];
    for (const [name, value] of told) {
      if (value !== null) facts.append(make("tr", {}, make("th", { scope: "row", text: name }), make("td", { text: value })));
    }
    $("detail-body").replaceChildren(own, facts);
    $("previous").disabled = place === 0;
    $("next").disabled = place === order.length - 1;
    if (!detail.open) detail.showModal();
  }

  function large(item, run) {
    const columns = run.columns, part = make("section", {}, make("h3", { text: run.name }));
    part.append(stage(item, run, 300), saying(item, run));
    const error = columns.error[item];
    if (error) part.append(make("p", { class: "wrong", text: `${word(error[0])}: ${error[1]}` }));
    const legend = run.columns.legend && run.columns.legend[item];
    if (legend) {
      const list = make("p", { class: "quiet" }, "Dominant: ");
      for (const [name, color] of legend) {
        const swatch = make("span", { class: "swatch" });
        swatch.style.background = color;
        list.append(swatch, `${word(name)} `);
      }
      part.append(list);
    }
    const top = columns.top[item];
    if (top) {
      const table = make("table", {}, make("caption", { text: "Classes with the largest scores" }));
      for (let n = 0; n < top.length; n += 2) {
        const meter = make("meter", { min: 0, max: 1, value: top[n + 1], "aria-hidden": "true" });
        table.append(make("tr", {}, make("th", { scope: "row", text: word(top[n]) }), make("td", {}, meter),
          make("td", { class: "number", text: percent(top[n + 1]) })));
      }
      part.append(table);
    }
    const swaps = swapsOf(item, run);
    if (swaps) {
      const list = make("ul", { class: "swaps", "aria-label": "With colours swapped" });
      for (const swap of swaps) list.append(make("li", {}, recolored(item, run, swap.order), ...outcome(item, run, swap)));
      part.append(make("p", { class: "quiet", text: "With colours swapped" }), list);
    }
    if (columns.ms[item] !== null) part.append(make("p", { class: "quiet", text: `${columns.ms[item]} ms` }));
    return part;
  }

  function recolored(item, run, order) {
    const canvas = make("canvas", { role: "img", "aria-label": `the picture with red, green and blue as ${spelled(order)}` });
    const picture = fields(item)[run.picture];
    if (!picture) return null;
    pixelsOf(picture.slice(1)).then((pixels) => {
      for (let i = 0; i < pixels.data.length; i += 4) {
        const color = order.map((channel) => pixels.data[i + channel]);
        for (let c = 0; c < 3; c++) pixels.data[i + c] = color[c];
      }
      canvas.width = pixels.width;
      canvas.height = pixels.height;
      canvas.getContext("2d").putImageData(pixels, 0, 0);
    });
    return canvas;
  }

  function outcome(item, run, swap) {
    const top = run.columns.top[item], name = swap.stays || !top ? "" : `${word(top[0])} `;
    return [
      make("span", { class: swap.stays ? "right" : "wrong", text: `${swap.stays ? "still" : "now"} ${swap.name}` }),
      make("small", { class: "quiet", text: `as ${spelled(swap.order)}: ${name}${percent(swap.score)}` }),
    ];
  }

  const turn = (by) => { if (order[opened + by] !== undefined) open(opened + by); };
  $("previous").addEventListener("click", () => turn(-1));
  $("next").addEventListener("click", () => turn(1));
  $("close").addEventListener("click", () => detail.close());
  detail.addEventListener("click", (event) => { if (event.target === detail) detail.close(); });
  detail.addEventListener("close", () => step(opened));
  detail.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") turn(-1);
    else if (event.key === "ArrowRight") turn(1);
  });

  // The data set.

  function matrix(told, caption, rowsAre, columnsAre) {
    // The many that are counted together would leave all else white.
    const alone = told.counts.filter((_, n) => told.classes[n] >= 0).map((row) => row.filter((_, n) => told.classes[n] >= 0));
    const most = Math.max(1, ...alone.flat());
    const head = make("tr", {}, make("th", { scope: "col", text: `${rowsAre} \u2193 ${columnsAre} \u2192` }));
    told.names.forEach((name) => head.append(make("th", { scope: "col", text: word(name), title: word(name) })));
    const body = make("tbody");
    told.counts.forEach((row, n) => {
      const line = make("tr", {}, make("th", { scope: "row", text: word(told.names[n]), title: word(told.names[n]) }));
      row.forEach((number) => {
        const cell = make("td", { text: number || "" });
        const share = Math.min(45, Math.round((45 * number) / most));
        cell.style.background = `color-mix(in srgb, var(--accent) ${share}%, var(--ground))`;
        line.append(cell);
      });
      body.append(line);
    });
    const table = make("table", { class: "matrix" }, make("caption", {}, make("span", { text: caption })), make("thead", {}, head), body);
    return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption }, table);
  }

  const PARTS = ["right", "wrong", "unknown"];
  const SAID = { right: "right", wrong: "wrong", unknown: "without label" };

  function histogram(told) {
    const space = "http://www.w3.org/2000/svg", bins = told.right.length, width = 560, height = 160, floor = 140;
    const shape = (tag, options, text) => {
      const element = document.createElementNS(space, tag);
      for (const [name, value] of Object.entries(options)) element.setAttribute(name, value);
      if (text !== undefined) element.textContent = text;
      return element;
    };
    const sums = told.right.map((_, bin) => PARTS.reduce((sum, part) => sum + told[part][bin], 0));
    const most = Math.max(1, ...sums), parts = PARTS.filter((part) => told[part].some((number) => number));
    const edge = (bin) => Number((told.low + ((told.high - told.low) * bin) / bins).toPrecision(3));
    const chart = shape("svg", { class: "histogram", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Scores, as in the table below" });
    sums.forEach((_, bin) => {
      let bottom = floor;
      for (const part of parts) {
        const tall = ((floor - 12) * told[part][bin]) / most;
        bottom -= tall;
        const bar = shape("rect", { class: part, x: 1 + (bin * width) / bins, y: bottom, width: width / bins - 2, height: tall });
        bar.append(shape("title", {}, `${edge(bin)} to ${edge(bin + 1)}, ${SAID[part]}: ${told[part][bin]}`));
        chart.append(bar);
      }
    });
    chart.append(shape("line", { x1: 0, x2: width, y1: floor, y2: floor }), shape("text", { x: 0, y: 155 }, String(edge(0))),
      shape("text", { x: width, y: 155, "text-anchor": "end" }, String(edge(bins))), shape("text", { x: 0, y: 13 }, `most: ${most}`));
    const key = make("p", { class: "key quiet" });
    parts.forEach((part) => key.append(make("label", {}, make("span", { class: part }), SAID[part])));
    const table = make("table", { class: "rows" });
    table.append(make("tr", {}, make("th", { scope: "col", text: "score" }), ...parts.map((part) => make("th", { scope: "col", text: SAID[part] }))));
    sums.forEach((_, bin) => table.append(make("tr", {}, make("th", { scope: "row", text: `${edge(bin)} to ${edge(bin + 1)}` }),
      ...parts.map((part) => make("td", { class: "number", text: told[part][bin] })))));
    return make("div", {}, chart, key, make("details", {}, make("summary", { text: "As a table" }), table));
  }

  function means(told) {
    const list = make("ul", { class: "means" });
    for (const [, name, number, map] of told) {
      const canvas = make("canvas", { role: "img", "aria-label": `mean heat map of ${word(name)}` });
      paint(canvas, enlarged(bytes(map), 112, 112), 112, 112, true);
      const line = make("span", { class: "caption", text: word(name) });
      line.title = word(name);
      list.append(make("li", {}, canvas, line, make("small", { class: "quiet", text: plural(number, "map") })));
    }
    return list;
  }

  // How far answers depend on colour, class by class; a head sorts by its column.
  function colorBias(told, run) {
    const of = told.labelled ? " that it got right" : "", orders = told.swaps.map(spelled);
    const asked = `The model was asked again with red, green and blue in other places (${orders.join(" and ")}).`;
    if (!told.pictures) return make("p", { class: "quiet", text: `${asked} No picture${of} counts.` });
    const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
    const place = make("div", {}, make("p", {
      text: `${asked} Of ${plural(told.pictures, "picture")}${of}, ${percent(mean(told.kept))} keep their class; `
        + `${told.lost.toLocaleString("en")} of ${told.classes.toLocaleString("en")} classes lose three quarters of their pictures or more.`,
    }));
    const rows = told.rows.map(([, name, pictures, kept, before, after]) => ({ name, pictures, kept, before, after: mean(after) }));
    const columns = [
      ["class", (row) => lower[row.name], 1], ["pictures", (row) => row.pictures, -1], ["kept", (row) => mean(row.kept), 1],
      ...orders.map((order, n) => [`as ${order}`, (row) => row.kept[n], 1]),
      ["score", (row) => row.before, -1], ["swapped", (row) => row.after, 1],
    ];
    const body = make("tbody"), heads = columns.map(([text], n) => {
      const button = make("button", { type: "button", text });
      button.addEventListener("click", () => sortBy(n));
      return make("th", { scope: "col", class: n ? "number" : null }, button);
    });
    let sorted = -1, sign = 1;
    function sortBy(n) {
      sign = n === sorted ? -sign : columns[n][2];
      sorted = n;
      heads.forEach((head, other) => {
        if (other === n) head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
        else head.removeAttribute("aria-sort");
      });
      const value = columns[n][1], number = (share) => make("td", { class: "number", text: percent(Number(share.toPrecision(3))) });
      rows.sort((a, b) => (value(a) < value(b) ? -sign : value(a) > value(b) ? sign : b.pictures - a.pictures || a.name - b.name));
      body.replaceChildren(...rows.map((row) => {
        const show = make("button", { type: "button", class: "link", title: "Show its pictures", text: word(row.name) });
        show.addEventListener("click", () => showClass(run, row.name, told.labelled));
        const share = make("td", { class: "number" }, make("meter", { min: 0, max: 1, value: mean(row.kept), "aria-hidden": "true" }),
          ` ${percent(mean(row.kept))}`);
        return make("tr", {}, make("th", { scope: "row" }, show), make("td", { class: "number", text: row.pictures.toLocaleString("en") }), share,
          ...row.kept.map(number), number(row.before), number(row.after));
      }));
    }
    sortBy(2);
    const caption = told.rows.length < told.classes ? `The ${told.rows.length} most frequent classes` : "Every class";
    const table = make("table", { class: "rows sortable" },
      make("caption", {}, make("span", { text: `${caption}: pictures that keep the class, and its mean score as it is and swapped` })),
      make("thead", {}, make("tr", {}, ...heads)), body);
    place.append(make("div", { class: "scroll long", tabindex: "0", role: "region", "aria-label": "Dependence on colour" }, table));
    return place;
  }

  function showClass(run, name, labelled) {
    for (const id of ["name", "low", "high", "status", "swapped"]) $(id).value = "";
    $("run").value = runs.indexOf(run);
    $("class").value = word(name);
    $("answer").value = labelled ? "right" : "";
    select($("tab-gallery"));
    $("tab-gallery").focus();
    window.scrollTo(0, 0);
    choose();
  }

  function dataset() {
    const place = $("dataset");
    for (const run of runs) {
      const told = run.views;
      place.append(make("h2", { text: run.name }));
      const share = told.labelled ? `, ${percent(told.right / told.labelled)} of ${told.labelled.toLocaleString("en")} labelled right` : "";
      place.append(make("p", { text: `${plural(run.rows, "row")} of ${data.of.toLocaleString("en")}, ${plural(run.errors, "error")}${share}.` }));
      if (told.scores) place.append(make("h3", { text: "Scores" }), histogram(told.scores));
      place.append(make("h3", { text: "Confusion" }));
      if (told.confusion) place.append(matrix(told.confusion, "How often each label was answered with each class, over all rows", "label", "answer"));
      else place.append(make("p", { class: "quiet", text: "The source gives no labels." }));
      if (told.dominance) {
        place.append(make("h3", { text: "Dominant class" }),
          matrix(told.dominance, "Label, or the explained class where there is none, against the class that dominates the picture, over the rows shown here", "class", "dominant"));
      }
      place.append(make("h3", { text: "Colour" }));
      if (told.colors) place.append(colorBias(told.colors, run));
      else place.append(make("p", { class: "quiet", text: "How far answers depend on colour is known of runs with --color-swap." }));
      if (told.means.length) {
        place.append(make("h3", { text: "Mean heat map of each explained class" }),
          make("p", { class: "quiet", text: "Over the rows shown here, each map stretched to its own range first." }), means(told.means));
      }
    }
  }

  // Errors and settings.

  const PAGE = 200;
  function errors() {
    const place = $("errors"), found = [];
    runs.forEach((run) => run.columns.error.forEach((error, item) => { if (error) found.push([item, run, error]); }));
    $("tab-errors").textContent = `Errors (${found.length.toLocaleString("en")})`;
    if (!found.length) {
      place.append(make("p", { text: "No error rows." }));
      return;
    }
    const kinds = new Map();
    found.forEach(([, , error]) => kinds.set(error[0], (kinds.get(error[0]) || 0) + 1));
    place.append(make("p", { text: [...kinds].sort((a, b) => b[1] - a[1]).map(([kind, number]) => `${number} ${word(kind)}`).join(", ") }));
    const body = make("tbody"), where = make("span", { role: "status" });
    const back = make("button", { type: "button", text: "Previous page" }), on = make("button", { type: "button", text: "Next page" });
    const head = ["name", ...(runs.length > 1 ? ["run"] : []), "error", "message"];
    const table = make("table", { class: "rows" }, make("caption", { text: "Rows without an explanation" }),
      make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { scope: "col", text })))), body);
    let first = 0;
    const turned = (to) => {
      first = to;
      const rows = found.slice(first, first + PAGE);
      body.replaceChildren(...rows.map(([item, run, error]) => make("tr", {}, make("th", { scope: "row", text: items.id[item] }),
        runs.length > 1 ? make("td", { text: run.name }) : null, make("td", { text: word(error[0]) }), make("td", { text: error[1] }))));
      where.textContent = `${first + 1} to ${first + rows.length} of ${found.length}`;
      back.disabled = first === 0;
      on.disabled = first + PAGE >= found.length;
    };
    back.addEventListener("click", () => turned(first - PAGE));
    on.addEventListener("click", () => turned(first + PAGE));
    if (found.length > PAGE) place.append(make("div", { class: "pages" }, back, on, where));
    place.append(table);
    turned(0);
  }

  function settings() {
    for (const run of runs) {
      const table = make("table", { class: "rows" }, make("caption", { text: "As _run.json has them" }));
      run.facts.forEach(([name, value]) => table.append(make("tr", {}, make("th", { scope: "row", text: name }), make("td", { text: value }))));
      $("runs").append(make("h2", { text: run.name }), table);
    }
  }

  // Tabs and controls.

  const tabs = [...document.querySelectorAll("[role=tab]")];
  const built = { dataset, runs: settings };
  function select(tab) {
    tabs.forEach((other) => {
      const chosen = other === tab;
      other.setAttribute("aria-selected", String(chosen));
      other.tabIndex = chosen ? 0 : -1;
      $(other.getAttribute("aria-controls")).hidden = !chosen;
    });
    const name = tab.getAttribute("aria-controls");
    // Made when they are first looked at.
    if (built[name]) { built[name](); delete built[name]; }
    if (name === "gallery") layOut();
  }
  tabs.forEach((tab, n) => {
    tab.addEventListener("click", () => select(tab));
    tab.addEventListener("keydown", (event) => {
      const to = { ArrowRight: n + 1, ArrowLeft: n - 1, Home: 0, End: tabs.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      const other = tabs[(to + tabs.length) % tabs.length];
      select(other);
      other.focus();
    });
  });

  const form = $("filters");
  const look = () => {
    document.documentElement.style.setProperty("--opacity", String($("opacity").value / 100));
    $("opacity").setAttribute("aria-valuetext", `${$("opacity").value} %`);
    grid.classList.toggle("boxes", $("boxes").checked);
    detail.classList.toggle("boxes", $("boxes").checked);
  };
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", (event) => {
    if (["opacity", "boxes"].includes(event.target.id)) look();
    else choose();
  });
  form.addEventListener("reset", () => setTimeout(() => { look(); choose(); }));
  let waiting = false;
  window.addEventListener("scroll", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; show(); });
  }, { passive: true });
  let width = 0;
  new ResizeObserver(() => { if (grid.clientWidth !== width) { width = grid.clientWidth; layOut(); } }).observe(grid);

  // Start.

  $("title").textContent = runs.map((run) => run.name).join(", ");
  const all = count === data.of ? plural(count, "picture") : `${plural(count, "picture")} of ${data.of.toLocaleString("en")} in the source`;
  $("summary").textContent = `${all}, ${plural(runs.length, "run")}`;
  runs.forEach((run, n) => $("run").append(make("option", { value: n, text: run.name })));
  $("run-label").hidden = runs.length < 2;
  const known = new Set(runs.flatMap((run) => run.columns.class));
  data.labels.forEach(([, name]) => known.add(name));
  known.delete(null);
  [...known].map(word).sort().slice(0, 2000).forEach((text) => $("classes").append(make("option", { value: text })));
  errors();
  look();
  choose();
})();
