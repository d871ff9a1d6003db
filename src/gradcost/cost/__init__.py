"""What a step costs: bytes, FLOPs and seconds, each measured by an instrument of its own."""
