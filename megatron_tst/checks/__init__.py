"""What is looked at before training starts."""
