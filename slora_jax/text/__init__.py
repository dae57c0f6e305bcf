"""Tokens and text: the tokenizer, its streaming decoder, and stop strings. No JAX here."""
