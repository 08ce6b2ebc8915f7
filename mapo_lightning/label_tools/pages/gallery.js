"use strict";
// Everything shown is in the page already; this hides cards, reviews labels and plays clips.
// In files and in the browser's storage a review is a "mark", as in version 0.1.0.
const cards = [...document.querySelectorAll("article")];
const byId = (id) => document.getElementById(id);
const place = "mapo-label-marks";

const here = new Set(cards.map((card) => card.dataset.key));
// Reviews of labels that this page does not show: kept and exported again.
const others = new Map(JSON.parse(document.querySelector("main").dataset.others).map((row) => [row.key, row]));

function kept() {
  try { return JSON.parse(localStorage.getItem(place) || "{}"); } catch { return {}; }
}

function remember() {
  const reviews = kept();
  for (const { dataset } of cards)
    reviews[dataset.key] = { mark: dataset.mark, slots: dataset.slots, by: dataset.by, at: dataset.at };
  try {
    localStorage.setItem(place, JSON.stringify(reviews));
    localStorage.setItem("mapo-label-by", byId("by").value);
  } catch { /* a browser may forbid it */ }
}

function words(card) {
  const { mark, slots, was } = card.dataset;
  return JSON.parse(mark === "correct" && slots ? slots : was);
}

function show(card) {
  const shown = words(card);
  const list = card.querySelector(".slots");
  list.querySelectorAll("dd").forEach((dd, number) => { dd.textContent = shown[number] || "–"; });
  list.hidden = shown.every((word) => !word);
  const nothing = card.querySelector(".nothing");
  if (nothing) nothing.hidden = !list.hidden;
  card.classList.remove("edited");
}

// A review is of whoever is named in the page at that time; one that was loaded keeps its name.
function setMark(card, mark, by = byId("by").value.trim(), at = new Date().toISOString()) {
  Object.assign(card.dataset, { mark, by: mark && by ? by : "", at: mark && at ? at : "" });
  for (const name of ["accept", "reject", "correct"])
    card.querySelector("button." + name).setAttribute("aria-pressed", String(mark === name));
  show(card);
}

function review(card, mark) {
  setMark(card, card.dataset.mark === mark ? "" : mark);
  remember();
  filter();
}

function edit(card) {
  if (card.classList.contains("edited")) return keep(card);
  const shown = words(card);
  const list = card.querySelector(".slots");
  list.hidden = false;
  card.classList.add("edited");
  list.querySelectorAll("dd").forEach((dd, number) => {
    const input = document.createElement("input");
    input.maxLength = Number(document.querySelector("main").dataset.longest);
    input.value = shown[number];
    input.setAttribute("aria-label", dd.previousElementSibling.textContent);
    dd.replaceChildren(input);
  });
  list.querySelector("input").focus();
}

function keep(card) {
  const slots = [...card.querySelectorAll(".slots input")].map((input) => input.value.trim());
  if (slots.every((word) => !word)) {
    byId("count").textContent = "a corrected label must say something: reject it instead";
    return;
  }
  if (JSON.stringify(slots) === JSON.stringify(JSON.parse(card.dataset.was))) {
    setMark(card, "accept");  // these are the describer's own words
  } else {
    card.dataset.slots = JSON.stringify(slots);
    setMark(card, "correct");
  }
  remember();
  filter();
}

function filter() {
  const words = byId("text").value.toLowerCase().split(/\s+/).filter(Boolean);
  const wanted = { status: byId("status").value, way: byId("way").value, verdict: byId("verdict").value };
  const marked = byId("marked").value;
  let shown = 0;
  for (const card of cards) {
    const data = card.dataset;
    let fits = Object.entries(wanted).every(([name, value]) => !value || data[name] === value);
    fits &&= !marked || (data.mark || "none") === marked;
    const text = (card.textContent + " " + data.key).toLowerCase();
    fits &&= words.every((word) => text.includes(word));
    card.hidden = !fits;
    shown += fits;
  }
  const count = (mark) => cards.filter((card) => card.dataset.mark === mark).length;
  byId("count").textContent =
    `${shown} of ${cards.length}, ${count("accept")} accepted, ${count("reject")} rejected, ` +
    `${count("correct")} corrected`;
  byId("empty").hidden = shown > 0;
}

