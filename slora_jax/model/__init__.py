"""The base model: a pure function of parameters, a ragged batch and the pool. Knows nothing of requests."""
