"""What an operator does with the data of the whole control plane, from the command line."""
