"""Several runs from one command: composes them, starts each as a program, and sums them up."""
