"use strict";
// The values under the pointer, in a box over the curves. data-curves: [{name, x: [epochs], y: [values]}], data-frame:
// [left, right, epoch at the right], in units of the drawing, whose left side is epoch 0.
for (const svg of document.querySelectorAll("svg[data-curves]")) {
  const curves = JSON.parse(svg.dataset.curves);
  const [left, right, last] = JSON.parse(svg.dataset.frame);
  const cursor = svg.querySelector(".cursor");
  const reading = svg.closest("figure").querySelector(".reading");
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const epoch = Math.min(Math.max((x - left) / (right - left), 0), 1) * last;
    const near = curves.map(({ name, x, y }) => {
      let best = 0;
      x.forEach((value, i) => { if (Math.abs(value - epoch) < Math.abs(x[best] - epoch)) best = i; });
      const value = y[best] === null ? "not a number" : y[best];
      return { at: x[best], words: curves.length > 1 ? `${name} ${value}` : `${value}` };
    });
    const place = left + (near[0].at / last) * (right - left);
    cursor.setAttribute("x1", place);
    cursor.setAttribute("x2", place);
    cursor.classList.add("shown");
    reading.textContent = [`epoch ${Number(near[0].at.toFixed(2))}`, ...near.map(({ words }) => words)].join("\n");
    reading.classList.toggle("left", epoch > last / 2);
  });
  svg.addEventListener("pointerleave", () => {
    cursor.classList.remove("shown");
    reading.textContent = "";
  });
}
// A picture takes the whole width after a click, and its old place after another.
for (const button of document.querySelectorAll("button.picture")) {
  button.addEventListener("click", () => button.closest("figure").classList.toggle("large"));
}
// What is folded away is printed all the same.
window.addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
