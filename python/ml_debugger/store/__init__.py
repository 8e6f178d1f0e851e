"""Where a trace lies on disk; shared by the tracer and by the readers."""
