"""What is installed, and whether training would start. Needs nothing but Python."""
