"""Runtime of the kernels: the native library, GPU checks and trials, and the warnings of slow paths."""
