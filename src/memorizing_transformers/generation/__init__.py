"""Generation: reading token by token, what was remembered of documents, sampling."""
