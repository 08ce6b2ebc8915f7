"use strict";
// Everything that arrives is shown as text. Pictures are painted into canvases, pixel by pixel.
const $ = (id) => document.getElementById(id);
const PAIRS = [["ArrowLeft", "ArrowRight"], ["ArrowDown", "ArrowUp"], ["s", "w"], ["q", "e"],
  ["j", "l"], ["k", "i"], ["f", "h"], ["g", "t"], ["z", "x"], ["c", "v"], ["b", "m"], ["u", "o"]];
const NAMES = { ArrowLeft: "←", ArrowRight: "→", ArrowDown: "↓", ArrowUp: "↑" };
const SLOTS = ["body", "action", "target", "direction", "displacement"];
const WAYS = { ArrowLeft: "left", ArrowRight: "right", ArrowUp: "up", ArrowDown: "down" };
const held = new Set();
let hello = null, now = null, serial = 0, pairs = [], sliders = [], levels = [], facts = [], panes = [];
let real = [], expected = [], doubts = [], timer = 0;

const key = new URLSearchParams(location.search).get("key") || "";
const socket = new WebSocket(`ws://${location.host}/play?key=${encodeURIComponent(key)}`);
socket.binaryType = "arraybuffer";
const say = (command) => { if (socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify(command)); };

function trouble(text, lasting) {
  clearTimeout(timer);
  $("trouble").textContent = text;
  $("trouble").hidden = !text;
  if (text && !lasting) timer = setTimeout(() => { $("trouble").hidden = true; }, 8000);
}

socket.onclose = (event) => {
  const why = event.code === 1009 ? "the message was too long" : event.reason;
  trouble(`The play has ended${why ? ": " + why : ""}. Reload this page to play again.`, true);
  for (const one of document.querySelectorAll("button, input")) one.disabled = true;
};
socket.onmessage = (event) => {
  if (typeof event.data !== "string") return show(event.data);
  const said = JSON.parse(event.data);
  if (said.is === "hello") greet(said);
  else if (said.is === "error") trouble(said.text);
  else if (said.is === "saved") saved(said);
  else if (said.is === "told") told(said.slots);
};

function make(kind, text, parent, name) {
  const one = document.createElement(kind);
  if (text) one.textContent = text;
  if (name) one.className = name;
  if (parent) parent.append(one);
  return one;
}

function greet(said) {
  hello = said;
  $("about").textContent = said.task;
  const titles = ["Reality", ...said.names.map((name) => said.names.length > 1 ? `Dream: ${name}` : "Dream")];
  if (said.names.length === 1) $("about").textContent += ` · ${said.names[0]}`;
  titles.forEach((title, i) => {
    const figure = make("figure", "", $("panes"));
    figure.style.setProperty("--tone", `var(--${["real", "dream", "other"][Math.min(i, 2)]})`);
    const caption = make("figcaption", "", figure);
    make("b", title, caption);
    const note = make("span", "", caption, "soft");
    const canvas = make("canvas", "", figure);
    canvas.width = canvas.height = said.side;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", title);
    facts.push({ note, line: make("p", "", figure, "facts") });
    panes.push(canvas.getContext("2d"));
  });
  $("start-name").textContent = said.driver === "action" ? "Reset seed" : `Clip (0 to ${said.starts - 1})`;
  $("start").max = said.starts - 1;
  $("auto").hidden = !said.auto;
  $("auto-name").textContent = said.driver === "action" ? "Agent drives" : "Phrases of the clip";
  speed(said.fps);
  if (said.driver === "phrase") phrases(said.suggestions);
  else if (said.width) axes();
  $("unled").hidden = said.driver !== "nothing";
}

function speed(fps) {
  $("speed").value = fps;
  $("fps").textContent = `${fps} / s`;
}

function axes() {
  $("keys").hidden = false;
  pairs = PAIRS.slice(0, hello.width).map((pair) => [...pair]);
  if (hello.downwards && pairs.length > 1) pairs[1].reverse();
  for (let i = 0; i < hello.width; i++) {
    const row = make("label", "", $("axes"), "axis");
    const pair = pairs[i] ? pairs[i].map((k) => NAMES[k] || k).join(" ") : "";
    make("span", `${i + 1}  ${pair}`, row);
    const slider = make("input", "", row);
    Object.assign(slider, { type: "range", min: -hello.reach, max: hello.reach, step: 0.05, value: 0 });
    slider.setAttribute("aria-label", `Number ${i + 1} of the action`);
    slider.addEventListener("input", act);
    slider.addEventListener("dblclick", () => { slider.value = 0; act(); });
    sliders.push(slider);
    const value = make("output", "0.00", row);
    const level = make("canvas", "", row, "level");
    level.width = 200; level.height = 6;
    levels.push({ value, level: level.getContext("2d") });
  }
  $("key-help").textContent = "Hold the keys to act; sliders stay where you put them, a double click sets one to 0. The bars show what was done.";
}

