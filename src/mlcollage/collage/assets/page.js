(() => {
  "use strict";
  const root = document.documentElement;
  root.classList.add("scripted");
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];

  // Theme: the system's, unless one was chosen. A browser may refuse storage for pages from disk; then it lasts for the visit.
  const themeButton = document.getElementById("theme");
  const modes = ["auto", "light", "dark"];
  const setTheme = (mode) => {
    if (mode === "auto") delete root.dataset.theme; else root.dataset.theme = mode;
    themeButton.textContent = `Theme: ${mode}`;
  };
  let mode = "auto";
  try { mode = localStorage.getItem("mlcollage-theme") || "auto"; } catch { mode = "auto"; }
  setTheme(modes.includes(mode) ? mode : "auto");
  themeButton.addEventListener("click", () => {
    const next = modes[(modes.indexOf(root.dataset.theme || "auto") + 1) % modes.length];
    setTheme(next);
    try { localStorage.setItem("mlcollage-theme", next); } catch { /* not kept, see above */ }
  });

  // Slides full screen: the dialog element brings Esc, the focus trap and the return of the focus.
  const full = document.getElementById("full");
  if (full) {
    const zooms = all(".zoom");
    const picture = new Image(1600, 900);
    let at = 0;
    const show = (i) => {
      at = (i + zooms.length) % zooms.length;
      const source = zooms[at].querySelector("img");
      picture.src = source.src;
      picture.alt = source.alt;
      full.prepend(picture);
    };
    zooms.forEach((zoom, i) => zoom.addEventListener("click", () => { show(i); full.showModal(); }));
    full.addEventListener("keydown", (event) => {
      if (event.key === "ArrowRight") show(at + 1);
      if (event.key === "ArrowLeft") show(at - 1);
    });
    full.addEventListener("click", (event) => {
      const step = event.target.closest("[data-step]");
      if (step) show(at + Number(step.dataset.step));
      else full.close();
    });
  }

  // Copy
  const said = document.getElementById("said");
  all(".copy").forEach((button) => button.addEventListener("click", async () => {
    const code = button.parentElement.querySelector("code");
    let done = true;
    try { await navigator.clipboard.writeText(code.textContent); } catch {
      const range = document.createRange();
      range.selectNodeContents(code);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      done = document.execCommand("copy");
    }
    button.textContent = done ? "Copied" : "Selected";
    said.textContent = done ? "Copied to the clipboard" : "The code is selected; press Ctrl+C to copy it";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  }));

  // Filters: any of the chosen values within a group, all groups together; the choice is kept in the address.
  const picks = all(".pick");
  if (picks.length) {
    const cards = all(".card"), months = all(".month");
    const chosen = () => {
      const groups = {};
      picks.filter((p) => p.ariaPressed === "true").forEach((p) => (groups[p.dataset.key] ??= []).push(p.dataset.value));
      return groups;
    };
    const apply = () => {
      const groups = Object.entries(chosen());
      cards.forEach((card) => {
        card.hidden = !groups.every(([key, values]) => values.some((v) => card.dataset[key].split(" ").includes(v)));
      });
      months.forEach((month) => { month.hidden = !month.querySelector(".card:not([hidden])"); });
      const left = cards.filter((card) => !card.hidden).length;
      document.getElementById("count").textContent = `${left} of ${cards.length} papers`;
      document.getElementById("clear").hidden = groups.length === 0;
      document.querySelector(".none").hidden = left > 0;
    };
    const remember = () => {
      const hash = Object.entries(chosen()).map(([key, values]) => `${key}=${values.join(",")}`).join("&");
      history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
    };
    const recall = () => {
      const wanted = new URLSearchParams(location.hash.slice(1));
      picks.forEach((p) => { p.ariaPressed = String((wanted.get(p.dataset.key) || "").split(",").includes(p.dataset.value)); });
      apply();
    };
    picks.forEach((p) => p.addEventListener("click", () => {
      p.ariaPressed = String(p.ariaPressed !== "true");
      apply();
      remember();
    }));
    ["clear", "clear-too"].forEach((id) => document.getElementById(id).addEventListener("click", () => {
      picks.forEach((p) => { p.ariaPressed = "false"; });
      apply();
      remember();
      picks[0].focus();
    }));
    addEventListener("hashchange", recall);
    recall();
  }
})();
