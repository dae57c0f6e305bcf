// The page: once a second it asks v1/pool and draws what it hears. No library, no build, nothing from elsewhere.
"use strict";

const POLL_MS = 1000;
const HISTORY_S = 300;
const FADE_MS = 700;
const WHERE = { pool: 3, host: 2, disk: 1 };
const WORDS = { pool: "pool", host: "host memory", disk: "disk" };

const $ = (id) => document.getElementById(id);
const calm = matchMedia("(prefers-reduced-motion: reduce)");

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = (n) => (n >= 1e6 ? `${(n / 1e6).toFixed(1)} M` : n >= 1e5 ? `${(n / 1e3).toFixed(0)} k` : whole.format(n));
const seconds = (s) => (s === null || s === undefined ? "–" : s < 0.9995 ? `${Math.round(s * 1000)} ms` : `${s.toFixed(s < 10 ? 2 : 1)} s`);

// ---- Asking the server

function headers() {
  const key = sessionStorage.getItem("key");
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key-text").value);
  $("key").hidden = true;
});

// ---- Colours: each adapter has a hue of its own for as long as the page is open

const hues = new Map();
function hue(adapter) {
  if (!hues.has(adapter)) hues.set(adapter, (40 + hues.size * 137.508) % 360);
  return hues.get(adapter);
}

let theme = {};
function readTheme() {
  const style = getComputedStyle(document.documentElement);
  const read = (name) => style.getPropertyValue(`--${name}`).trim();
  theme = Object.fromEntries(["ground", "ink", "quiet", "line", "free", "prefix", "base", "accent", "second"].map((n) => [n, read(n)]));
  theme.weights = (adapter) => `oklch(${read("weight-l")} ${read("weight-c")} ${hue(adapter)})`;
  theme.kv = (adapter) => `oklch(${read("kv-l")} ${read("kv-c")} ${hue(adapter)})`;
  theme.sans = read("sans");
}

function colour(owner) {
  if (owner.kind === "free") return theme.free;
  if (owner.kind === "prefix") return theme.prefix;
  if (owner.adapter === null) return theme.base;
  return owner.kind === "kv" ? theme.kv(owner.adapter) : theme.weights(owner.adapter);
}

function words(owner) {
  if (owner.kind === "free") return "free";
  if (owner.kind === "prefix") return "KV of a prompt, kept for prompts that begin alike";
  if (owner.kind === "kv") return owner.adapter === null ? "KV of a request to the base model" : `KV of a request to ${owner.adapter}`;
  return owner.adapter === null ? "weights of an adapter that was replaced or unloaded" : `weights of ${owner.adapter}`;
}

// ---- The picture of the pool

const picture = {
  canvas: $("pool"),
  cells: [], // an owner's key each
  colours: [],
  fading: new Map(), // cell -> [colour before, when]
  owners: new Map(),
  perCell: 1,
  lit: null, // an adapter whose cells stand out
  frame: 0,
};

const keyOf = (owner) => `${owner.kind} ${owner.adapter ?? ""}`;

function takePicture(seen) {
  const now = performance.now();
  const cells = [];
  for (let i = 0; i < seen.runs.length; i += 2) {
    const owner = seen.owners[seen.runs[i]];
    const key = keyOf(owner);
    picture.owners.set(key, owner);
    for (let n = seen.runs[i + 1]; n > 0; n--) cells.push(key);
  }
  if (cells.length === picture.cells.length && !calm.matches) {
    for (let i = 0; i < cells.length; i++) {
      if (cells[i] !== picture.cells[i]) picture.fading.set(i, [colour(picture.owners.get(picture.cells[i])), now + Math.random() * 350]);
    }
  } else {
    picture.fading.clear();
  }
  picture.cells = cells;
  picture.perCell = seen.pages_per_cell;
  drawPool();
}

