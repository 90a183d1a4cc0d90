// Browsers start no workers on pages that are opened as files: the one of the search runs in a hidden frame there.
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(address) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.documentElement.append(frame)
      this.inside = frame.contentWindow
      this.inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", {data}))
      this.started = new Promise((resolve, reject) => {
        const script = this.inside.document.createElement("script")
        Object.assign(script, {src: address, onload: resolve, onerror: reject})
        this.inside.document.head.append(script)
      })
    }
    async postMessage(data) {
      await this.started
      this.inside.dispatchEvent(new this.inside.MessageEvent("message", {data}))
    }
  }
