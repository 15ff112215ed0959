"""LongBench: 21 data sets of long contexts with questions about them (Bai et al. 2024, arXiv 2308.14508)."""
