"""Server of live sessions: admission, conversations, transports, metrics."""
