// The theme puts the copy button of each code block into a navigation landmark without a name; it is none.
const quiet = () => document.querySelectorAll("nav.md-code__nav:not([role])").forEach((nav) => nav.setAttribute("role", "none"));
new MutationObserver(quiet).observe(document.documentElement, { childList: true, subtree: true });
quiet();
