"""Transports of a live session: WebSocket, WebRTC, LiveKit."""
