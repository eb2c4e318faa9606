"use strict";
// Shows the problems and answers that fit the filters. Texts are read, never written as markup.
const articles = [...document.querySelectorAll("article")].map((element) => ({
  element,
  benchmark: element.dataset.benchmark,
  text: null, // lower case, made when it is first searched
  generations: [...element.querySelectorAll("[data-verdict]")],
}));
const benchmark = document.getElementById("benchmark");
const search = document.getElementById("search");
const count = document.getElementById("count");
const nothing = document.getElementById("nothing");
const filters = document.getElementById("filters");

function textOf(article) {
  article.text ??= article.element.textContent.toLowerCase();
  return article.text;
}

function apply() {
  const verdict = filters.elements.verdict.value;
  const words = search.value.trim().toLowerCase();
  let answers = 0;
  for (const article of articles) {
    const fits =
      (!benchmark.value || article.benchmark === benchmark.value) && (!words || textOf(article).includes(words));
    let shown = 0;
    for (const generation of article.generations) {
      const visible = fits && (!verdict || generation.dataset.verdict === verdict);
      if (generation.hidden === visible) generation.hidden = !visible;
      shown += visible;
    }
    if (article.element.hidden === shown > 0) article.element.hidden = shown === 0;
    answers += shown;
  }
  count.textContent = `${answers} ${answers === 1 ? "answer" : "answers"}`;
  nothing.hidden = answers > 0;
}

function move(step) {
  const visible = articles.filter((article) => !article.element.hidden).map((article) => article.element);
  const current = visible.indexOf(document.activeElement.closest("article"));
  const next = visible[Math.min(Math.max(current + step, 0), visible.length - 1)];
  if (next) {
    next.focus({ preventScroll: true });
    next.scrollIntoView({ block: "start" });
  }
}

let waiting = 0;
search.addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(apply, 120);
});
filters.addEventListener("change", apply);
filters.addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape" && event.target === search) {
    search.value = "";
    apply();
    document.getElementById("answers").focus();
  } else if (event.target.matches("input, select")) {
    return;
  } else if (event.key === "/") {
    event.preventDefault();
    search.focus();
  } else if (event.key === "j" || event.key === "k") {
    event.preventDefault();
    move(event.key === "j" ? 1 : -1);
  }
});
// A browser that goes back fills in the form again.
apply();
