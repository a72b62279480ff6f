"""What takes a bias out of a model: our feedback beside the methods people use today, on the same data and budget."""