function phrases(suggestions) {
  $("phrases").hidden = false;
  for (const slot of SLOTS) {
    const label = make("label", slot, $("slots"));
    const input = make("input", "", label);
    input.id = `slot-${slot}`;
    input.autocomplete = "off";
    const known = suggestions[slot] || [];
    if (known.length) {
      const list = make("datalist", "", label);
      list.id = `known-${slot}`;
      input.setAttribute("list", list.id);
      for (const value of known) make("option", "", list).value = value;
      input.value = known[0];
    }
  }
  make("button", "Tell", $("slots"));
}

const slots = () => SLOTS.map((slot) => $(`slot-${slot}`).value);
function told(found) {
  $("told").textContent = found ? `Told: ${found.map((slot) => `[${slot}]`).join("")}` : "Told: nothing.";
  if (found) SLOTS.forEach((slot, i) => { $(`slot-${slot}`).value = found[i]; });
}

function act() {
  const action = sliders.map((slider, i) => {
    let value = Number(slider.value);
    if (pairs[i] && held.has(pairs[i][0])) value -= hello.reach;
    if (pairs[i] && held.has(pairs[i][1])) value += hello.reach;
    return Math.max(-hello.reach, Math.min(hello.reach, value));
  });
  say({ do: "act", action, serial: ++serial });
}

const two = (x) => x === null || x === undefined ? "" : x.toFixed(2);
function show(data) {
  const size = new DataView(data).getUint32(0, true);
  now = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, size)));
  const side = hello.side, bytes = side * side * 3;
  panes.forEach((pane, i) => paint(pane, new Uint8Array(data, 4 + size + i * bytes, bytes), side));
  for (const line of [real, expected, doubts]) line.length = Math.min(line.length, now.last + 1);
  real[now.number] = now.reward;
  expected[now.number] = now.dreamt || now.number ? now.expected : [];
  doubts[now.number] = now.uncertainty;
  facts[0].note.textContent = `${now.ended ? now.ended + ", " : ""}moment ${now.number}`;
  facts[0].line.textContent = now.reward === null ? "" : `reward ${two(now.reward)}`;
  now.expected.forEach((reward, i) => {
    facts[i + 1].note.textContent = now.dreamt ? `${now.dreamt} steps deep` : "watching";
    const said = [now.phrase && `led by ${now.phrase}`, reward === null ? "" : `expects reward ${two(reward)}`, now.uncertainty[i] === null ? "" : `uncertainty ${two(now.uncertainty[i])} nats`];
    facts[i + 1].line.textContent = said.filter(Boolean).join(" · ");
  });
  for (const [id, on] of [["run", now.running], ["auto", now.auto], ["record", now.recording]]) $(id).setAttribute("aria-pressed", String(on));
  $("run").firstChild.textContent = now.running ? "Pause " : "Run ";
  $("place").max = now.last;
  $("place").value = now.number;
  if (document.activeElement !== $("start")) $("start").value = now.start;
  levels.forEach(({ value, level }, i) => bar(value, level, now.action[i] || 0));
  charts();
}

function paint(pane, rgb, side) {
  const image = pane.createImageData(side, side);
  for (let i = 0, j = 0; i < rgb.length; i += 3, j += 4) {
    image.data[j] = rgb[i]; image.data[j + 1] = rgb[i + 1]; image.data[j + 2] = rgb[i + 2]; image.data[j + 3] = 255;
  }
  pane.putImageData(image, 0, 0);
}

const tone = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
function bar(value, level, x) {
  value.textContent = two(x);
  const { width, height } = level.canvas, middle = width / 2;
  level.fillStyle = tone("wash");
  level.fillRect(0, 0, width, height);
  level.fillStyle = tone("real");
  level.fillRect(middle, 0, middle * x / hello.reach, height);
}

function charts() {
  const count = now.expected.length;
  const rows = [{ name: "real", values: real, tone: "real" }];
  for (let i = 0; i < count; i++) rows.push({ name: "expected", values: expected.map((x) => x && x.length ? x[i] : null), tone: i ? "other" : "dream" });
  const any = rows.some((row) => row.values.some((x) => x !== null && x !== undefined));
  $("rewards").parentElement.hidden = !any;
  if (any) chart($("rewards"), rows);
  $("reward").textContent = now.reward === null && now.expected[0] === null ? "" : `real ${two(now.reward) || "none"}, expected ${now.expected.map(two).join(" and ")}`;
  const known = now.uncertainty.some((x) => x !== null);
  $("doubt").hidden = !known;
  if (known) {
    $("uncertainty").textContent = `${now.uncertainty.map(two).join(" and ")} nats`;
    chart($("doubts"), now.uncertainty.map((_, i) => ({ values: doubts.map((x) => x ? x[i] : null), tone: i ? "other" : "dream" })));
  }
}

