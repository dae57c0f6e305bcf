"""Benchmarks: ``python -m slora_jax.bench --help``. They time and print JSON; tests assert."""
