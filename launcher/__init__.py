"""A fine-tuning launcher that plans memory before it launches."""
