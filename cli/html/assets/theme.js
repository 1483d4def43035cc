"use strict";
// Before anything is drawn: light or dark as it was chosen last, or as #light or #dark in the address says.
{
  let kept = null;
  try { kept = localStorage.getItem("coldstream-theme"); } catch { /* a browser that keeps nothing */ }
  const asked = ["#light", "#dark"].includes(location.hash) ? location.hash.slice(1) : kept;
  if (asked === "light" || asked === "dark") document.documentElement.dataset.theme = asked;
  document.documentElement.classList.add("scripted");
}
