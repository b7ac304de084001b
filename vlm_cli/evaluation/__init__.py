"""Questions with known answers, put to a model: what it answers, and how often that is right."""
