"""Other libraries, met where they are: adapters, imported when they are asked for."""
