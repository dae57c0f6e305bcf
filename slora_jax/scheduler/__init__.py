"""Decides, each iteration anew, what the next step computes. Imports no JAX and does no I/O."""
