/* The search runs in a Worker, which browsers refuse to a page opened from a folder. There this takes its place: the
   worker's script runs in a hidden frame, and messages are copied to and fro. */

class FrameWorker {
  constructor(url) {
    this.frame = document.createElement("iframe");
    this.frame.hidden = true;
    document.body.append(this.frame);
    const inside = (this.inside = this.frame.contentWindow);
    inside.postMessage = (data) => setTimeout(() => this.onmessage?.({ data: structuredClone(data) }));
    this.loaded = new Promise((resolve) => {
      const script = inside.document.createElement("script");
      script.src = url;
      script.onload = resolve;
      script.onerror = (event) => this.onerror?.(event);
      inside.document.body.append(script);
    });
  }

  postMessage(data) {
    this.loaded.then(() => this.inside.onmessage({ data: this.inside.structuredClone(data) }));
  }

  terminate() {
    this.frame.remove();
  }
}

if (location.protocol === "file:") window.Worker = FrameWorker;
