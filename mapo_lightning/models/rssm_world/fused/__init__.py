"""The same recurrence with a backward written by hand; equal to the readable one, and faster."""
