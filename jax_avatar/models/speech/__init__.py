"""Speech encoders."""
