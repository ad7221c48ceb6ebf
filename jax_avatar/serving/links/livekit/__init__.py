"""The avatar of a LiveKit agent; needs the extra "livekit"."""
