"""Learning from records: read, tokenise, train, write a directory that runs alone."""
