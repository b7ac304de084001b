"""What can be said of a model, as data; the commands print it."""
