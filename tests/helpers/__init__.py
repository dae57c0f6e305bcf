"""What several test modules share: small models, tokenizers and adapters, an engine without a model, oracles."""
