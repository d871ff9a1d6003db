"""Adapters for other libraries. Each module needs the extra of gradcost with the name of the library."""
