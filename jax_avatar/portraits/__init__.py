"""From any photograph to the picture that a stream starts from, and back into the photograph."""
