// <piano-slider>: shows one of the figures beside it, the one that the range input counts to.
if (!customElements.get("piano-slider")) customElements.define("piano-slider", class extends HTMLElement {
  connectedCallback() {
    const all = this.parentElement, figures = [...all.querySelectorAll("figure")], input = all.querySelector("input");
    let sound = null;
    (input.oninput = () => {
      const before = sound, playing = before && !before.paused, figure = figures[input.value];
      for (const other of figures) other.hidden = other !== figure;
      input.setAttribute("aria-valuetext", figure.querySelector("figcaption").textContent);
      sound = figure.querySelector("audio");
      if (!before || before === sound) return;
      before.pause();
      [sound.currentTime, sound.volume, sound.muted] = [before.currentTime, before.volume, before.muted];
      // Refused where the next change comes first.
      if (playing) sound.play().catch(() => {});
    })();
  }
});
