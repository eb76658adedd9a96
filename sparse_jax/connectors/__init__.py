"""Maps from the features of one dictionary to those of another."""
