"""Speech for a conversation."""
