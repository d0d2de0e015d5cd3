// Keeps the page current. Everything shown is rendered and escaped by the server; without this
// script every page still works, as of when it was loaded.
"use strict";

const content = document.getElementById("content");
const bar = document.querySelector(".live");

// "in 3 min 20 s": the same words as the server's, counted on from here.
function span(seconds) {
  const d = Math.floor(seconds / 86400), h = Math.floor(seconds / 3600) % 24;
  const m = Math.floor(seconds / 60) % 60, s = seconds % 60;
  if (d >= 365) return `${Math.floor(d / 365)} y ${d % 365} d`;
  if (d) return `${d} d ${h} h`;
  if (h) return `${h} h ${m} min`;
  if (m) return `${m} min ${s} s`;
  return `${s} s`;
}

function tick() {
  const now = Math.floor(Date.now() / 1000);
  for (const time of content.querySelectorAll("time[data-at]")) {
    const left = Number(time.dataset.at) - now;
    time.textContent = left > 0 ? `in ${span(left)}` : left === 0 ? "now" : `${span(-left)} ago`;
  }
}

function show(html) {
  const active = document.activeElement;
  // Typing in the search field must survive an update, and so must the focus on a row.
  const typed = active && active.id === "q" ? { value: active.value, at: active.selectionStart } : null;
  const key = active && active.dataset ? active.dataset.key : null;
  content.innerHTML = html;
  const field = document.getElementById("q");
  if (typed && field) {
    field.value = typed.value;
    field.focus();
    field.setSelectionRange(typed.at, typed.at);
  } else if (key) {
    const same = content.querySelector(`[data-key="${CSS.escape(key)}"]`);
    if (same) same.focus();
  }
  tick();
}

function live(url) {
  const state = bar.querySelector(".state"), pause = bar.querySelector(".pause");
  let paused = false, waiting = null;
  bar.hidden = false;
  const say = (words, on) => {
    state.textContent = words;
    bar.classList.toggle("on", on);
  };
  const source = new EventSource(url);
  source.onopen = () => say(paused ? "Paused" : "Live", !paused);
  // The browser reconnects by itself; what is on the page meanwhile is old, and says so.
  source.onerror = () => say(source.readyState === EventSource.CLOSED ? "Not live: reload the page" : "Reconnecting", false);
  source.addEventListener("fragment", (event) => {
    if (paused) waiting = event.data;
    else show(event.data);
  });
  pause.addEventListener("click", () => {
    paused = !paused;
    pause.setAttribute("aria-pressed", String(paused));
    pause.textContent = paused ? "Resume" : "Pause";
    say(paused ? "Paused" : "Live", !paused);
    if (!paused && waiting !== null) {
      show(waiting);
      waiting = null;
    }
  });
}

if (content.dataset.live) live(content.dataset.live);
setInterval(tick, 1000);

for (const button of document.querySelectorAll("button[data-copy]")) {
  if (!navigator.clipboard) continue;
  button.hidden = false;
  button.addEventListener("click", async () => {
    const label = "Copy as command";
    try {
      await navigator.clipboard.writeText(button.dataset.copy);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Select it and copy";
    }
    setTimeout(() => { button.textContent = label; }, 2000);
  });
}