function layout() {
  const width = picture.canvas.clientWidth;
  const most = Math.min(340, Math.max(200, innerHeight * 0.4));
  const count = Math.max(picture.cells.length, 1);
  let size = Math.floor(Math.sqrt((width * most) / count));
  while (size > 3 && Math.ceil(count / Math.floor(width / size)) * size > most) size--;
  size = Math.max(3, Math.min(size, 22));
  const columns = Math.max(1, Math.floor(width / size));
  const pitch = width / columns;
  return { columns, pitch, gap: size > 9 ? 2 : size > 4 ? 1 : 0.5, width, height: Math.ceil(count / columns) * pitch };
}

function sized(canvas, width, height) {
  const scale = devicePixelRatio || 1;
  const [w, h] = [Math.round(width * scale), Math.round(height * scale)];
  if (canvas.width !== w || canvas.height !== h) [canvas.width, canvas.height] = [w, h];
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  return pen;
}

function drawPool() {
  cancelAnimationFrame(picture.frame);
  if (!picture.cells.length) return;
  const { columns, pitch, gap, width, height } = layout();
  picture.canvas.style.height = `${height}px`;
  const pen = sized(picture.canvas, width, height);
  pen.clearRect(0, 0, width, height);
  const colours = new Map([...picture.owners].map(([key, owner]) => [key, colour(owner)]));
  const radius = pitch > 9 ? 2.5 : pitch > 5 ? 1 : 0;
  const side = pitch - gap;
  const now = performance.now();

  function cell(i, fill, alpha) {
    const x = (i % columns) * pitch;
    const y = Math.floor(i / columns) * pitch;
    pen.globalAlpha = alpha;
    pen.fillStyle = fill;
    if (radius) {
      pen.beginPath();
      pen.roundRect(x, y, side, side, radius);
      pen.fill();
    } else {
      pen.fillRect(x, y, side, side);
    }
  }

  for (let i = 0; i < picture.cells.length; i++) {
    const key = picture.cells[i];
    const isLit = picture.lit === null || picture.owners.get(key).adapter === picture.lit;
    const alpha = isLit ? 1 : 0.16;
    const fade = picture.fading.get(i);
    if (fade) {
      const share = Math.min(Math.max((now - fade[1]) / FADE_MS, 0), 1);
      cell(i, fade[0], alpha * (1 - share));
      cell(i, colours.get(key), alpha * share);
      if (share === 1) picture.fading.delete(i);
    } else {
      cell(i, colours.get(key), alpha);
    }
  }
  pen.globalAlpha = 1;
  if (picture.fading.size) picture.frame = requestAnimationFrame(drawPool);
}

picture.canvas.addEventListener("mousemove", (event) => {
  const { columns, pitch } = layout();
  const i = Math.floor(event.offsetY / pitch) * columns + Math.floor(event.offsetX / pitch);
  const key = picture.cells[i];
  if (key === undefined || event.offsetX >= columns * pitch) return;
  const first = 1 + i * picture.perCell; // page 0 is nobody's
  $("hint").textContent = `Page ${whole.format(first)}: ${words(picture.owners.get(key))}.`;
  light(picture.owners.get(key).adapter);
});
const hint = $("hint").textContent;
picture.canvas.addEventListener("mouseleave", () => {
  $("hint").textContent = hint;
  light(null);
});

function light(adapter) {
  if (picture.lit === adapter) return;
  picture.lit = adapter;
  drawPool();
}

