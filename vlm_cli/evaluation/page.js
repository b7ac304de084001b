// Show the cards that fit the filter, and make a picture when its card is near the screen.
"use strict";
const filter = document.querySelector(".filter"), [search, kind, verdict] = filter.querySelectorAll("input, select");
const count = filter.querySelector("output"), cards = [...document.querySelectorAll(".card")];
const texts = cards.map(card => card.textContent.toLowerCase());
function show() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  cards.forEach((card, i) => {
    const fits = (!kind.value || card.dataset.kind === kind.value)
      && (!verdict.value || card.classList.contains("right") === (verdict.value === "right"))
      && words.every(word => texts[i].includes(word));
    card.hidden = !fits;
    shown += fits;
  });
  count.textContent = `${shown} of ${cards.length}`;
  const narrowed = words.length > 0 || kind.value || verdict.value;
  for (const section of document.querySelectorAll("details")) {
    section.classList.toggle("empty", !section.querySelector(".card:not([hidden])"));
    if (narrowed) section.open = true;
  }
}
const near = new IntersectionObserver(entries => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    near.unobserve(target);
    for (const template of target.querySelectorAll("template")) template.replaceWith(template.content);
  }
}, { rootMargin: "800px" });
cards.forEach(card => near.observe(card));
filter.addEventListener("input", show);
filter.classList.add("works");
show();
