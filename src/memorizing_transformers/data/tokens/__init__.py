"""Tokens on disk: tokenizers, the store, its preparation."""