function drawLegend(seen) {
  const total = Object.values(seen.pages).reduce((a, b) => a + b, 0);
  const percent = (n) => `${((100 * n) / total).toFixed(n && n < total / 100 ? 1 : 0)} %`;
  const parts = [
    ["adapters", "adapters", null],
    ["KV of running requests", "kv", null],
    ["prompts kept", "prefix", theme.prefix],
    ["free", "free", theme.free],
  ];
  const legend = $("legend");
  legend.replaceChildren(
    ...parts.map(([name, kind, fill]) => {
      const item = element("span");
      const swatch = element("i", "", "swatch");
      const some = seen.adapters.slice(0, 3).map((a) => a.name);
      const shade = kind === "kv" ? theme.kv : theme.weights;
      if (fill) swatch.style.background = fill;
      else if (some.length) swatch.style.background = `linear-gradient(90deg, ${[...some, some[0]].map(shade).join(", ")})`;
      else swatch.style.background = theme.base;
      item.append(swatch, name, element("b", `${whole.format(seen.pages[kind])} · ${percent(seen.pages[kind])}`));
      return item;
    }),
  );
  const each = picture.perCell > 1 ? `, ${picture.perCell} to a cell` : "";
  $("pool-note").textContent = `${whole.format(total)} pages of ${seen.page_tokens} tokens${each}`;
  picture.canvas.setAttribute("aria-label", `The pool: ${parts.map(([name, kind]) => `${seen.pages[kind]} pages ${name}`).join(", ")}`);
}

// ---- Plots of the last minutes

const past = []; // {at, generated, prompt, p50, p95, running, waiting}; at in seconds
let before = null;

function remember(seen) {
  const at = performance.now() / 1000;
  const { generated_tokens: generated, prompt_tokens: prompt, cached_tokens: cached, running, waiting } = seen.stats;
  if (before && at > before.at) {
    const took = at - before.at;
    const rate = (now, then) => Math.max(0, now - then) / took;
    past.push({ at, generated: rate(generated, before.generated), prompt: rate(prompt - cached, before.prompt), p50: seen.first_token.p50, p95: seen.first_token.p95, running, waiting });
  }
  before = { at, generated, prompt: prompt - cached };
  while (past.length && past[0].at < at - HISTORY_S) past.shift();
}

function nice(most) {
  if (!(most > 0)) return 1;
  const unit = 10 ** Math.floor(Math.log10(most));
  return [1, 2, 2.5, 5, 10].map((n) => n * unit).find((n) => n >= most * 1.02) ?? 10 * unit;
}

function smoothed(points, width = 5) {
  // The mean of some seconds: one step of the engine more or less in a second is no news.
  return points.map((_, i) => {
    const some = points.slice(Math.max(0, i - width + 1), i + 1).filter((v) => v !== null);
    return some.length ? some.reduce((a, b) => a + b, 0) / some.length : null;
  });
}

function plot(canvas, lines, format) {
  const width = canvas.clientWidth;
  const height = canvas.clientHeight;
  const pen = sized(canvas, width, height);
  pen.clearRect(0, 0, width, height);
  const [left, right, top, bottom] = [0, 0, 8, 18];
  const most = nice(Math.max(0, ...lines.flatMap((line) => line.values.filter((v) => v !== null))));
  const now = performance.now() / 1000;
  // The time shown grows with what is known, from one minute on.
  const shown = Math.min(HISTORY_S, Math.max(60, past.length ? now - past[0].at : 0));
  const x = (at) => left + (1 - (now - at) / shown) * (width - left - right);
  const y = (value) => height - bottom - (value / most) * (height - top - bottom);
  pen.font = `11px ${theme.sans}`;
  pen.fillStyle = theme.quiet;
  pen.strokeStyle = theme.line;
  pen.lineWidth = 1;
  for (const share of [0, 0.5, 1]) {
    const level = Math.round(y(most * share)) + 0.5;
    pen.beginPath();
    pen.moveTo(left, level);
    pen.lineTo(width, level);
    pen.stroke();
    if (share) pen.fillText(format(most * share), 0, level + 12);
  }
  pen.fillText(shown > 90 ? `${Math.round(shown / 60)} min ago` : `${Math.round(shown)} s ago`, 0, height - 3);
  pen.textAlign = "right";
  pen.fillText("now", width, height - 3);
  pen.textAlign = "left";
  for (const { values, stroke, filled } of lines) {
    const pieces = []; // a line ends where nothing is known
    values.forEach((value, i) => {
      if (value === null) return;
      if (i === 0 || values[i - 1] === null) pieces.push([]);
      pieces.at(-1).push([x(past[i].at), y(value)]);
    });
    pen.strokeStyle = pen.fillStyle = stroke;
    pen.lineWidth = 1.6;
    pen.lineJoin = "round";
    for (const points of pieces) {
      const path = new Path2D();
      points.forEach(([px, py]) => path.lineTo(px, py));
      pen.stroke(path);
      if (!filled) continue;
      path.lineTo(points.at(-1)[0], y(0));
      path.lineTo(points[0][0], y(0));
      pen.globalAlpha = 0.12;
      pen.fill(path);
      pen.globalAlpha = 1;
    }
  }
}

