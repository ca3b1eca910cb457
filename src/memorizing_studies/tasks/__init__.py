"""Long-range tasks: what a memory finds, by distance."""
