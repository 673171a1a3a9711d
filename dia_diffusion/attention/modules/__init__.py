"""The self-attention modules that the paper shares or compares with, one a file, each from its own paper."""
