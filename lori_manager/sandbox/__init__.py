"""Programs that nobody has read, run in a child process that can do next to nothing."""
