"""How fast it is: one module a question, each against peers that run in turns with it."""
