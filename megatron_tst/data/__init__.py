"""Raw samples, bags, the dataset of all phases, index files for a stock recovery."""
