/* The search runs in a Worker, which browsers refuse to a page opened from a folder. There this takes its place: the
   worker's script runs in a hidden frame, and messages go to and fro as events. */

class FrameWorker {
  constructor(url) {
    this.waiting = [];
    this.frame = document.createElement("iframe");
    this.frame.hidden = true;
    document.body.append(this.frame);
    const inside = (this.inside = this.frame.contentWindow);
    inside.postMessage = (data) => this.onmessage?.({ data });
    const script = inside.document.createElement("script");
    script.src = url;
    script.onload = () => {
      const waiting = this.waiting;
      this.waiting = null;
      waiting.forEach((data) => this.postMessage(data));
    };
    script.onerror = (event) => this.onerror?.(event);
    inside.document.body.append(script);
  }

  postMessage(data) {
    if (this.waiting) this.waiting.push(data);
    else this.inside.onmessage({ data });
  }

  terminate() {
    this.frame.remove();
  }
}

if (location.protocol === "file:") window.Worker = FrameWorker;
