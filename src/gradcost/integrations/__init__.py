"""Adapters for other libraries. Each module needs the gradcost extra named after its library."""
