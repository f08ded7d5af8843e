"""What carries tensors from one process to another: a small interface (``base``), one file for each implementation."""
