"""What the activations of a text say about each matrix."""