function play(on) {
  byId("play").setAttribute("aria-pressed", String(on));
  for (const strip of document.querySelectorAll(".strip")) {
    const picture = strip.firstElementChild;
    const frames = Number(strip.dataset.shown);
    picture.getAnimations().forEach((running) => running.cancel());
    strip.style.width = on ? "56%" : "";
    strip.style.margin = on ? "0 auto" : "";
    picture.style.width = on ? `${100 * frames}%` : "";
    picture.style.maxWidth = on ? "none" : "";
    if (!on || frames < 2) continue;
    picture.animate(
      [{ transform: "translateX(0)" }, { transform: `translateX(${(-100 * (frames - 1)) / frames}%)` }],
      { duration: 220 * frames, iterations: Infinity, easing: `steps(${frames}, jump-none)` },
    );
  }
}

function exported() {
  const reviews = cards.filter((card) => card.dataset.mark).map((card) => {
    const { key, mark, video, frames, describer, was, by, at } = card.dataset;
    const changed = mark === "correct" ? { slots: words(card), was: JSON.parse(was) } : {};
    return { key, mark, ...changed, video, frames, describer, by: by || "", at: at || "" };
  });
  const all = [...reviews, ...others.values()];
  return JSON.stringify({ format: "mapo-label-marks-1", marks: all }, null, 1) + "\n";
}

function take(card, row) {
  if (row.mark === "correct") {
    const slots = row.slots;
    const sound = Array.isArray(slots) && slots.length === 5 && slots.every((x) => typeof x === "string");
    if (!sound) throw new Error(`the corrected label ${row.key} has not five slots`);
    card.dataset.slots = JSON.stringify(slots);
  }
  if (["accept", "reject", "correct"].includes(row.mark))
    setMark(card, row.mark, String(row.by || ""), String(row.at || ""));
}

function load(text) {
  const content = JSON.parse(text);
  if (content.format !== "mapo-label-marks-1") throw new Error("this file holds no reviews");
  const reviews = new Map(content.marks.map((row) => [row.key, row]));
  for (const row of content.marks) if (!here.has(row.key)) others.set(row.key, row);
  for (const card of cards) if (reviews.has(card.dataset.key)) take(card, reviews.get(card.dataset.key));
}

let chosen = null;
function choose(card) {
  if (chosen) chosen.classList.remove("here");
  chosen = card;
  if (!card) return;
  card.classList.add("here");
  card.scrollIntoView({ block: "nearest" });
}

function step(by) {
  const shown = cards.filter((card) => !card.hidden);
  const at = shown.indexOf(chosen);
  choose(shown[Math.min(Math.max(at + by, 0), shown.length - 1)] || null);
}

document.addEventListener("keydown", (event) => {
  const card = event.target.closest("article.edited");
  if (card && event.key === "Enter") { keep(card); event.preventDefault(); }
  if (card && event.key === "Escape") show(card);
  if (event.target.closest("input, select") || event.ctrlKey || event.metaKey || event.altKey) return;
  const does = {
    j: () => step(1), k: () => step(-1), a: () => chosen && review(chosen, "accept"),
    r: () => chosen && review(chosen, "reject"), e: () => chosen && edit(chosen),
  }[event.key];
  if (!does) return;
  does();
  event.preventDefault();
});
document.addEventListener("click", (event) => {
  const card = event.target.closest("article");
  if (card) choose(card);
  const button = event.target.closest(".marks button");
  if (!button) return;
  if (button.className === "correct") edit(card); else review(card, button.className);
});
byId("play").addEventListener("click", () => play(byId("play").getAttribute("aria-pressed") !== "true"));
byId("export").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([exported()], { type: "application/json" }));
  link.download = "reviews.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});
byId("load").addEventListener("change", async (event) => {
  try {
    load(await event.target.files[0].text());
    remember();
    filter();
  } catch (error) { byId("count").textContent = "these reviews cannot be read: " + error.message; }
});
byId("filters").addEventListener("input", filter);
byId("filters").addEventListener("submit", (event) => event.preventDefault());
try { byId("by").value = localStorage.getItem("mapo-label-by") || ""; } catch { /* forbidden */ }
for (const card of cards) {
  const before = kept()[card.dataset.key];
  const row = typeof before === "string" ? { mark: before } : { ...before };  // version 0.1.0: a word
  if (row.slots) row.slots = JSON.parse(row.slots);
  if (!card.dataset.mark && row.mark) take(card, row);
  show(card);
}
if (window.top !== window.self) {
  byId("framed").hidden = false;
  byId("export").disabled = true;
}
filter();