function chart(canvas, rows) {
  const zoom = window.devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
  canvas.width = Math.round(width * zoom);
  canvas.height = Math.round(height * zoom);
  const pen = canvas.getContext("2d"), last = 160;
  pen.scale(zoom, zoom);
  const from = Math.max(0, now.number - last), to = Math.max(now.number, from + 20);
  const seen = rows.flatMap((row) => row.values.slice(from, to + 1)).filter((x) => typeof x === "number");
  const low = Math.min(0, ...seen), high = Math.max(1e-6, ...seen);
  const x = (n) => 44 + (width - 52) * (n - from) / (to - from), y = (v) => 8 + (height - 16) * (high - v) / (high - low);
  pen.fillStyle = tone("soft");
  pen.font = "12px sans-serif";
  pen.fillText(two(high), 2, 16);
  pen.fillText(two(low), 2, height - 5);
  pen.strokeStyle = tone("line");
  pen.strokeRect(44, 8, width - 52, height - 16);
  for (const row of rows) {
    pen.strokeStyle = tone(row.tone);
    pen.lineWidth = 2;
    pen.beginPath();
    let on = false;
    for (let n = from; n <= now.number; n++) {
      const v = row.values[n];
      if (typeof v !== "number") { on = false; continue; }
      if (on) pen.lineTo(x(n), y(v)); else pen.moveTo(x(n), y(v));
      on = true;
    }
    pen.stroke();
  }
}

function saved(said) {
  $("saved").textContent = `Recorded into ${said.folder}: `;
  for (const name of said.files) {
    const link = make("a", name, $("saved"));
    link.href = `/saved/${encodeURIComponent(name)}?key=${encodeURIComponent(key)}`;
    link.download = name;
  }
  $("saved").hidden = false;
}

const COMMANDS = {
  run: () => say({ do: "run", on: !now.running }),
  step: () => say({ do: "step" }),
  rewind: () => say({ do: "rewind", steps: 1 }),
  dream: () => say({ do: "dream" }),
  auto: () => say({ do: "auto", on: !now.auto }),
  record: () => say({ do: "record", on: !now.recording }),
};
const SHORT = { " ": "run", ".": "step", Backspace: "rewind", d: "dream", a: "auto", r: "record" };
for (const id of Object.keys(COMMANDS)) $(id).addEventListener("click", () => { COMMANDS[id](); $(id).blur(); });
$("place").addEventListener("input", () => say({ do: "go", number: Number($("place").value) }));
$("speed").addEventListener("input", () => {
  speed(Number($("speed").value));
  say({ do: "speed", fps: Number($("speed").value) });
});
$("begin").addEventListener("submit", (event) => {
  event.preventDefault();
  say({ do: "begin", start: Math.trunc(Number($("start").value)) || 0 });
  document.activeElement.blur();
});
$("typed").addEventListener("submit", (event) => { event.preventDefault(); say({ do: "phrase", text: $("text").value }); });
$("slots").addEventListener("submit", (event) => { event.preventDefault(); say({ do: "slots", slots: slots() }); });

document.addEventListener("keydown", (event) => {
  const typing = event.target.tagName === "INPUT" && event.target.type !== "range";
  if (!now || typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const pressed = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const steers = pairs.some((pair) => pair.includes(pressed));
  if (steers) {
    event.preventDefault();
    if (!held.has(pressed)) { held.add(pressed); act(); }
  } else if (hello.driver === "phrase" && WAYS[pressed]) {
    event.preventDefault();
    $("slot-direction").value = WAYS[pressed];
    if (!event.repeat) say({ do: "slots", slots: slots() });
  } else if (pressed === "n") {
    say({ do: "begin", start: (now.start + 1) % hello.starts });
  } else if (SHORT[pressed] && (!event.repeat || pressed === "." || pressed === "Backspace")) {
    if ($(SHORT[pressed]).hidden) return;
    event.preventDefault();
    COMMANDS[SHORT[pressed]]();
  }
});
document.addEventListener("keyup", (event) => {
  const pressed = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (held.delete(pressed)) act();
});
window.addEventListener("blur", () => { if (held.size) { held.clear(); act(); } });
