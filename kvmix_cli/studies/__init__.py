"""Studies: what joins profiling, allocation and evaluation. Nothing here prints or knows the command line."""
