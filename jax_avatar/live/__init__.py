"""Real-time sessions: pacing, jitter buffer, turns."""
