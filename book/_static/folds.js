// One fold of code a section: what stands before each output is brought together at the end of its section. Without
// JavaScript, folds stay where the code ran.
"use strict";

document.addEventListener("DOMContentLoaded", () => {
  for (const section of document.querySelectorAll(".bd-article section")) {
    const [fold, ...others] = section.querySelectorAll(":scope > .cell > details.hide.above-input");
    if (!fold) continue;
    for (const other of others) {
      fold.append(...other.querySelectorAll(":scope > :not(summary)"));
      other.remove();
    }
    const cell = document.createElement("div");
    cell.className = "cell tag_hide-input docutils container"; // as the cells that the theme's style is for
    cell.append(fold);
    section.insertBefore(cell, section.querySelector(":scope > section"));
  }
});