function drawPlots() {
  const axis = (s) => (s < 1 ? `${Math.round(s * 1000)} ms` : `${Number(s.toFixed(2))} s`);
  const line = (name) => past.map((p) => p[name] ?? null);
  plot($("plot-rate"), [{ values: smoothed(line("prompt")), stroke: theme.second }, { values: smoothed(line("generated")), stroke: theme.accent, filled: true }], short);
  plot($("plot-first"), [{ values: line("p95"), stroke: theme.second }, { values: line("p50"), stroke: theme.accent, filled: true }], axis);
  plot($("plot-load"), [{ values: line("waiting"), stroke: theme.second }, { values: line("running"), stroke: theme.accent, filled: true }], short);
}

function note(id, parts) {
  // Words with a swatch of their line's colour each.
  $(id).replaceChildren(
    ...parts.flatMap(([text, stroke], i) => {
      const mark = element("span", "●");
      mark.style.color = stroke;
      return [i ? " \u2002" : "", mark, ` ${text}`];
    }),
  );
}

// ---- Adapters

const counted = new Map(); // name -> [at, tokens, rate]

function rateOf(name, tokens) {
  const now = performance.now() / 1000;
  const known = counted.get(name);
  if (!known) {
    counted.set(name, [now, tokens, 0]);
    return 0;
  }
  const [at, had, rate] = known;
  if (now - at < 0.5) return rate;
  const current = Math.max(0, tokens - had) / (now - at);
  const next = 0.7 * rate + 0.3 * current;
  counted.set(name, [now, tokens, next < 0.05 ? 0 : next]);
  return counted.get(name)[2];
}

function kvPages(seen) {
  const pages = new Map();
  for (let i = 0; i < seen.runs.length; i += 2) {
    const owner = seen.owners[seen.runs[i]];
    if (owner.kind === "kv") pages.set(owner.adapter, (pages.get(owner.adapter) ?? 0) + seen.runs[i + 1] * seen.pages_per_cell);
  }
  return pages;
}

const rows = new Map();

function row(name) {
  const tr = element("tr");
  const cells = Array.from({ length: 8 }, (_, i) => element("td", "", i > 1 ? "n" : ""));
  const label = element("span", "", "name");
  const swatch = element("i", "", "swatch");
  const pin = element("span", "", "pin");
  label.append(swatch, name ?? "base model", pin);
  cells[0].append(label);
  const where = element("span", "", "where");
  const track = element("span", "", "track");
  track.append(element("i"), element("i"), element("i"));
  const place = element("span", "");
  where.append(track, place);
  if (name !== null) cells[1].append(where);
  else cells[1].append(element("span", "always", "quiet"));
  const meter = element("span", "", "meter");
  const bar = element("i");
  const rate = element("span");
  meter.append(bar, rate);
  cells[7].append(meter);
  tr.append(...cells);
  tr.addEventListener("mouseenter", () => light(name));
  tr.addEventListener("mouseleave", () => light(null));
  return { tr, cells, swatch, pin, track, place, bar, rate };
}

