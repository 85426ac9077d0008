"""Renders plans and run records for people and programs."""
