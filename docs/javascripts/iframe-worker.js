// The search runs in a web worker, and browsers refuse one to pages that are opened from a folder
// (file://). There, this stands in: a hidden frame that runs the same script.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.appendChild(this.frame)
      this.ready = new Promise(resolve => {
        const inside = this.frame.contentWindow
        const page = inside.document
        inside.importScripts = (...urls) => urls.reduce((before, each) =>
          before.then(() => new Promise((loaded, failed) => {
            const script = page.createElement("script")
            script.src = each
            script.onload = loaded
            script.onerror = failed
            page.body.appendChild(script)
          })), Promise.resolve())
        inside.postMessage = data =>
          this.dispatchEvent(new MessageEvent("message", { data }))
        inside.importScripts(url).then(() => resolve(inside))
      })
    }
    postMessage(data) {
      this.ready.then(inside => inside.dispatchEvent(new inside.MessageEvent("message", { data })))
    }
    terminate() {
      this.frame.remove()
    }
  }
}