function drawAdapters(seen) {
  const kv = kvPages(seen);
  const list = [{ name: null, rank: null, pages: null, ...seen.base }, ...seen.adapters];
  const rates = list.map((a) => rateOf(a.name, a.tokens));
  const most = Math.max(1, ...rates);
  const shown = list.map((adapter, i) => {
    if (!rows.has(adapter.name)) rows.set(adapter.name, row(adapter.name));
    const made = rows.get(adapter.name);
    const fill = adapter.name === null ? theme.base : theme.weights(adapter.name);
    made.swatch.style.background = fill;
    if (adapter.name !== null) {
      made.pin.textContent = adapter.pinned ? "pinned" : "";
      [...made.track.children].forEach((dot, n) => dot.classList.toggle("on", n < WHERE[adapter.tier]));
      made.place.textContent = WORDS[adapter.tier];
    }
    const values = [adapter.rank, adapter.pages, kv.get(adapter.name) ?? 0, adapter.requests, adapter.tokens];
    values.forEach((value, n) => (made.cells[2 + n].textContent = value === null ? "" : value === 0 ? "·" : short(value)));
    made.bar.style.width = `${(78 * rates[i]) / most}%`;
    made.bar.style.background = fill;
    made.rate.textContent = rates[i] ? rates[i].toFixed(rates[i] < 10 ? 1 : 0) : "·";
    return made.tr;
  });
  const body = $("adapters");
  if (shown.length !== body.children.length || shown.some((tr, i) => tr !== body.children[i])) body.replaceChildren(...shown);
  const { pool, host, disk } = seen.tiers;
  const all = pool + host + disk;
  const rest = all > seen.adapters.length ? ` · ${seen.adapters.length} of ${whole.format(all)} shown` : "";
  $("tiers").textContent = `${whole.format(pool)} in the pool · ${whole.format(host)} in host memory · ${whole.format(disk)} on disk${rest}`;
}

// ---- The playground

const asked = new Set([null]);
const offered = [null];
let model = "";
let takesChats = false;
let running = null;

function offer(names) {
  let isNew = false;
  for (const name of names) {
    if (!offered.includes(name)) {
      offered.push(name);
      isNew = true;
      if (asked.size < 5) asked.add(name);
    }
  }
  if (isNew) drawWho();
}

function drawWho() {
  $("who").replaceChildren(
    ...offered.map((name) => {
      const button = element("button");
      button.type = "button";
      const swatch = element("i", "", "swatch");
      swatch.style.background = name === null ? theme.base : theme.weights(name);
      button.append(swatch, name ?? "base model");
      button.setAttribute("aria-pressed", asked.has(name));
      button.addEventListener("click", () => {
        if (!asked.delete(name)) asked.add(name);
        button.setAttribute("aria-pressed", asked.has(name));
      });
      return button;
    }),
  );
}

$("another").addEventListener("change", () => {
  const name = $("another").value.trim();
  if (!name) return;
  if (!offered.includes(name)) offered.push(name);
  asked.add(name);
  $("another").value = "";
  drawWho();
});

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function ask(name, question, signal) {
  const card = element("article", undefined, "busy");
  const paragraph = element("p");
  const foot = element("small", "…");
  card.append(element("h3", name ?? "base model"), paragraph, foot);
  card.style.borderTopColor = name === null ? theme.base : theme.weights(name);
  $("answers").append(card);
  const body = { model: name ?? model, max_tokens: Number($("tokens").value) || 64, temperature: Number($("temperature").value) || 0, stream: true, stream_options: { include_usage: true } };
  if (takesChats) body.messages = [{ role: "user", content: question }];
  else body.prompt = question;
  const start = performance.now();
  let first = null;
  let tokens = 0;
  try {
    const response = await fetch(takesChats ? "v1/chat/completions" : "v1/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...headers() },
      body: JSON.stringify(body),
      signal,
    });
    if (!response.ok) throw new Error(await failure(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const said = event.choices?.[0]?.delta?.content ?? event.choices?.[0]?.text ?? "";
      if (said && first === null) first = performance.now() - start;
      if (said) paragraph.append(said);
      if (event.usage) tokens = event.usage.completion_tokens;
    }
    const took = (performance.now() - start) / 1000;
    foot.textContent = `${tokens} tokens · first in ${seconds(first === null ? null : first / 1000)}, all in ${seconds(took)}`;
  } catch (error) {
    if (error.name === "AbortError") {
      foot.textContent = "stopped";
    } else {
      card.classList.add("failed");
      paragraph.textContent = error.message;
      foot.textContent = "";
    }
  }
  card.classList.remove("busy");
}

