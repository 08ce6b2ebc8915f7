"""What a run is: its configuration, the objects it is built of, and its stages."""
