"""Records: what people train, evaluate and batch on, one JSON object a line."""
