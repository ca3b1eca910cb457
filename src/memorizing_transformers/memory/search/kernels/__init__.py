"""The inner loops of the searches, one for each kind of hardware."""
