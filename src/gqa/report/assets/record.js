// What every page can do: give its record back, and print its tables.
"use strict";
(() => {
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => { d.open = true; }));

  const save = document.getElementById("save-record");
  save.addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([document.getElementById("record").textContent], { type: "application/json" }));
    link.download = save.dataset.file;
    link.click();
  });
})();
