"""Commands that make every figure of the documents, and their rows in results/."""
