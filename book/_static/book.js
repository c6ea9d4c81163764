// The theme gives cells that scroll a place in the tab order, but looks before all fonts have come: look again.
const lookAgain = () => {
  for (const code of document.querySelectorAll("pre")) if (code.scrollWidth > code.clientWidth) code.tabIndex = 0;
};
addEventListener("load", () => {
  lookAgain();
  document.fonts.ready.then(lookAgain);
});
