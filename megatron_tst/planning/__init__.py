"""A run before it starts: text, cost, memory, layout, and what the paper measured."""
