"""Videos of talking people -> clips of one person who speaks."""
