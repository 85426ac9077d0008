"""Runs inside the launched process: data, training, the meter."""
