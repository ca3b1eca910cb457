"""What the memory does for a text, token by token."""
