// The theme puts the copy button of each code block into a navigation landmark without a name; it is none. And it puts
// each table into a box that scrolls where the window is narrow; such a box can be reached and scrolled by keyboard.
const name = () => {
  document.querySelectorAll("nav.md-code__nav:not([role])").forEach((nav) => nav.setAttribute("role", "none"));
  document.querySelectorAll(".md-typeset__scrollwrap:not([tabindex])").forEach((box) => {
    if (box.scrollWidth <= box.clientWidth) return;
    box.tabIndex = 0;
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", "Table that scrolls sideways");
  });
};
new MutationObserver(name).observe(document.documentElement, { childList: true, subtree: true });
addEventListener("resize", name);
name();
