"""Answer requests of other programs over HTTP, in the protocol of OpenAI."""
