// Pictures that enlarge, tables that sort, the filter of cards and rows, and downloads.
addEventListener("DOMContentLoaded", () => {
  const dialog = Object.assign(document.createElement("dialog"), { className: "shown" });
  dialog.append(document.createElement("img"));
  dialog.addEventListener("click", () => dialog.close());
  dialog.addEventListener("keydown", event => event.stopPropagation()); // Sphinx keeps Escape for itself
  document.body.append(dialog);
  for (const image of document.querySelectorAll("article img:not(.overview)")) {
    if (image.closest("a, .sd-card")) continue; // a link already
    const show = () => {
      dialog.firstChild.src = image.src;
      dialog.firstChild.alt = image.alt;
      dialog.showModal();
    };
    Object.assign(image, { tabIndex: 0, onclick: show, onkeydown: event => event.key === "Enter" && show() });
    image.setAttribute("role", "button");
  }

  for (const heading of document.querySelectorAll("table.sortable th")) {
    const sort = () => {
      const table = heading.closest("table"), body = table.tBodies[0], column = heading.cellIndex;
      const down = heading.getAttribute("aria-sort") !== "descending";
      table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const text = row => row.cells[column].textContent.trim();
      const order = (a, b) => (a - b || a.localeCompare(b, "en", { numeric: true })) * (down ? -1 : 1);
      const rows = [...body.rows].sort((a, b) => (text(a) === "") - (text(b) === "") || order(text(a), text(b)));
      body.append(...rows);
    };
    Object.assign(heading, { tabIndex: 0, onclick: sort, onkeydown: event => event.key === "Enter" && sort() });
  }

  const filter = document.querySelector("input.filter");
  filter?.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/);
    const fits = part => words.every(word => part.textContent.toLowerCase().includes(word));
    for (const row of document.querySelectorAll("table.sortable tbody tr, article .sd-col")) row.hidden = !fits(row);
    for (const family of document.querySelectorAll("article section section"))
      family.hidden = !family.querySelector(".sd-col:not([hidden])");
  });

  // Of a page that is a file a browser shows a linked notebook as text instead of saving it, and lets no script read it; but a
  // script may be loaded, and what it hands over may be saved.
  const link = document.querySelector("a[download]");
  link?.addEventListener("click", event => {
    if (location.protocol !== "file:") return;
    event.preventDefault();
    window.keep = text => {
      const href = URL.createObjectURL(new Blob([text], { type: "application/x-ipynb+json" }));
      Object.assign(document.createElement("a"), { href, download: link.pathname.split("/").pop() }).click();
      URL.revokeObjectURL(href);
    };
    document.head.append(Object.assign(document.createElement("script"), { src: `${link.href}.js` }));
  });
});
