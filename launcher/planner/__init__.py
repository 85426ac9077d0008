"""Computes plans in the parent process: trace, skyline, search."""
