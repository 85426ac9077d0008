"""Predicted against measured memory on one CUDA card; see `__main__`."""
