"""Parts of a conversation: text to speech."""
