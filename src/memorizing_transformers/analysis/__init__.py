"""Looking inside a trained model: what its memory retrieved, and what that was worth."""
