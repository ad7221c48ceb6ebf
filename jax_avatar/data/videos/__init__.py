"""Videos of talking people -> clips of a single speaker."""
