"""Data sets of training pictures: finding, decoding, checking and caching them."""
