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
  for (const { dataset } of cards) reviews[dataset.key] = dataset.mark;
  try { localStorage.setItem(place, JSON.stringify(reviews)); } catch { /* a browser may forbid it */ }
}

function setMark(card, mark) {
  card.dataset.mark = mark;
  for (const name of ["accept", "reject"])
    card.querySelector("button." + name).setAttribute("aria-pressed", String(mark === name));
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
    `${shown} of ${cards.length}, ${count("accept")} accepted, ${count("reject")} rejected`;
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
  const reviews = cards.filter((card) => card.dataset.mark).map(({ dataset }) => ({
    key: dataset.key, mark: dataset.mark, video: dataset.video, frames: dataset.frames,
    describer: dataset.describer,
  }));
  const all = [...reviews, ...others.values()];
  return JSON.stringify({ format: "mapo-label-marks-1", marks: all }, null, 1) + "\n";
}

function load(text) {
  const content = JSON.parse(text);
  if (content.format !== "mapo-label-marks-1") throw new Error("this file holds no reviews");
  const reviews = new Map(content.marks.map((row) => [row.key, row.mark]));
  for (const row of content.marks) if (!here.has(row.key)) others.set(row.key, row);
  for (const card of cards) {
    const mark = reviews.get(card.dataset.key);
    if (mark === "accept" || mark === "reject") setMark(card, mark);
  }
}

document.addEventListener("click", (event) => {
  const button = event.target.closest(".marks button");
  if (!button) return;
  const card = button.closest("article");
  const mark = button.className;
  setMark(card, card.dataset.mark === mark ? "" : mark);
  remember();
  filter();
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
for (const card of cards) {
  const mark = kept()[card.dataset.key];
  if (!card.dataset.mark && ["accept", "reject"].includes(mark)) setMark(card, mark);
}
filter();
