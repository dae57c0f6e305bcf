"""Runs the scheduler's plans on the device and turns sampled tokens into answers."""
