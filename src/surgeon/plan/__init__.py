"""Plans: an expression for every tensor of the result, and the loop that computes them."""
