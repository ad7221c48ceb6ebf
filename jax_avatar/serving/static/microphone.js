// Runs on the audio thread: floats of the microphone -> 16-bit PCM, 20 ms at a time.
class Microphone extends AudioWorkletProcessor {
  constructor() {
    super();
    this.size = Math.round(sampleRate / 50);
    this.buffer = new Int16Array(this.size);
    this.count = 0;
  }

  process(inputs) {
    const channel = inputs[0][0];
    if (!channel) return true;
    for (const value of channel) {
      this.buffer[this.count++] = Math.max(-1, Math.min(1, value)) * 32767;
      if (this.count === this.size) {
        this.port.postMessage(this.buffer.slice());
        this.count = 0;
      }
    }
    return true;
  }
}
registerProcessor("microphone", Microphone);