$("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || running) return;
  running = new AbortController();
  $("answers").replaceChildren();
  $("go").disabled = true;
  $("halt").disabled = false;
  await Promise.all(offered.filter((name) => asked.has(name)).map((name) => ask(name, question, running.signal)));
  running = null;
  $("go").disabled = false;
  $("halt").disabled = true;
});
$("halt").addEventListener("click", () => running?.abort());
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
});

// ---- Once a second

let latest = null;

function draw() {
  if (!latest) return;
  const { stats, first_token: first } = latest;
  drawLegend(latest);
  drawPlots();
  drawAdapters(latest);
  const now = past.length ? smoothed(past.slice(-5).map((p) => p.generated)).at(-1) : 0;
  const prompts = past.length ? smoothed(past.slice(-5).map((p) => p.prompt)).at(-1) : 0;
  $("running").textContent = whole.format(stats.running);
  $("waiting").textContent = whole.format(stats.waiting);
  $("rate").textContent = whole.format(now);
  $("first").textContent = seconds(first.p50);
  note("rate-now", [[`${whole.format(now)} generated`, theme.accent], [`${whole.format(prompts)} of prompts`, theme.second]]);
  note("first-now", [[`median ${seconds(first.p50)}`, theme.accent], [`p95 ${seconds(first.p95)}`, theme.second]]);
  note("load-now", [[`${whole.format(stats.running)} running`, theme.accent], [`${whole.format(stats.waiting)} waiting`, theme.second]]);
  const all = Object.values(latest.tiers).reduce((a, b) => a + b, 0);
  $("summary").textContent =
    `${whole.format(all)} adapters · ${short(stats.generated_tokens)} tokens in ${short(stats.steps)} steps · ` +
    `${short(stats.adapter_loads)} loads · ${short(stats.evictions)} evictions`;
}

function redraw() {
  readTheme();
  drawWho();
  drawPool();
  draw();
}

async function look() {
  try {
    const response = await fetch("v1/pool", { headers: headers(), signal: AbortSignal.timeout(10000) });
    if (response.status === 401 || response.status === 403) {
      $("key").hidden = false;
      $("summary").textContent = "waiting for a key";
      return;
    }
    if (!response.ok) throw new Error(await failure(response));
    latest = await response.json();
    $("key").hidden = true;
    model = latest.model;
    takesChats = latest.takes_chats;
    $("model").textContent = document.title = model;
    $("playground").hidden = !latest.takes_text;
    for (const name of latest.adapters.map((a) => a.name).sort()) hue(name);
    offer(latest.adapters.slice(0, 8).map((a) => a.name).sort());
    if ($("names").children.length !== latest.adapters.length) {
      $("names").replaceChildren(...latest.adapters.map((a) => Object.assign(element("option"), { value: a.name })));
    }
    remember(latest);
    takePicture(latest);
    draw();
  } catch (error) {
    $("summary").textContent = `the server does not answer: ${error.message}`;
  }
}

async function watch() {
  // One question at a time, and none while nobody looks.
  if (!document.hidden) await look();
  setTimeout(watch, POLL_MS);
}

readTheme();
drawWho();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
addEventListener("resize", redraw);
watch();
