"""A search for the best cut of a budget: layers, halves of layers and widths, by a surrogate and by measurement."""
