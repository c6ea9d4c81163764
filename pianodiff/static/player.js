// <piano-head seconds="…">: a slider over the picture of a sound. Each output brings this script, and the first counts.
if (!customElements.get("piano-head")) customElements.define("piano-head", class extends HTMLElement {
  connectedCallback() {
    const audio = this.closest("figure").querySelector("audio"), end = +this.getAttribute("seconds");
    const calm = matchMedia("(prefers-reduced-motion: reduce)");
    const show = () => {
      cancelAnimationFrame(this.frame);
      this.style.setProperty("--at", `${100 * audio.currentTime / end}%`);
      if (!audio.paused && !calm.matches) this.frame = requestAnimationFrame(show);
    };
    // Not while it plays, when a screen reader would talk into the music.
    const tell = () => {
      show();
      this.setAttribute("aria-valuenow", audio.currentTime.toFixed(1));
      this.setAttribute("aria-valuetext", `${audio.currentTime.toFixed(1)} of ${end.toFixed(1)} seconds`);
    };
    const seek = time => audio.currentTime = Math.min(Math.max(time, 0), end);
    const point = event => {
      const box = this.getBoundingClientRect();
      seek(end * (event.clientX - box.left) / box.width);
    };
    audio.onplay = () => {
      for (const other of document.querySelectorAll(".piano audio")) if (other !== audio) other.pause();
      show();
    };
    audio.ontimeupdate = show;
    audio.onseeking = audio.onpause = this.onfocus = tell;
    this.onclick = point;
    this.onpointerdown = event => event.button || this.setPointerCapture(event.pointerId);
    this.onpointermove = event => this.hasPointerCapture(event.pointerId) && point(event);
    this.onkeydown = event => {
      const now = audio.currentTime, step = end / 20, to = {ArrowLeft: now - step, ArrowDown: now - step,
        ArrowRight: now + step, ArrowUp: now + step, Home: 0, End: end}[event.key];
      if (event.ctrlKey || event.altKey || event.metaKey || to === undefined && event.key !== " ") return;
      event.preventDefault();
      if (event.key !== " ") seek(to);
      else if (audio.paused) audio.play().catch(() => {});
      else audio.pause();
    };
    for (const [name, value] of Object.entries({role: "slider", tabindex: 0, "aria-label": "place in the sound",
      "aria-valuemin": 0, "aria-valuemax": end.toFixed(1)})) this.setAttribute(name, value);
    tell();
  }
});
