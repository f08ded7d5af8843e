"""What is too small for an operator each: kernels in C, compiled on the machine that runs them.

Nothing needs them: where there is no compiler, PyTorch does the same, slower.
"""
